import json
import random

import pytest

from examples.digits import ablation_regimes
from megatron_r1v2.data.samples import ShardSample, parse_sample
from megatron_r1v2.data.shards import write_shards
from megatron_r1v2.data.stream import read_shards


def responses(count=2000, seed=0):
    """Return 16 responses to each prompt: a part at even odds, the rest nearly always right or wrong."""
    generator = random.Random(seed)
    results = {}
    for number in range(count):
        chance = generator.choice((0.5, 0.5, 0.98, 0.98, 0.98, 0.02))
        results[f"p-{number}"] = [generator.random() < chance for _ in range(16)]
    return results


def test_fresh_responses_are_effective_as_often_as_a_regime_says():
    results = responses()
    plans = ablation_regimes.plan_regimes(results, 500)
    assert [regime.name for regime, _ in plans] == ["easy", "middle", "hard"]
    for regime, keys in plans:
        assert len(keys) == len(set(keys)) == regime.prompts == 500
        assert keys == [key for key in results if key in set(keys)]
        # By the half of the responses that has not sorted the prompts.
        fresh = sum(ablation_regimes.is_effective(results[key][8:]) for key in keys) / len(keys)
        assert fresh == pytest.approx(regime.expected, abs=0.06)
    wanted = {regime.name: regime.expected for regime, _ in plans}
    assert wanted["easy"] == pytest.approx(0.5, abs=1e-4)
    assert wanted["middle"] == pytest.approx(0.25, abs=1e-4)
    # Even the prompts that seemed settled teach now and then.
    assert 0.1 <= wanted["hard"] < 0.2


def test_regimes_are_the_same_every_time():
    assert ablation_regimes.plan_regimes(responses(), 300) == ablation_regimes.plan_regimes(responses(), 300)


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"a": [True] * 16, "b": [False] * 16}, "of 2 prompts 0 have right and wrong responses"),
        (responses(60), r"regime 'easy' needs \d+ prompts that teach and \d+ others"),
    ],
)
def test_too_few_prompts_are_refused(results, message):
    with pytest.raises(ValueError, match=message):
        ablation_regimes.plan_regimes(results, 100)


def test_each_regime_is_a_data_set(tmp_path):
    results = responses(120)
    turns = ({"role": "user", "content": "What?"},)
    write_shards((ShardSample(key, turns, "1", "numeric") for key in results), tmp_path / "data")
    rows = [{"prompt_key": key, "rule_correct": right} for key, of_prompt in results.items() for right in of_prompt]
    file = tmp_path / "evaluation-pool.rollouts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [str(file), "--data", str(tmp_path / "data"), "--output", str(tmp_path / "out"), "--prompts", "40"]
    ablation_regimes.main(arguments)
    plans = {regime.name: keys for regime, keys in ablation_regimes.plan_regimes(results, 40)}
    for name, keys in plans.items():
        assert [sample.key for sample in read_shards(tmp_path / "out" / name, parse_sample)] == keys
    told = json.loads((tmp_path / "out" / "regimes.json").read_text())
    assert [regime["name"] for regime in told] == list(plans)
    with pytest.raises(ValueError, match="exists"):
        ablation_regimes.write_regimes(file, tmp_path / "data", tmp_path / "out", prompts=40)
