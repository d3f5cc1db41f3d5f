"""The mismatch over ranks is that of one rank, whoever holds which sample."""

from collections.abc import Sequence

import pytest
import torch

from megatron_r1v2.config.schema import ParallelConfig
from megatron_r1v2.parallel import groups
from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.training.batches import RowFormat, collate
from megatron_r1v2.training.mismatch import compute_mismatch
from tests.parallel_layouts import start_layout
from tests.ranks import run_ranks
from tests.stages.scripted import IMAGE_TOKEN, make_prompt, make_sample

PROMPTS = {f"p{tiles}": make_prompt(f"p{tiles}", tiles=tiles) for tiles in range(3)}
ALL = ((("p1", 3), ("p2", 5)), (("p0", 4),), (("p2", 1), ("p0", 7)))
"""Microbatches of (prompt, response length)."""
LAYOUTS = {
    "unequal": (ParallelConfig(), (ALL[:1], ALL[1:])),
    "a rank without samples": (ParallelConfig(), ((), ALL)),
    "every tensor-parallel rank holds all": (ParallelConfig(tensor=2), (ALL, ALL)),
    "every stage holds all": (ParallelConfig(pipeline=2), (ALL, ALL)),
    "nobody has a sample": (ParallelConfig(), ((), ())),
}


def difference_at(position: int) -> float:
    return 0.1 * (position - 2)


def measure(microbatches: Sequence, context: ParallelContext) -> dict[str, float]:
    """Let the training forward differ from the engine by 0.1 (position - 2) at each response token."""
    batches, log_probs = [], []
    for rows in microbatches:
        samples = [make_sample(PROMPTS[key], length=length, old=False) for key, length in rows]
        batch = collate(
            samples,
            PROMPTS,
            RowFormat(0, IMAGE_TOKEN, tensor_size=context.tensor_size, device=context.device),
        )
        values_BS = torch.full_like(batch.rollout_log_probs_BS, 9.0)  # prompt and padding must not count
        for row, sample in enumerate(samples):
            for position in range(sample.response_length):
                column = sample.prompt_length - 1 + position
                values_BS[row, column] = batch.rollout_log_probs_BS[row, column] + difference_at(position)
        batches.append(batch)
        log_probs.append(values_BS)
    return compute_mismatch(batches, log_probs, context)


def test_what_is_replayed_does_not_count(context):
    rows = RowFormat(0, IMAGE_TOKEN, tensor_size=1, device=context.device)
    fresh, replayed = make_sample(PROMPTS["p1"], length=3, old=False), make_sample(PROMPTS["p1"], 1, length=4)
    batch = collate([fresh, replayed], PROMPTS, rows, replayed=[False, True])
    log_probs_BS = batch.rollout_log_probs_BS + torch.tensor([[0.5], [9.0]])
    metrics = compute_mismatch([batch], [log_probs_BS], context)
    assert metrics["rollout_corr/log_prob_abs_diff"] == pytest.approx(0.5)


def measure_on_two_ranks() -> dict[str, dict[str, float]]:
    results = {}
    for name, (parallel, by_rank) in LAYOUTS.items():
        context = start_layout(parallel)
        rank = torch.distributed.get_rank()
        results[name] = measure(by_rank[rank], context)
    return results


@pytest.fixture(scope="module")
def context():
    yield groups.initialize(ParallelConfig(), seed=1)
    groups.shut_down()


@pytest.fixture(scope="module")
def one_rank(context):
    return measure(ALL, context)


def test_one_rank_by_hand(one_rank):
    for suffix, keys in (("", {"p0", "p1", "p2"}), ("_image", {"p1", "p2"}), ("_text", {"p0"})):
        lengths = [length for rows in ALL for key, length in rows if key in keys]
        differences = [difference_at(position) for length in lengths for position in range(length)]
        expected = sum(abs(value) for value in differences) / len(differences)
        assert one_rank["rollout_corr/log_prob_abs_diff" + suffix] == pytest.approx(expected, rel=1e-5)
        mean = sum(differences) / len(differences)
        assert one_rank["rollout_corr/kl" + suffix] == pytest.approx(-mean, rel=1e-5, abs=1e-6)
        # A response's mean difference grows with its length: the extremes are those of the longest and the shortest.
        means = [sum(map(difference_at, range(length))) / length for length in lengths]
        extremes = [-max(means), -min(means)]
        assert one_rank["rollout_corr/log_ppl_diff_min" + suffix] == pytest.approx(extremes[0], rel=1e-4, abs=1e-6)
        assert one_rank["rollout_corr/log_ppl_diff_max" + suffix] == pytest.approx(extremes[1], rel=1e-4, abs=1e-6)


def test_two_ranks_measure_what_one_measures(one_rank):
    for rank in run_ranks(2, measure_on_two_ranks):
        assert rank.pop("nobody has a sample") == {}
        for metrics in rank.values():
            assert metrics == pytest.approx(one_rank, rel=1e-6, abs=1e-12)
