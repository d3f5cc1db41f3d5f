"""Own reward functions in the verifier workers: their inputs, their failures, and what a run knows of them."""

import io
import logging
from pathlib import Path

import pytest
import torch
from PIL import Image

from megatron_r1v2.config.schema import RewardConfig, RewardFunction
from megatron_r1v2.rewards.functions import check_functions, describe_functions, score_by_functions
from megatron_r1v2.rewards.score import reward_metrics, score_rollouts
from megatron_r1v2.rewards.verifiers import VerifierPool
from megatron_r1v2.types import Prompt, Rollout

OWN = str(Path(__file__).with_name("own_functions.py"))


def function(name, path=OWN, weight=1.0):
    return RewardFunction(path=path, name=name, weight=weight)


def png(color):
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(stream, "PNG")
    return stream.getvalue()


def prompt_of(key, *, level="1", answer="8", images=()):
    return Prompt(
        key=key,
        messages=({"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image>\nadd them"}),
        token_ids=(1,),
        tiles_TCHW=torch.zeros(0, 3, 4, 4, dtype=torch.uint8),
        answer=answer,
        answer_type="numeric",
        images=images,
        metadata={"level": level},
    )


PROMPTS = [prompt_of("a", images=(png("red"), png("blue"))), prompt_of("b", level="2")]


@pytest.fixture
def pool():
    with VerifierPool(2, 1.0) as made:
        yield made


def test_a_function_gets_everything_of_its_sample(pool):
    rewards, ended = score_by_functions([function("parts"), function("short")], PROMPTS, ["it is 8", "none"], pool)
    assert rewards[0] == {
        "parts": (1 + 0.25 + 1 + 1) / 4,
        "parts/says_answer": 1.0,
        "parts/level": 0.25,
        "parts/images": 1.0,
        "parts/asked": 1.0,
        "short": pytest.approx(0.3),
    }
    assert rewards[1]["parts/images"] == rewards[1]["parts/says_answer"] == 0.0
    assert rewards[1]["parts/level"] == 0.5
    assert ended == [True, True]


def test_a_prompt_without_an_answer_gives_none(pool):
    for missing in (None, ""):
        [rewards], _ = score_by_functions([function("parts")], [prompt_of("a", answer=missing)], ["8"], pool)
        assert rewards["parts/says_answer"] == 0.0


@pytest.mark.parametrize(
    ("name", "error", "timeouts", "crashes"),
    [("fails_on_b", "KeyError: 'level 2' (line", 0, 1), ("hangs_on_b", "it took too long, or ended its process", 1, 0)],
)
def test_a_failure_is_0_for_its_sample_counted_and_named(pool, caplog, name, error, timeouts, crashes):
    with caplog.at_level(logging.WARNING):
        rewards, ended = score_by_functions([function(name)], PROMPTS, ["", ""], pool)
    assert rewards == [{name: 1.0}, {name: 0.0}]
    assert ended == [True, False]
    assert (pool.timeouts, pool.crashes) == (timeouts, crashes)
    [message] = caplog.messages
    assert message.startswith(f"{OWN}: {name} failed for sample 'b', which gets 0: {error}")


def test_many_failures_are_a_few_lines(pool, caplog):
    prompts = [PROMPTS[0], *[prompt_of(f"b{number}", level="2") for number in range(8)]]
    with caplog.at_level(logging.WARNING):
        score_by_functions([function("fails_on_b")], prompts, [""] * 9, pool)
    assert len(caplog.messages) == 4
    assert caplog.messages[-1] == f"{OWN}: fails_on_b failed for 5 more responses"
    assert pool.crashes == 8


@pytest.mark.parametrize("name", ["leaves", "fails_on_b"])
def test_a_function_that_always_fails_ends_the_run(pool, name):
    with pytest.raises(RuntimeError, match=rf"own_functions.py: {name} failed for every response, .*sample 'b'"):
        score_by_functions([function(name)], PROMPTS[1:] * 2, ["", ""], pool)


def test_a_file_that_changes_while_it_is_used_ends_the_run(pool, tmp_path):
    path = tmp_path / "reward.py"
    path.write_text("def f(**_): return 1\n")
    own = [function("f", str(path))]
    assert score_by_functions(own, PROMPTS, ["", ""], pool)[0] == [{"f": 1.0}] * 2
    path.write_text("def f(**_): return 0\n")
    with pytest.raises(RuntimeError, match=r"reward.py has changed since the run began"):
        score_by_functions(own, PROMPTS, ["", ""], pool)


def test_functions_are_described_with_the_content_of_their_files(tmp_path):
    path = tmp_path / "reward.py"
    path.write_text("def f(**_): return 1\n")
    [first] = describe_functions([function("f", str(path), 0.5)])
    path.write_text("def f(**_): return 0\n")
    [second] = describe_functions([function("f", str(path), 0.5)])
    assert {**first, "sha256": ""} == {**second, "sha256": ""} == {
        "path": str(path), "name": "f", "weight": 0.5, "sha256": "",
    }  # fmt: skip
    assert first["sha256"] != second["sha256"]
    assert describe_functions([]) == []


def test_functions_are_checked_before_a_run(tmp_path):
    check_functions([])
    check_functions([function("parts"), function("short")])
    broken = tmp_path / "broken.py"
    broken.write_text("import nowhere_to_be_found\n")
    with pytest.raises(ValueError, match=r"reward.functions: .*broken.py: it cannot be imported: .*no function 'shrt'"):
        check_functions([function("f", str(broken)), function("shrt"), function("short")])


def test_they_are_parts_of_the_reward_and_metrics(pool):
    settings = RewardConfig(
        answer_weight=0.0,
        format_weight=0.0,
        functions=[{"path": OWN, "name": "parts", "weight": 2.0}, {"path": OWN, "name": "short", "weight": 0}],
    )
    rollouts = [Rollout(prompt.key, 0, (5,), (-0.5,), 0, "stop") for prompt in PROMPTS]
    scored, counts = score_rollouts(
        {prompt.key: prompt for prompt in PROMPTS},
        rollouts,
        ["8", ""],
        settings=settings,
        pool=pool,
        max_response_tokens=8,
    )
    assert [response.total for response in scored] == [2 * response.rewards["parts"] for response in scored]
    metrics = reward_metrics(counts)
    assert metrics["critic/rewards/mean"] == pytest.approx((2 * 3.25 / 4 + 2 * 1.5 / 4) / 2)
    assert metrics["reward/parts/mean"] == metrics["critic/rewards/mean"] / 2
    assert metrics["reward/parts/level/mean"] == 0.375
    assert metrics["reward/short/mean"] == pytest.approx(0.95)
    assert metrics["reward/answer/mean"] == 0.0


def test_without_answers_the_answer_part_does_not_apply(pool):
    settings = RewardConfig(functions=[{"path": OWN, "name": "short"}])
    rollout = Rollout("a", 0, (5,), (-0.5,), 0, "stop")
    arguments = {"pool": pool, "max_response_tokens": 8}
    prompts = {"a": prompt_of("a", answer="")}
    [scored], counts = score_rollouts(prompts, [rollout], ["12345"], settings=settings, **arguments)
    assert scored.rewards == {"format": 0.0, "short": 0.5}
    assert not scored.rule_correct
    # The weight of the answer goes to the others: 0.5 x 2.2 / 1.2.
    assert scored.total == pytest.approx(0.5 * 2.2 / 1.2)
    assert "reward/answer/mean" not in reward_metrics(counts)
    # A reward model judges without answers too.
    model = RewardConfig(model_weight=1.0, model_centre=0.0)
    [scored], _ = score_rollouts(prompts, [rollout], ["12345"], settings=model, model_scores=[0.0], **arguments)
    assert scored.rewards == {"format": 0.0, "model": 0.5}
    with pytest.raises(ValueError, match="prompt 'a' has no answer to compare with; .*reward.functions"):
        score_rollouts(prompts, [rollout], ["12345"], settings=RewardConfig(), **arguments)
