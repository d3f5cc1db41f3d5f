"""Reference log-probs on disk: what they belong to, interruption, damage, and that nothing stale is used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_r1v2.config.recipes import MpoRecipe
from megatron_r1v2.resilience.fingerprint import Fingerprint
from megatron_r1v2.stages import reference_log_probs as module
from megatron_r1v2.stages.preemption import PreemptionHandler
from megatron_r1v2.stages.reference_log_probs import compute_reference_fingerprint, load_or_compute_log_probs
from megatron_r1v2.stages.session import Session, open_session
from megatron_r1v2.stages.supervised_data import PairSource
from tests.stages.runs import read_metrics, recipe_for, run_stage
from tests.stages.tiny_run import write_data, write_model


def recipe(root: Path, tmp_path: Path, *overrides: str, name: str = "run") -> MpoRecipe:
    shared = f"preference.reference_dir={tmp_path / 'reference'}"
    return recipe_for(
        root, tmp_path / name, (shared, "checkpoint.every_steps=0", "train.steps=1", *overrides), stage="mpo"
    )


def compute(settings: MpoRecipe) -> tuple[Fingerprint, dict[str, float] | None]:
    with open_session(settings, stage="mpo", shown=()) as session:
        fingerprint = compute_reference_fingerprint(session)
        source = PairSource("mpo", "data.train")
        folder = Path(settings.preference.reference_dir)
        return fingerprint, load_or_compute_log_probs(session, source, fingerprint, folder=folder)


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "reference").glob("*"))


@pytest.fixture
def forwards(monkeypatch) -> list[int]:
    """Count the pairs that go through the model for the reference."""
    counts: list[int] = []
    forward = module._forward

    def counting(session: Session, source: PairSource, prompts: list) -> dict[str, float]:
        counts.append(len(prompts))
        return forward(session, source, prompts)

    monkeypatch.setattr(module, "_forward", counting)
    return counts


def test_runs_on_the_same_pairs_and_model_share_them(root: Path, tmp_path: Path, forwards: list[int]) -> None:
    _, first = compute(recipe(root, tmp_path))
    assert sum(forwards) == 12, "the pairs with images: nothing in training sees the others"
    assert first is not None
    assert len(first) == 24
    assert [path.suffix for path in files(tmp_path)] == [".jsonl"]
    _, second = compute(recipe(root, tmp_path, "preference.beta=0.5", "train.tokens_per_microbatch=64", name="other"))
    assert second == first
    assert sum(forwards) == 12


@pytest.mark.parametrize("change", ["data", "model", "settings"])
def test_what_has_changed_is_noticed(root: Path, tmp_path: Path, forwards: list[int], change: str) -> None:
    """Data of the same size and names, weights of the same shapes: only contents tell them apart."""
    fingerprint, first = compute(recipe(root, tmp_path))
    if change == "data":
        write_data(tmp_path / "changed", seed=1)
        override = f"data.train={tmp_path / 'changed'}"
    elif change == "model":
        write_model(tmp_path / "changed", seed=1)
        override = f"model.hf_path={tmp_path / 'changed'}"
    else:
        override = "model.transformer_config.layernorm_epsilon=0.5"
    other_fingerprint, other = compute(recipe(root, tmp_path, override, name="other"))
    assert {each.setting.partition(".")[0] for each in other_fingerprint.changes_since(fingerprint)} == {change}
    assert sum(forwards) == 24
    assert other is not None
    assert first is not None
    assert all(other[name] != value for name, value in first.items())
    assert len(files(tmp_path)) == 2


def test_the_checkpoint_that_the_stage_starts_from_counts(root: Path, tmp_path: Path) -> None:
    fingerprint, _ = compute(recipe(root, tmp_path))
    start = run_stage(recipe_for(root, tmp_path / "align", ("train.steps=1",), stage="align"))
    other, _ = compute(recipe(root, tmp_path, f"model.checkpoint={start}", name="other"))
    assert other.values["model"] != fingerprint.values["model"]


@pytest.mark.parametrize("cut", [False, True])
def test_an_interrupted_computation_goes_on(
    root: Path, tmp_path: Path, monkeypatch, forwards: list[int], cut: bool
) -> None:
    monkeypatch.setattr(PreemptionHandler, "sync_stop_signal", lambda handler, step: len(forwards) == 2)
    assert compute(recipe(root, tmp_path))[1] is None
    monkeypatch.undo()
    (unfinished,) = files(tmp_path)
    assert unfinished.suffix == ".unfinished"
    if cut:
        unfinished.write_text(unfinished.read_text()[:-30])
    before = len(unfinished.read_text().splitlines())
    _, resumed = compute(recipe(root, tmp_path))
    (finished,) = files(tmp_path)
    assert len(finished.read_text().splitlines()) == 13 > before
    shutil.rmtree(tmp_path / "reference")
    _, whole = compute(recipe(root, tmp_path))
    assert resumed == whole, "the same to the bit"


def test_a_damaged_file_is_refused(root: Path, tmp_path: Path) -> None:
    compute(recipe(root, tmp_path))
    (path,) = files(tmp_path)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]))
    with pytest.raises(ValueError, match="is damaged: 10 of 12 pairs can be read; delete it"):
        compute(recipe(root, tmp_path))


def test_the_file_says_what_it_belongs_to(root: Path, tmp_path: Path) -> None:
    fingerprint, sums = compute(recipe(root, tmp_path))
    (path,) = files(tmp_path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {"pairs": 12, **fingerprint.values}
    assert sums is not None
    for line in lines[1:]:
        assert line["chosen"] == sums[f"{line['key']}/chosen"] < 0
        assert line["rejected"] == sums[f"{line['key']}/rejected"] < 0


def test_a_resumed_run_refuses_other_data_or_a_lost_file(root: Path, tmp_path: Path) -> None:
    start = ("train.steps=2", "checkpoint.every_steps=1")
    run = run_stage(recipe(root, tmp_path, *start))
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    with pytest.raises(ValueError, match="has changed since it was saved: settings"):
        run_stage(
            recipe(
                root,
                tmp_path,
                *start,
                "model.transformer_config.layernorm_epsilon=0.5",
                "checkpoint.accept_changes=true",
            )
        )
    (path,) = files(tmp_path)
    path.rename(tmp_path / "kept")
    with pytest.raises(ValueError, match="is gone, the reference log-probs that this run has trained against"):
        run_stage(recipe(root, tmp_path, *start))
    (tmp_path / "kept").rename(path)
    run_stage(recipe(root, tmp_path, *start))
    assert len(read_metrics(run)) == 2
