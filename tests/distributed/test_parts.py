"""Whatever parts train: only they have gradients, buffers and optimizer state; saved and resumed on every layout."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_r1v2.config.load import recipe_yaml
from megatron_r1v2.config.recipes import GrpoRecipe
from megatron_r1v2.config.schema import AlgorithmConfig, ParallelConfig, Part, Recompute, TrainConfig
from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.stages.grpo.updates import batch_loss
from megatron_r1v2.training.optimizer import build_optimizer
from megatron_r1v2.training.policy import Policy
from megatron_r1v2.training.store import CheckpointStore, Snapshot, load_weights
from tests.distributed.steps import ALL_PARTS, CLIP, Material, collate_microbatch, make_material, make_policy
from tests.parallel_layouts import start_layout
from tests.ranks import run_ranks
from tests.tiny_hf import tiny_hf_model, tiny_text_config, tiny_vision_config

# One group: every worker of a parallel test run would start the ranks again.

COMBINATIONS = (("adapter",), ("adapter", "language"), ("adapter", "vision"), ALL_PARTS)
MICROBATCHES = (("two/0", "one/0"), ("text/0", "other/0"))
PP2 = {"pipeline": 2}
SP2 = {"tensor": 2, "sequence": True}


@dataclass(frozen=True)
class Case:
    """Parts to train on a layout, and the layout that resumes."""

    parts: tuple[str, ...]
    parallel: dict[str, Any]
    resumed: dict[str, Any]


ONE_RANK = {"+".join(parts): Case(parts, {}, {}) for parts in COMBINATIONS}
TWO_RANKS = {
    **{f"{'+'.join(parts)} PP2": Case(parts, PP2, PP2) for parts in COMBINATIONS},
    "vision+adapter+language TP2": Case(ALL_PARTS, SP2, SP2),
    "adapter PP2 to TP2": Case(("adapter",), PP2, SP2),
    "adapter TP2 to PP2": Case(("adapter",), SP2, PP2),
    "adapter+language PP2 to DP2": Case(("adapter", "language"), PP2, {}),
    "adapter DP2 to PP2": Case(("adapter",), {}, PP2),
}


@dataclass(frozen=True)
class Held:
    """The state on one rank, counted in elements."""

    parameters: dict[str, int]
    """By part."""
    with_gradient: dict[str, int]
    """Those whose main gradient is not all zero, by part."""
    frozen_gradients: list[str]
    """Frozen parameters that have a gradient of any kind."""
    tensors_trained: int
    """How many parameters train."""
    buffer_elements: int
    """Of DDP's gradient buffers."""
    optimizer_elements: int
    """Of Adam's two averages together."""
    moved: list[str]
    """Parts whose parameters a step changed."""


@dataclass(frozen=True)
class Outcome:
    """A rank's view of one case."""

    held: Held
    uninterrupted: list[dict[str, float]]
    """Metrics of the third and fourth step; the fourth has felt the optimizer's state in the third."""
    resumed: list[dict[str, float]]
    """The same of a run that was loaded after the second."""
    different: list[str]
    """Parameters of the two that differ in a bit, where the layouts are the same."""
    saved_parts: list[str]


def run_cases(folder: str, material: Material, cases: dict[str, Case], root: str) -> dict[str, Outcome]:
    return {name: run_case(folder, material, case, Path(root) / name) for name, case in cases.items()}


def run_case(folder: str, material: Material, case: Case, output: Path) -> Outcome:
    """Take two steps, save, take two more; then load into a new model, in the other layout, and take the two there."""
    policy, context = start(folder, case.parallel, case.parts)
    before = {name: weight.detach().clone() for name, weight in policy.model.named_parameters()}
    for _ in range(2):
        step(policy, material)
    held = what_is_held(policy, before)
    store = CheckpointStore(output, keep_last=2, asynchronous=False, context=context)
    parts = [Part(part) for part in case.parts]
    state = {"scheduler": policy.scheduler.state_dict(), "version": policy.version}
    snapshot = Snapshot(2, parts, parts, state, replay={}, recipe=recipe_yaml(GrpoRecipe()))
    store.save(policy.model, policy.optimizer, snapshot)
    store.finish_pending(blocking=True)
    saved = {name: weight.detach().clone() for name, weight in policy.model.named_parameters()}
    expected = [step(policy, material) for _ in range(2)]
    first = {name: weight.detach().clone() for name, weight in policy.model.named_parameters()}
    policy, context = start(folder, case.resumed, case.parts)
    assert load_weights(policy.model, output / "step-00000002") == sorted(parts)  # as another stage starts from it
    if case.parallel == case.resumed:
        assert all(torch.equal(weight, saved[name]) for name, weight in policy.model.named_parameters())
    store = CheckpointStore(output, keep_last=2, asynchronous=False, context=context)
    newest = store.agree_on_newest_undamaged()
    assert newest is not None
    state, _ = store.load(newest, policy.model, policy.optimizer, trained=parts)
    policy.scheduler.load_state_dict(state["scheduler"])
    resumed = [step(policy, material) for _ in range(2)]
    second = dict(policy.model.named_parameters())
    same = case.parallel == case.resumed
    different = [name for name in first if same and not torch.equal(first[name], second[name])]
    return Outcome(held, expected, resumed, different, state["parts"])


def start(folder: str, layout: dict[str, Any], parts: tuple[str, ...]) -> tuple[Policy, ParallelContext]:
    parallel = ParallelConfig(**layout)
    context = start_layout(parallel)
    policy = make_policy(folder, parallel, context, parts, Recompute.none)
    # Its own rate is 0 after two steps: nothing would move, whatever state was loaded.
    settings = TrainConfig(clip_grad=0.0, learning_rate=1e-3, steps=100)
    policy.optimizer, policy.scheduler = build_optimizer(policy.ddp, settings)
    return policy, context


def step(policy: Policy, material: Material) -> dict[str, float]:
    """Take one step on the same samples at every layout; data-parallel ranks have one microbatch each."""
    size, rank = policy.context.data_size, policy.context.data_rank
    batches = [collate_microbatch(material, names, policy.model, policy.context) for names in MICROBATCHES[rank::size]]
    loss = partial(
        batch_loss,
        algorithm=AlgorithmConfig(clip_low=CLIP, clip_high=CLIP),
        aggregation="sequence",
        denominator=4,
    )
    return policy.update(batches, loss).logged()


def what_is_held(policy: Policy, before: dict[str, torch.Tensor]) -> Held:
    parameters = dict.fromkeys(ALL_PARTS, 0)
    with_gradient = dict.fromkeys(ALL_PARTS, 0)
    frozen, moved = [], set()
    for name, weight in policy.model.named_parameters():
        part = name.split(".")[0]
        parameters[part] += weight.numel()
        if weight.grad is not None or (not weight.requires_grad and hasattr(weight, "main_grad")):
            frozen.append(name)
        if weight.requires_grad and weight.main_grad.any():
            with_gradient[part] += weight.numel()
        if not torch.equal(weight, before[name]):
            moved.add(part)
    states = [
        state[key].numel()
        for part in policy.optimizer.chained_optimizers
        for state in part.optimizer.state.values()
        for key in ("exp_avg", "exp_avg_sq")
    ]
    buffers = policy.ddp.buffers + policy.ddp.expert_parallel_buffers
    elements = sum(buffer.grad_data.numel() for buffer in buffers)
    tensors = sum(weight.requires_grad for weight in policy.model.parameters())
    return Held(parameters, with_gradient, frozen, tensors, elements, sum(states), sorted(moved))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[str, Material]:
    """A 6B-like tower of 5 heads, padded at TP2."""
    folder = tmp_path_factory.mktemp("parts")
    vision, text = tiny_vision_config("6b", heads=5), tiny_text_config(vocab_size=301, heads=8)
    material = make_material(tiny_hf_model(folder, "6b", vision=vision, text=text))
    return str(folder), Material(material.prompts, material.samples)


@pytest.fixture(scope="module")
def one_rank(inputs, tmp_path_factory) -> list[dict[str, Outcome]]:
    return run_ranks(1, run_cases, *inputs, ONE_RANK, str(tmp_path_factory.mktemp("one")))


@pytest.fixture(scope="module")
def two_ranks(inputs, tmp_path_factory) -> list[dict[str, Outcome]]:
    return run_ranks(2, run_cases, *inputs, TWO_RANKS, str(tmp_path_factory.mktemp("two")))


def check(case: Case, outcome: Outcome, reference: Outcome) -> None:
    held = outcome.held
    trained = sum(held.parameters[part] for part in case.parts)
    assert held.frozen_gradients == []
    # Each parameter starts at a multiple of 64 elements; nothing else is added, and nothing where nothing trains.
    assert trained <= held.buffer_elements <= trained + 64 * held.tensors_trained
    assert (trained == 0) == (held.optimizer_elements == 0)
    present = [part for part in case.parts if held.parameters[part]]
    assert held.moved == sorted(present)
    assert [part for part in ALL_PARTS if held.with_gradient[part]] == [p for p in ALL_PARTS if p in present]
    assert outcome.saved_parts == sorted(case.parts)
    assert outcome.different == []
    for index, metrics in enumerate(reference.uninterrupted):
        for metric, value in metrics.items():
            assert outcome.uninterrupted[index][metric] == pytest.approx(value, rel=1e-3, abs=1e-6), metric
            assert outcome.resumed[index][metric] == pytest.approx(value, rel=1e-3, abs=1e-6), metric


@pytest.mark.parametrize("name", ONE_RANK)
def test_one_rank(name, one_rank):
    outcome = one_rank[0][name]
    check(ONE_RANK[name], outcome, outcome)
    trained = sum(outcome.held.parameters[part] for part in ONE_RANK[name].parts)
    assert outcome.held.optimizer_elements == 2 * trained


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks(name, one_rank, two_ranks):
    case = TWO_RANKS[name]
    for rank in two_ranks:
        check(case, rank[name], one_rank[0]["+".join(case.parts)])
    held = [rank[name].held for rank in two_ranks]
    trained = [sum(each.parameters[part] for part in case.parts) for each in held]
    if case.parallel:
        assert [each.optimizer_elements for each in held] == [2 * count for count in trained]
    else:
        assert sum(each.optimizer_elements for each in held) == 2 * trained[0], "shared by data-parallel ranks"
    if case.parallel == PP2:
        assert held[1].parameters["adapter"] == held[1].parameters["vision"] == 0
        assert (trained[1] == 0) == ("language" not in case.parts)
