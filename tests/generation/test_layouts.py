"""Tensor, sequence, pipeline and data parallelism give the rollouts of one rank."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from megatron_r1v2.config.schema import Fp8, ParallelConfig
from megatron_r1v2.generation.features import FeatureCache
from megatron_r1v2.generation.queue import SharedPromptQueue
from megatron_r1v2.parallel import objects
from tests.generation.worlds import generate, make_engine, make_prompts, start
from tests.ranks import run_ranks

LAYOUTS = {
    "TP2": ParallelConfig(tensor=2),
    "TP2 with sequence parallelism": ParallelConfig(tensor=2, sequence=True),
    "PP2": ParallelConfig(pipeline=2),
    "DP2": ParallelConfig(),
}
FP8_STEPS = [("TP2 with sequence parallelism", Fp8.tensorwise), ("TP2", Fp8.blockwise), ("PP2", Fp8.tensorwise)]
PROMPTS = 7
# Chunked prefill and evictions happen in lockstep, or ranks would wait for each other for ever.
TIGHT = {"max_tokens_per_step": 64, "max_requests": 8, "kv_cache_gib": 0.0003}


class CountingQueue(SharedPromptQueue):
    """A queue that counts the prompts that this replica has taken."""

    taken = 0

    def __iter__(self):
        for prompt in super().__iter__():
            self.taken += 1
            yield prompt


def rollouts_of(name: str, model, context) -> dict:
    prompts = make_prompts(model, PROMPTS)
    engine = make_engine(model, context)
    queue = CountingQueue(prompts, context=context, name=name)
    taken: list[int] = []
    roomy = generate(engine, queue, FeatureCache(10**9), progress=lambda *_: taken.append(queue.taken))
    engine.settings = engine.settings.changed(**TIGHT)
    engine.stop_ids = frozenset({100})
    queue = SharedPromptQueue(prompts, context=context, name=f"{name} tight")
    tight = generate(engine, queue, FeatureCache(0), max_response_tokens=100)
    return {"roomy": roomy, "tight": tight, "evictions": engine.num_evictions, "taken": taken}


def two_ranks(folder: str) -> dict[str, dict]:
    results = {}
    for name, parallel in LAYOUTS.items():
        model, context = start(folder, parallel)
        results[name] = rollouts_of(name, model, context)
        if parallel.sequence:
            results["step after rollout"] = train(model)
        for fp8 in (fp8 for layout, fp8 in FP8_STEPS if layout == name):
            results[f"{name}, {fp8.value}"] = padded_rollouts(*start(folder, parallel, fp8=fp8))
    results["stale weights"] = weights_after_overlapped_step(model, context)
    return results


def padded_rollouts(model, context) -> dict:
    """Roll out with the padding of FP8 (its products need TransformerEngine), the batch small, odd and full."""
    lengths: list[int] = []
    hook = model.language.register_forward_pre_hook(lambda _, arguments: lengths.append(arguments[0].shape[1]))
    prompts = make_prompts(model, PROMPTS)
    for max_requests in (2, 13):
        rollouts = generate(make_engine(model, context, max_requests=max_requests), prompts, FeatureCache(10**9))
    hook.remove()
    return {"roomy": rollouts, "lengths": lengths}


def train(model) -> bool:
    """Take gradients at the lengths the engine used: sequence-parallel buffers made for inference must not be met."""
    for length in (16, 64, 192):
        logits = model(torch.zeros(1, length, dtype=torch.int64), torch.arange(length)[None])
        logits.square().mean().backward()
    return all(parameter.grad.isfinite().all() for parameter in model.language.parameters())


def weights_after_overlapped_step(model, context) -> dict[str, float]:
    """Return how far the ranks' weights are apart after a step that gathers parameters lazily, and after a sync."""
    config = DistributedDataParallelConfig(
        use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
    )
    ddp = DistributedDataParallel(model.config, config, model.language)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=0.1, use_distributed_optimizer=True, overlap_param_gather=True), [ddp]
    )
    ddp(torch.zeros(1, 8, dtype=torch.int64), torch.arange(8)[None], None).square().mean().backward()
    ddp.finish_grad_sync()
    optimizer.step()

    def apart() -> float:
        vector = torch.cat([parameter.detach().flatten() for parameter in ddp.module.parameters()])
        one, other = objects.all_gather(vector, context.groups.dp)
        return (one - other).abs().max().item()

    stale = apart()
    ddp.start_param_sync(force_sync=True)
    return {"before": stale, "after": apart()}


def one_rank_rollouts(folder: str) -> dict:
    return rollouts_of("one", *start(folder, ParallelConfig()))


@pytest.fixture(scope="module")
def results(model_folder) -> tuple[dict, list[dict]]:
    return run_ranks(1, one_rank_rollouts, model_folder)[0], run_ranks(2, two_ranks, model_folder)


@pytest.mark.parametrize("memory", ["roomy", "tight"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_rollouts_are_those_of_one_rank(results, name, memory):
    one, two = results
    parts = [rank[name][memory] for rank in two]
    if name == "DP2":
        prompts = [{rollout.prompt_key for rollout in part} for part in parts]
        assert not prompts[0] & prompts[1]
        rollouts = sorted(parts[0] + parts[1], key=lambda rollout: (rollout.prompt_key, rollout.sample_index))
    else:
        assert parts[0] == parts[1], "the ranks of a replica agree to the bit"
        rollouts = parts[0]
    expected = one[memory]
    assert [rollout.token_ids for rollout in rollouts] == [rollout.token_ids for rollout in expected]
    for rollout, other in zip(rollouts, expected, strict=True):
        assert replace(rollout, rollout_log_probs=()) == replace(other, rollout_log_probs=())
        torch.testing.assert_close(
            torch.tensor(rollout.rollout_log_probs), torch.tensor(other.rollout_log_probs), atol=2e-5, rtol=0
        )


def test_a_replica_begins_with_no_more_than_its_share(results):
    one, two = results
    assert one["taken"][0] == PROMPTS, "there is room for all"
    # Which replica is first is chance, and so is whether a late one finds anything left.
    starts = [rank["DP2"]["taken"][0] for rank in two if rank["DP2"]["taken"]]
    assert max(starts) == 4


def test_memory_was_tight_enough_to_evict(results):
    one, two = results
    assert one["evictions"] > 0
    assert two[0]["TP2"]["evictions"] > 0
    assert two[0]["PP2"]["evictions"] > 0


def test_training_follows_a_rollout_under_sequence_parallelism(results):
    assert all(rank["step after rollout"] for rank in results[1])


def test_overlapped_parameter_gather_needs_a_sync_before_generation(results):
    """The warning in RolloutEngine's docstring is real, and the call that it names is the remedy."""
    for rank in results[1]:
        assert rank["stale weights"]["before"] > 1e-3
        assert rank["stale weights"]["after"] == 0


@pytest.mark.parametrize(("name", "fp8"), FP8_STEPS, ids=lambda value: getattr(value, "value", value))
def test_steps_of_any_batch_have_the_lengths_that_fp8_needs(results, name, fp8):
    """So no linear is wrapped for inference; megatron-core zeroes the padding on every stage, which changes nothing."""
    one, two = results
    for rank in two:
        result = rank[f"{name}, {fp8.value}"]
        ranks = 2 if LAYOUTS[name].sequence else 1
        multiple = 128 if fp8 is Fp8.blockwise else 8
        assert len(set(result["lengths"])) >= 1
        assert [length for length in result["lengths"] if length % (multiple * ranks)] == []
        assert [r.token_ids for r in result["roomy"]] == [r.token_ids for r in one["roomy"]]
