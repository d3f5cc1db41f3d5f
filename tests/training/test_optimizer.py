"""The distributed Adam and its schedule against torch's own and against the formulas."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica

from megatron_r1v2.stages.align import supervised_step
from megatron_r1v2.stages.session import open_session
from megatron_r1v2.training.optimizer import OPTIMIZER_FORMAT, current_learning_rate, sharded_optimizer_state
from megatron_r1v2.training.part_state import part_state
from tests.ranks import run_ranks
from tests.stages.runs import recipe_for


def test_the_rate_rises_linearly_and_falls_as_a_cosine(root: Path, tmp_path: Path) -> None:
    overrides = (
        "train.steps=10",
        "train.updates_per_step=2",
        "train.warmup_steps=2",
        "train.learning_rate=0.5",
        "train.min_learning_rate=0.1",
    )
    with open_session(recipe_for(root, tmp_path / "run", overrides), stage="grpo", shown=()) as session:
        rates = []
        for _ in range(20):
            rates.append(current_learning_rate(session.policy.optimizer))
            session.policy.scheduler.step(increment=1)
    expected = [0.5 * update / 4 for update in (1, 2, 3, 4)]
    # The first update has the first rate of the warm-up, so each later one is a step ahead of its number.
    expected += [0.1 + 0.4 * 0.5 * (1 + math.cos(math.pi * update / 16)) for update in range(1, 17)]
    assert rates == pytest.approx(expected, rel=1e-6)


def test_without_warmup_the_first_rate_is_the_highest(root: Path, tmp_path: Path) -> None:
    with open_session(recipe_for(root, tmp_path / "run"), stage="grpo", shown=()) as session:
        assert current_learning_rate(session.policy.optimizer) == pytest.approx(1e-3)


def test_updates_are_those_of_torchs_adamw_and_only_of_what_trains(root: Path, tmp_path: Path) -> None:
    """Replay the gradients that the optimizer saw through torch.optim.AdamW; no decay for biases and norms."""
    overrides = ("train.weight_decay=0.1", "train.clip_grad=0", "train.steps=100", "train.min_learning_rate=0.001")
    with open_session(recipe_for(root, tmp_path / "run", overrides), stage="align", shown=()) as session:
        model = session.policy.model
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        assert {name.split(".")[0] for name in trained} == {"adapter"}
        frozen = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
        start = {name: value.detach().clone() for name, value in trained.items()}
        copies = {name: torch.nn.Parameter(value.detach().clone()) for name, value in trained.items()}
        decayed = [copy for copy in copies.values() if copy.ndim > 1]
        plain = [copy for copy in copies.values() if copy.ndim == 1]
        theirs = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
            lr=1e-3,
            betas=(0.9, 0.95),
        )
        for _ in range(3):
            supervised_step(session)
            for name, copy in copies.items():
                copy.grad = trained[name].main_grad.clone()
            theirs.step()
        for name, value in trained.items():
            assert not torch.equal(value, start[name]), name
            torch.testing.assert_close(value, copies[name], rtol=1e-6, atol=1e-7, msg=name)
        for name, value in model.named_parameters():
            if name in frozen:
                assert torch.equal(value, frozen[name]), name


def test_gradients_are_clipped_to_the_norm(root: Path, tmp_path: Path) -> None:
    moments = []
    for clip in (0, 0.01):
        recipe = recipe_for(root, tmp_path / f"run-{clip}", (f"train.clip_grad={clip}",))
        with open_session(recipe, stage="align", shown=()) as session:
            supervised_step(session)
            (part,) = session.policy.optimizer.chained_optimizers
            averages = [state["exp_avg"] for state in part.optimizer.state.values()]
            moments.append(float(torch.cat([average.flatten() for average in averages]).norm()) / 0.1)
            norm = session.recorder.values["actor/grad_norm"]
    assert moments[0] == pytest.approx(norm, rel=1e-4)
    assert norm > 0.01
    assert moments[1] == pytest.approx(0.01, rel=1e-3)


def described_states(root: Path, output: Path) -> dict[str, Any]:
    """Take two steps and describe the optimizer's state; return our tensors and those of megatron-core's function."""
    recipe = recipe_for(root, output, ("train.parts=[adapter, language]",))
    with open_session(recipe, stage="align", shown=()) as session:
        for _ in range(2):
            supervised_step(session)
        model, optimizer = session.policy.model, session.policy.optimizer
        found = {}
        for whose in ("ours", "theirs"):
            state = part_state(model, session.parts)
            metadata = {**OPTIMIZER_FORMAT, "distrib_optim_fully_reshardable_mem_efficient": False}
            described = (
                sharded_optimizer_state(optimizer, state)
                if whose == "ours"
                else optimizer.sharded_state_dict(state, metadata=metadata)
            )
            apply_factories(described)
            tensors = [leaf for leaf in nested_values(described) if isinstance(leaf, ShardedTensor)]
            found[whose] = {
                (tensor.key, tensor.global_offset): (tensor.data.clone(), tensor.global_shape)
                for tensor in tensors
                if is_main_replica(tensor.replica_id)
            }
            found[f"all {whose}"] = sum(tensor.data.numel() for tensor in tensors)
            found[f"rest of {whose}"] = {name: described[name] for name in described if name != "param_state"}
        return found


def test_each_replica_saves_its_share_of_the_state_with_every_bit(root: Path, tmp_path: Path) -> None:
    ranks = run_ranks(2, described_states, root, tmp_path / "run")
    expected = {key: found for rank in ranks for key, found in rank["theirs"].items()}
    assert len(expected) > 30
    first, second = (rank["ours"] for rank in ranks)
    assert first.keys().isdisjoint(second)
    ours = first | second
    assert ours.keys() == expected.keys()
    for key, (values, shape) in expected.items():
        assert ours[key][1] == shape
        # As integers: the sign of a zero counts.
        assert torch.equal(ours[key][0].view(torch.int32), values.view(torch.int32)), key
    whole = ranks[0]["all theirs"]
    assert whole == ranks[1]["all theirs"]
    assert sum(rank["all ours"] for rank in ranks) == whole, "each element is held once"
    assert max(rank["all ours"] for rank in ranks) < 0.6 * whole
    assert ranks[0]["rest of ours"] == ranks[0]["rest of theirs"]
