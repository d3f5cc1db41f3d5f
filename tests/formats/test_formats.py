"""Runs of earlier formats load, resume and serve: what a user has on disk stays usable."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_r1v2.checkpoint.megatron.run_folder import finished_checkpoints, load_state, resolve_checkpoint
from megatron_r1v2.config.load import load_recipe
from megatron_r1v2.generation.engine import Sampling
from megatron_r1v2.stages.loaded_model import open_model
from tests.formats.make_fixtures import STAGES, STEPS
from tests.ranks import run_ranks
from tests.stages.runs import run_stage

VERSIONS = sorted(path.name for path in Path(__file__).parent.glob("format-*"))


def copied(version: str, stage: str, output: Path) -> tuple[Path, tuple[str, ...]]:
    """Copy a run to where it may be written; return its folder, and the overrides for the paths of this machine."""
    source = Path(__file__).parent / version
    shutil.copytree(source, output)
    folders = (f"model.hf_path={output / 'model'}", f"data.train={output / 'data'}")
    return output / stage, (*folders, f"run.output_dir={output / stage}")


def resume(run: Path, overrides: tuple[str, ...]) -> None:
    run_stage(load_recipe(run / "recipe.yaml", overrides))


def answer(run: Path, overrides: tuple[str, ...]) -> list[int]:
    """Generate as a server does, from the checkpoint of a run; return how long the responses are."""
    recipe = load_recipe(run / "recipe.yaml", (*overrides, f"model.checkpoint={run}"))
    with open_model(recipe) as loaded:
        prompts = list(loaded.read_prompts(recipe.data.train, 2))
        sampling = Sampling(num_responses=1, policy_version=loaded.version, temperature=0.0, max_response_tokens=4)
        rollouts = loaded.engine().generate(prompts, sampling, features=loaded.feature_cache())
        return [len(rollout.token_ids) for rollout in rollouts]


def test_there_are_fixtures():
    assert VERSIONS


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_of_an_earlier_format_is_read_and_goes_on_to_its_end(version: str, stage: str, tmp_path: Path) -> None:
    run, overrides = copied(version, stage, tmp_path / "fixtures")
    checkpoint = resolve_checkpoint(run)
    assert load_state(checkpoint)["step"] == STEPS - 1
    run_ranks(1, resume, run, overrides)
    assert load_state(finished_checkpoints(run / "checkpoints")[-1])["step"] == STEPS
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_run_of_an_earlier_format_answers(version: str, tmp_path: Path) -> None:
    run, overrides = copied(version, "grpo", tmp_path / "fixtures")
    (lengths,) = run_ranks(1, answer, run, overrides)
    assert len(lengths) == 2
    assert all(1 <= length <= 4 for length in lengths)
