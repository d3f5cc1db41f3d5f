"""Whole MPO runs at several layouts: reference log-probs, losses, delta and gradients are those of one rank."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from megatron_r1v2.config.load import load_recipe, recipe_yaml
from megatron_r1v2.resilience.files import write_file
from tests.ranks import run_ranks
from tests.stages.runs import checkpoint_contents, free_port, read_metrics, recipe_for, run_stage, without_timings
from tests.stages.tiny_run import tiny_recipe

SETTINGS = (
    "train.steps=3",  # delta is 0 in the first two: the policy starts as its reference
    "train.prompts_per_step=5",
    "train.clip_grad=0",
    "train.learning_rate=0.002",
    "train.parts=[adapter, language]",
)
FEW = ("preference.min_margin=0.9", "loss.aggregation=token")
ONE_RANK: dict[str, tuple[str, ...]] = {"all": (), "few": FEW}
TWO_RANKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "tp2": ("all", ("parallel.tensor=2", "parallel.sequence=true")),
    "pp2": ("all", ("parallel.pipeline=2",)),
    "dp2": ("all", ("train.tokens_per_microbatch=1",)),
    "dp2, a rank without pairs": ("few", FEW),
    "tp2, separate rows": (
        "all",
        ("parallel.tensor=2", "parallel.sequence=true", "train.packing=first_fit_decreasing"),
    ),
}
FOUR_RANKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "tp2-pp2": ("all", ("parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true")),
    "tp2-dp2": ("all", ("parallel.tensor=2", "train.packing=first_fit_decreasing", "train.tokens_per_microbatch=256")),
    "pp2-dp2, a rank without pairs": ("few", ("parallel.pipeline=2", *FEW)),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_recipe(folder)
    return folder


def run_recipes(files: list[str], ports: list[int]) -> None:
    for file, port in zip(files, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)  # a rank may be a run ahead of the one that holds the store
        run_stage(load_recipe(file))


def on_ranks(world_size: int, root: Path, folder: Path, settings: dict[str, tuple[str, ...]]) -> dict[str, Path]:
    """Run one after the other in one set of processes."""
    files = []
    for name, overrides in settings.items():
        recipe = recipe_for(root, folder / name, (*SETTINGS, *overrides), stage="mpo")
        files.append(str(folder / f"{name}.run.yaml"))
        write_file(files[-1], recipe_yaml(recipe))
    run_ranks(world_size, run_recipes, files, [free_port() for _ in files])
    return {name: folder / name for name in settings}


@pytest.fixture(scope="module")
def one_rank(root: Path, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("one")
    return {
        name: run_stage(recipe_for(root, folder / name, (*SETTINGS, *overrides), stage="mpo"))
        for name, overrides in ONE_RANK.items()
    }


@pytest.fixture(scope="module")
def two_ranks(root: Path, tmp_path_factory) -> dict[str, Path]:
    return on_ranks(2, root, tmp_path_factory.mktemp("two"), {name: case[1] for name, case in TWO_RANKS.items()})


@pytest.fixture(scope="module")
def four_ranks(root: Path, tmp_path_factory) -> dict[str, Path]:
    return on_ranks(4, root, tmp_path_factory.mktemp("four"), {name: case[1] for name, case in FOUR_RANKS.items()})


def reference_of(run: Path) -> list[dict]:
    (file,) = (run / "reference").glob("*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def compare(run: Path, expected: Path) -> None:
    ours, theirs = reference_of(run), reference_of(expected)
    assert ours[0] == theirs[0], "what the log-probs belong to"
    assert len(ours) == 17
    for line, other in zip(ours[1:], theirs[1:], strict=True):
        assert line.pop("key") == other.pop("key")
        assert line == pytest.approx(other, rel=1e-5)
    lines, expected_lines = without_timings(read_metrics(run)), without_timings(read_metrics(expected))
    assert sum(line["mpo/pairs_kept"] for line in lines) > 0
    assert lines[-1]["mpo/delta"] != 0
    for line, other in zip(lines, expected_lines, strict=True):
        assert line.pop("rewards/accuracies", 0) >= 0, "at the first step rounding decides which reward is higher"
        other.pop("rewards/accuracies", 0)
        assert line == pytest.approx(other, rel=1e-4, abs=2e-5)
    contents, wanted = (checkpoint_contents(folder / "checkpoints" / "step-00000001") for folder in (run, expected))
    assert contents["state.pt"]["delta"] == pytest.approx(wanted["state.pt"]["delta"], abs=1e-6)
    assert contents["tensors"].keys() == wanted["tensors"].keys()
    for name, tensor in wanted["tensors"].items():
        if ".exp_avg." in name:  # after one step: a tenth of the gradient
            assert tensor.abs().max() > 0
            torch.testing.assert_close(
                contents["tensors"][name], tensor, rtol=1e-4, atol=1e-5 * float(tensor.abs().max())
            )


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks_do_what_one_does(two_ranks: dict[str, Path], one_rank: dict[str, Path], name: str) -> None:
    compare(two_ranks[name], one_rank[TWO_RANKS[name][0]])


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR_RANKS)
def test_four_ranks_do_what_one_does(four_ranks: dict[str, Path], one_rank: dict[str, Path], name: str) -> None:
    compare(four_ranks[name], one_rank[FOUR_RANKS[name][0]])
