"""Rehearsed ranks of whole stages: true to real runs, and finding what would go wrong on the cluster."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from megatron_r1v2.planning.parameters import Layout
from megatron_r1v2.rehearsal.collectives import find_mismatches
from megatron_r1v2.rehearsal.rank import RankResult, RankSpec
from megatron_r1v2.rehearsal.run import rehearse_ranks
from tests.rehearsal.tiny_rehearsal import ROOT, error_of, tiny_model, tiny_specs

ALONE = Layout(1, 1, 1, 0, False)
TENSOR = Layout(2, 1, 1, 0, True)
CUBE = Layout(2, 2, 2, 0, True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


def results_of(specs, folder):
    folder.mkdir(exist_ok=True)
    results = rehearse_ranks(specs, folder)
    assert not any(map(error_of, results)), "\n".join(map(error_of, results))
    return results


def peaks(result):
    return {f"{number} {phase.name}": phase.peak for number, phase in enumerate(result.phases)}


def phases_in_common(fake, real):
    """Return the peaks of both by phase; a real save is followed by no load."""
    return {name: (peaks(fake)[name], peak) for name, peak in peaks(real).items()}


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [96, 192])
def test_peaks_are_those_of_a_real_run(tmp_path, hidden):
    model = tiny_model(tmp_path / "model", hidden=hidden)
    (spec,) = tiny_specs(tmp_path / "fake", model, ALONE, [0])
    (other,) = tiny_specs(tmp_path / "real", model, ALONE, [0])
    (fake,) = results_of([replace(spec, device="cpu")], tmp_path / "of-fake")
    (real,) = results_of([replace(other, device="cpu", is_fake=False)], tmp_path / "of-real")
    assert [phase.name for phase in real.phases] == [
        *("start", "load", "set-up", "gate", "generate", "reward", "exchange", "log_probs", "update", "evaluate"),
        "save",
    ]
    for name, (rehearsed, measured) in phases_in_common(fake, real).items():
        assert rehearsed == pytest.approx(measured, rel=0.01), name
    assert fake.flops == real.flops


@pytest.mark.slow
def test_the_cluster_branches_of_every_corner_run_and_fit_together(model, tmp_path):
    results = results_of(tiny_specs(tmp_path / "inputs", model, CUBE, [0, 1, 4, 7]), tmp_path / "out")
    assert find_mismatches({result.rank: result.collectives for result in results}) == []
    for result in results:
        names = [phase.name for phase in result.phases]
        assert names[-3:] == ["evaluate", "save", "load checkpoint"]
    kinds = {call.kind for call in results[2].collectives}
    assert {"send", "recv_"} <= kinds, "stage 1 talks to stage 0"
    first, last = results[0], results[3]
    assert first.checkpoint_bytes > last.checkpoint_bytes == 0, "the adapter is on the first stage"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "phases", "overrides"),
    [
        ("align.yaml", ["update", "evaluate", "save", "load checkpoint"], ()),
        ("mpo.yaml", ["reference", "update", "evaluate", "save", "load checkpoint"], ()),
        (
            "grpo.yaml",
            ["evaluate", "save", "load checkpoint"],
            ("algorithm.kl_coefficient=0.1", "train.recompute=full"),
        ),
        ("grpo.yaml", ["evaluate", "save", "load checkpoint"], ("train.parts=[vision, adapter, language]",)),
    ],
)
def test_every_stage_runs(model, tmp_path, recipe, phases, overrides):
    (spec,) = tiny_specs(tmp_path / "inputs", model, ALONE, [0], *overrides, recipe=recipe)
    (result,) = results_of([spec], tmp_path / "out")
    assert [phase.name for phase in result.phases][-len(phases) :] == phases


def rehearse_with_fault(name, spec, folder):
    folder.mkdir()
    spec.write(folder / "spec.json")
    command = [sys.executable, "-m", "tests.rehearsal.faults", name, folder / "spec.json", folder / "result.json"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    return RankResult.read(folder / "result.json")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "words"),
    [("cpu_index", "same device"), ("raises_on_cuda", "RuntimeError: a branch for GPUs alone")],
)
def test_a_fault_that_only_a_gpu_shows_is_found_at_the_gate(model, tmp_path, fault, words):
    (spec,) = tiny_specs(tmp_path / "inputs", model, ALONE, [0])
    result = rehearse_with_fault(fault, spec, tmp_path / "out")
    assert result.error_phase == "gate"
    assert words in result.error
    assert "megatron_r1v2/" in result.error, "with the line of the product"


@pytest.mark.slow
def test_a_rank_that_skips_a_collective_is_found(model, tmp_path):
    first, second = tiny_specs(tmp_path / "inputs", model, TENSOR, [0, 1])
    (sound,) = results_of([first], tmp_path / "sound")
    broken = rehearse_with_fault("skips_collective", second, tmp_path / "broken")
    assert not error_of(broken)
    (found, *_) = find_mismatches({0: sound.collectives, 1: broken.collectives})
    assert "in the group of 2 ranks (0, 1): rank 0: allreduce_" in found


def test_a_weight_of_another_shape_is_found_while_loading(tmp_path):
    model = tiny_model(tmp_path / "model")
    file = model / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("mlp.down_proj.weight"))
    save_file({**tensors, name: tensors[name][:, :-2].contiguous()}, file, metadata={"format": "pt"})
    (spec,) = tiny_specs(tmp_path / "inputs", model, ALONE, [0])
    (tmp_path / "out").mkdir()
    (result,) = rehearse_ranks([spec], tmp_path / "out")
    assert result.error_phase == "load"
    assert "the weights do not belong to this config.json" in result.error


def test_specifications_and_results_pass_between_processes(tmp_path):
    spec = RankSpec("recipe.yaml", "grpo", 3, 8, 8, 80.0)
    spec.write(tmp_path / "spec.json")
    assert RankSpec.read(tmp_path / "spec.json") == spec
    result = RankResult(3, place="stage 0", flops={"update": 5}, questions=[("rule", "line", 2)])
    result.write(tmp_path / "result.json")
    assert RankResult.read(tmp_path / "result.json") == result
