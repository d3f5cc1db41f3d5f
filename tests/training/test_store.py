"""Saving and loading: every bit comes back, and nothing unfinished is ever taken for a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_r1v2.checkpoint.manifest import MANIFEST
from megatron_r1v2.checkpoint.megatron.run_folder import finished_checkpoints, load_state, resolve_checkpoint
from megatron_r1v2.config.schema import Part
from megatron_r1v2.resilience.files import partial_path
from megatron_r1v2.stages.align import supervised_step
from megatron_r1v2.stages.loaded_model import open_model
from megatron_r1v2.stages.session import Session, open_session
from megatron_r1v2.training.store import CheckpointStore, load_weights
from tests.stages.runs import checkpoint_contents, differences, recipe_for, run_stage
from tests.training import fused_adam
from tests.whole_weights import save_weights


@pytest.fixture
def session(root: Path, tmp_path: Path) -> Iterator[Session]:
    """Return a session after two steps: parameters of two groups, their moments, a scheduler that has moved."""
    recipe = recipe_for(root, tmp_path / "run", ("train.parts=[adapter, language]", "train.warmup_steps=2"))
    with open_session(recipe, stage="align", shown=()) as opened:
        for _ in range(2):
            supervised_step(opened)
        yield opened


def everything(session: Session) -> dict[str, Any]:
    """Return copies of weights, moments and step counts."""
    (part,) = session.policy.optimizer.chained_optimizers
    return {
        "weights": {name: value.detach().clone() for name, value in session.policy.model.named_parameters()},
        "optimizer": [
            {name: value.detach().clone() for name, value in state.items()} for state in part.optimizer.state.values()
        ],
        # megatron-core leaves a "step" in the groups when it loads; the counts that Adam uses are those above.
        "groups": [
            {name: value for name, value in group.items() if name not in ("params", "step")}
            for group in part.optimizer.param_groups
        ],
    }


def spoil(session: Session) -> None:
    """Change all that a checkpoint is to restore."""
    (part,) = session.policy.optimizer.chained_optimizers
    with torch.no_grad():
        for parameter in session.policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
        for group in part.optimizer.param_groups:
            group["lr"] = 123.0
            for main in group["params"]:
                main.add_(1.0)
        for state in part.optimizer.state.values():
            for value in state.values():
                value.add_(1.0)
    torch.manual_seed(99)


def load(session: Session, folder: Path) -> tuple[dict, list]:
    return session.checkpoints.load(folder, session.policy.model, session.policy.optimizer, trained=session.parts)


def test_everything_comes_back_and_trains_on_in_the_same_way(session: Session) -> None:
    session.save({"finished": False, "buffer": {"entries": [1, "two"]}}, {"samples": {"a": torch.arange(3)}})
    session.checkpoints.finish_pending(blocking=True)
    folder = session.checkpoints.agree_on_newest_undamaged()
    assert folder is not None
    before, generator = everything(session), torch.get_rng_state()
    batch_order = session.stream.state_dict()
    supervised_step(session)
    after = everything(session)
    spoil(session)
    state, replay = load(session, folder)
    assert differences(everything(session), before) == []
    assert torch.equal(torch.get_rng_state(), generator)
    assert (state["step"], state["version"], state["finished"]) == (2, 2, False)
    assert state["buffer"] == {"entries": [1, "two"]}
    assert len(replay) == 1
    assert torch.equal(replay[0]["samples"]["a"], torch.arange(3))
    session.policy.scheduler.num_steps = 0
    session.policy.scheduler.load_state_dict(state["scheduler"])
    session.stream.load_state_dict(batch_order)
    session.step, session.policy.version = state["step"], state["version"]
    supervised_step(session)
    assert differences(everything(session), after) == []


def test_the_state_of_a_fused_adam_is_there_before_its_first_step(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TransformerEngine's makes its moments in the first step; a run may be saved before it."""
    fused_adam.install(monkeypatch)
    recipe = recipe_for(root, tmp_path / "run", ("train.parts=[adapter, language]",))
    with open_session(recipe, stage="align", shown=()) as session:
        (part,) = session.policy.optimizer.chained_optimizers
        assert isinstance(part.optimizer, fused_adam.FusedAdam)
        for steps in (0, 1):
            session.step = steps
            session.save({}, {})
            session.checkpoints.finish_pending(blocking=True)
            before = everything(session)
            assert len(before["optimizer"]) > 10
            assert all(state.keys() == {"exp_avg", "exp_avg_sq"} for state in before["optimizer"])
            spoil(session)
            load(session, session.checkpoints.folder / f"step-{steps:08d}")
            assert differences(everything(session), before) == []
            assert [group.get("step", 0) for group in part.optimizer.param_groups if group["params"]] == [steps, steps]
            supervised_step(session)
        assert any(float(state["exp_avg"].abs().max()) > 0 for state in part.optimizer.state.values())


def test_after_loading_each_parameter_counts_its_own_steps(session: Session) -> None:
    session.save({}, {})
    session.checkpoints.finish_pending(blocking=True)
    load(session, session.checkpoints.folder / "step-00000002")
    (part,) = session.policy.optimizer.chained_optimizers
    steps = [state["step"] for state in part.optimizer.state.values()]
    assert len(steps) > 10
    assert len({step.data_ptr() for step in steps}) == len(steps)
    assert {float(step) for step in steps} == {2.0}
    supervised_step(session)
    assert {float(state["step"]) for state in part.optimizer.state.values()} == {3.0}


def test_frozen_parts_are_not_saved(session: Session) -> None:
    session.save({}, {})
    session.checkpoints.finish_pending(blocking=True)
    names = checkpoint_contents(session.checkpoints.folder / "step-00000002")["tensors"]
    parts = {name.removeprefix("optimizer.state.").removeprefix("param.").split(".")[0] for name in names}
    assert "vision" not in parts
    assert {"adapter", "language"} <= parts


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_checkpoint_has_its_name_only_when_it_is_whole(session: Session, asynchronous: bool) -> None:
    store = CheckpointStore(session.checkpoints.folder, keep_last=2, asynchronous=asynchronous, context=session.context)
    session.checkpoints = store
    before = everything(session)["weights"]
    session.save({}, {})
    assert store.agree_on_newest_undamaged() is None
    assert partial_path(store.folder / "step-00000002").is_dir()
    # Written in the background or not: what trains on must not leak into the file.
    supervised_step(session)
    store.finish_pending(blocking=True)
    assert store.agree_on_newest_undamaged() == store.folder / "step-00000002"
    load(session, store.folder / "step-00000002")
    assert differences(everything(session)["weights"], before) == []
    assert not list(store.folder.glob("*.partial"))


def test_what_has_no_manifest_gets_no_name(session: Session) -> None:
    store = session.checkpoints
    session.save({}, {})
    in_the_way = partial_path(store.folder / "step-00000002") / MANIFEST
    in_the_way.mkdir()
    with pytest.raises(RuntimeError, match="could not be written"):
        store.finish_pending(blocking=True)
    assert finished_checkpoints(store.folder) == []
    in_the_way.rmdir()


def test_a_folder_that_cannot_be_made_is_told_of_too(session: Session) -> None:
    session.checkpoints.folder.symlink_to(session.checkpoints.folder.with_name("nowhere") / "checkpoints")
    with pytest.raises(
        RuntimeError, match=r"could not be written to .*checkpoints, where \d+ MiB are free.*File exists"
    ):
        session.save({}, {})


def test_the_newest_are_kept_and_a_broken_write_is_written_again(session: Session) -> None:
    store = session.checkpoints
    store.keep_last = 2
    leftover = partial_path(store.folder / "step-00000003")
    leftover.mkdir(parents=True)
    (leftover / "state.pt").write_bytes(b"half")
    for step in (1, 2, 3, 4):
        session.step = step
        session.save({}, {})
        store.finish_pending(blocking=True)
    assert sorted(path.name for path in store.folder.iterdir()) == ["step-00000003", "step-00000004"]
    assert load_state(store.folder / "step-00000003")["step"] == 3


def test_the_best_by_validation_is_kept_beside_the_newest(session: Session) -> None:
    store = session.checkpoints
    store.keep_last = 2
    best = {}
    for step, pass_at_1 in (
        (1, 0.5),
        (2, 0.7),
        (3, None),
        (4, 0.6),
        (5, None),
        (6, 0.7),
        (7, 0.8),
        (8, None),
        (9, 0.1),
    ):
        session.step = step
        assert store.is_best(pass_at_1) == (step in (1, 2, 7))
        session.save({}, {}, pass_at_1=pass_at_1)
        store.finish_pending(blocking=True)
        best[step] = sorted(int(path.name[-8:]) for path in finished_checkpoints(store.folder))
    assert best == {
        1: [1], 2: [1, 2], 3: [2, 3], 4: [2, 3, 4], 5: [2, 4, 5], 6: [2, 5, 6], 7: [6, 7], 8: [7, 8], 9: [7, 8, 9],
    }  # fmt: skip
    assert json.loads((store.folder / "best.json").read_text()) == {"step": 7, "pass_at_1": 0.8}
    again = CheckpointStore(store.folder, keep_last=2, asynchronous=False, context=session.context)
    assert not again.is_best(0.8)
    assert again.is_best(0.9)
    assert not again.is_best(None)
    shutil.rmtree(store.folder / "step-00000007")
    again = CheckpointStore(store.folder, keep_last=2, asynchronous=False, context=session.context)
    assert again.is_best(0.1), "a best that somebody deleted must not keep a new one from being saved"


def test_a_best_of_another_validation_is_compared_with_none(session: Session, caplog) -> None:
    store = session.checkpoints
    store.forget_best()  # there is none
    session.step = 1
    session.save({}, {}, pass_at_1=0.9)
    store.finish_pending(blocking=True)
    assert not store.is_best(0.2)
    store.forget_best()
    assert store.is_best(0.2)
    assert not (store.folder / "best.json").exists()
    assert '{"step": 1, "pass_at_1": 0.9}, was made in another way' in caplog.text


def test_names_of_unfinished_and_foreign_folders_are_no_checkpoints(tmp_path: Path) -> None:
    for name in ("step-00000001", ".step-00000002.partial", "step-00000003.damaged", "step-4", "other"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [path.name for path in finished_checkpoints(tmp_path / "checkpoints")] == ["step-00000001"]
    assert finished_checkpoints(tmp_path / "nowhere") == []
    for named in (tmp_path, tmp_path / "checkpoints"):
        assert resolve_checkpoint(named).name == "step-00000001"
    for wrong in (tmp_path / "nowhere", tmp_path / "checkpoints" / "other"):
        with pytest.raises(ValueError, match=f"no finished checkpoint in {wrong}; expected"):
            resolve_checkpoint(wrong)


def test_a_later_stage_carries_the_parts_of_an_earlier_one_along(root: Path, tmp_path: Path) -> None:
    overrides = ("train.steps=1", "checkpoint.every_steps=0")
    align = run_stage(recipe_for(root, tmp_path / "align", overrides, stage="align"))
    later = (*overrides, f"model.checkpoint={align}", "train.parts=[language]")
    grpo = run_stage(recipe_for(root, tmp_path / "grpo", later))
    first, second = (checkpoint_contents(resolve_checkpoint(run)) for run in (align, grpo))
    assert second["state.pt"]["parts"] == ["adapter", "language"]
    assert second["state.pt"]["trained"] == ["language"]
    adapter = {name: value for name, value in first["tensors"].items() if name.startswith("adapter.")}
    assert len(adapter) == 6
    assert differences(adapter, {name: second["tensors"][name] for name in adapter}) == []
    assert not any(name.startswith("optimizer") and ".adapter." in name for name in second["tensors"])
    with open_model(recipe_for(root, tmp_path / "plain")) as plain:
        unchanged = {name: value.detach().clone() for name, value in plain.model.named_parameters()}
        assert load_weights(plain.model, resolve_checkpoint(grpo)) == [Part.adapter, Part.language]
        changed = {
            name.split(".")[0]
            for name, value in plain.model.named_parameters()
            if not torch.equal(value, unchanged[name])
        }
        assert changed == {"adapter", "language"}
    with open_model(recipe_for(root, tmp_path / "again", (f"model.checkpoint={grpo}",))) as again:
        assert again.changed_parts == [Part.adapter, Part.language]
        assert again.version == 1
        for name, value in again.model.named_parameters():
            if name.startswith("adapter."):
                assert torch.equal(value, adapter[name]), name


def test_weights_alone_are_loaded(root: Path, tmp_path: Path) -> None:
    with open_model(recipe_for(root, tmp_path / "run")) as loaded:
        folder = tmp_path / "weights"
        save_weights(loaded.model, folder, loaded.context, parts=[Part.vision, Part.adapter])
        assert load_state(folder)["parts"] == ["adapter", "vision"]
        before = {name: value.detach().clone() for name, value in loaded.model.named_parameters()}
        with torch.no_grad():
            for value in loaded.model.parameters():
                value.zero_()
        assert load_weights(loaded.model, folder) == [Part.adapter, Part.vision]
        for name, value in loaded.model.named_parameters():
            assert torch.equal(value, before[name]) == (not name.startswith("language.")), name


def test_a_checkpoint_of_other_parts_is_refused(session: Session) -> None:
    session.save({}, {})
    session.checkpoints.finish_pending(blocking=True)
    with pytest.raises(ValueError, match=r"trained \['adapter', 'language'\] but train.parts=\['adapter'\]"):
        session.checkpoints.load(
            session.checkpoints.folder / "step-00000002",
            session.policy.model,
            session.policy.optimizer,
            trained=[Part.adapter],
        )
