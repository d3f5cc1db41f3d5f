"""Rehearsed ranks of whole stages: true to real runs, and finding what would go wrong on the cluster."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from megatron_r1v2.config.load import load_recipe
from megatron_r1v2.config.recipes import STAGES
from megatron_r1v2.planning.parameters import Layout
from megatron_r1v2.rehearsal.collectives import find_mismatches
from megatron_r1v2.rehearsal.preparation import Step
from megatron_r1v2.rehearsal.rank import RankResult, RankSpec
from megatron_r1v2.rehearsal.run import Rehearsal, ranks_to_rehearse, rehearse_ranks
from tests.planning.plans import plan_of
from tests.ranks import run_ranks
from tests.rehearsal.tiny_rehearsal import RECIPES, ROOT, error_of, real_rank, tiny_model, tiny_specs

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


def few_rows_of(recipe):
    """Return those of FEW that are settings of a recipe."""
    settings = STAGES[load_recipe(RECIPES / recipe).stage].settings()
    names = {each: each.partition("=")[0].split(".") for each in FEW}
    return [each for each, (section, name) in names.items() if name in settings.get(section, ())]


def peaks(result):
    return {f"{number} {phase.name}": phase.peak for number, phase in enumerate(result.phases)}


STEP = ("data", "gate", "generate", "reward", "exchange", "log_probs", "update")
GIVEN = ("data", "update")
"""The phases of a step on given responses."""
END = ("evaluate", "save", "load checkpoint")
REWARD_MODEL = "../digits/reward_model.yaml"
FEW = (
    *("generation.responses_per_prompt=2", "generation.max_requests=4", "train.prompts_per_step=4"),
    *("data.max_tiles=1", "data.max_prompt_tokens=64", "generation.max_response_tokens=32"),
)
"""A step that 8 processes do on two processors."""
SEGMENTS = ("generation.segment_tokens=16", "buffer.max_age=9")
"""Responses that go on in the next step."""
RECOMPUTED = "train.recompute=full"
STEP_OF_FEW = Step(long=2, short=0, mixed_groups=2, prompts_of_replica=4, long_of_replica=2)


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [96, 192])
@pytest.mark.parametrize(
    ("recipe", "phases"),
    [
        ("grpo.yaml", ("start", "load", "set-up", *STEP, *STEP, *END)),
        ("mpo.yaml", ("start", "load", "set-up", "reference", *GIVEN, *GIVEN, *END)),
        ("pairs.yaml", ("start", "load", "generate", "continue", "generate", "continue")),
        (REWARD_MODEL, ("start", "load", "set-up", *GIVEN, *GIVEN, "save", "load checkpoint")),
    ],
)
def test_peaks_are_those_of_a_real_run(tmp_path, hidden, recipe, phases):
    model = tiny_model(tmp_path / "model", hidden=hidden)
    (spec,) = tiny_specs(tmp_path / "fake", model, ALONE, [0], recipe=recipe)
    (other,) = tiny_specs(tmp_path / "real", model, ALONE, [0], recipe=recipe)
    (fake,) = results_of([replace(spec, device="cpu")], tmp_path / "of-fake")
    (real,) = results_of([replace(other, device="cpu", is_fake=False)], tmp_path / "of-real")
    assert tuple(phase.name for phase in real.phases) == phases
    rehearsed = peaks(fake)
    for name, measured in peaks(real).items():
        assert rehearsed[name] == pytest.approx(measured, rel=0.01), name
    assert fake.flops == real.flops
    assert fake.engine_steps == real.engine_steps


@pytest.mark.slow
def test_segments_are_those_of_a_real_run(model, tmp_path):
    (spec,) = tiny_specs(tmp_path / "fake", model, ALONE, [0], *SEGMENTS)
    (other,) = tiny_specs(tmp_path / "real", model, ALONE, [0], *SEGMENTS)
    (fake,) = results_of([replace(spec, device="cpu")], tmp_path / "of-fake")
    (real,) = results_of([replace(other, device="cpu", is_fake=False)], tmp_path / "of-real")
    assert peaks(fake) == pytest.approx(peaks(real), rel=0.01)
    assert fake.flops == real.flops
    assert fake.engine_steps == real.engine_steps
    first, second = (each for each in fake.phases if each.name == "log_probs")
    assert first.flops > 0, "the group that goes on gets its old log-probs"
    assert second.flops == first.flops, "so does that of the second step"
    first, second = (each for each in fake.phases if each.name == "generate")
    assert second.flops > first.flops, "the second step prefills a beginning too"
    first, second = (each for each in fake.phases if each.name == "update")
    assert second.flops > first.flops, "and trains on the group that has ended"


REWARD_MODEL_BESIDE = ("reward.model_weight=0.5", "reward_model.checkpoint=nowhere")


@pytest.mark.slow
def test_a_reward_model_beside_the_policy_is_that_of_a_real_run(model, tmp_path):
    (spec,) = tiny_specs(tmp_path / "fake", model, ALONE, [0], *FEW, *REWARD_MODEL_BESIDE)
    (other,) = tiny_specs(tmp_path / "real", model, ALONE, [0], *FEW, *REWARD_MODEL_BESIDE)
    (fake,) = results_of([replace(spec, device="cpu")], tmp_path / "of-fake")
    (real,) = results_of([replace(other, device="cpu", is_fake=False)], tmp_path / "of-real")
    assert peaks(fake) == pytest.approx(peaks(real), rel=0.01)
    assert fake.flops == real.flops
    policy, reward_model = (phase for phase in fake.phases if phase.name == "load")
    assert reward_model.held_after - reward_model.held_before > 0.8 * (policy.held_after - policy.held_before)
    assert all(phase.flops > 0 for phase in fake.phases if phase.name == "reward"), "it scores the responses"


@pytest.mark.slow
def test_a_reward_model_beside_the_policy_runs_on_every_corner(model, tmp_path):
    specs = tiny_specs(tmp_path / "inputs", model, CUBE, [0, 1, 4, 7], *FEW, *REWARD_MODEL_BESIDE)
    results = results_of(specs, tmp_path / "out")
    assert find_mismatches({result.rank: result.collectives for result in results}) == []


BETWEEN_STAGES = {"send", "recv_", "broadcast_"}
OF_GRPO = (
    BETWEEN_STAGES | {"allreduce_", "object:exchange", "object:checkpoint_save"},
    {"generate", "update", "evaluate", "save", "load checkpoint"},
)
"""Kinds of collectives, and phases in which the first rank calls some."""
OF_GIVEN = BETWEEN_STAGES | {"allreduce_", "object:checkpoint_save"}, {"update", "save", "load checkpoint"}
OF_SCORES = OF_GIVEN[0] - {"broadcast_"}, OF_GIVEN[1]
"""A reward model has no log-probs, which the last pipeline stage broadcasts elsewhere."""
OF_PAIRS = BETWEEN_STAGES | {"object:all_gather_object"}, {"generate", "continue"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "overrides", "found"),
    [
        pytest.param("grpo.yaml", (), OF_GRPO, id="grpo"),
        pytest.param("grpo.yaml", SEGMENTS, OF_GRPO, id="segments"),
        pytest.param("grpo.yaml", REWARD_MODEL_BESIDE, OF_GRPO, id="reward-model-beside"),
        pytest.param("align.yaml", ("train.parts=[adapter, vision]", RECOMPUTED), OF_GIVEN, id="align"),
        pytest.param("mpo.yaml", ("train.parts=[adapter, language]",), OF_GIVEN, id="mpo"),
        pytest.param("pairs.yaml", (), OF_PAIRS, id="pairs"),
        pytest.param(REWARD_MODEL, (RECOMPUTED,), OF_SCORES, id="reward_model"),
    ],
)
def test_collectives_are_those_of_real_processes(model, tmp_path, recipe, overrides, found):
    few = few_rows_of(recipe)
    specs = tiny_specs(tmp_path / "fake", model, CUBE, [0, 3, 4, 7], *few, *overrides, recipe=recipe)
    (other,) = tiny_specs(tmp_path / "real", model, CUBE, [0], *few, *overrides, recipe=recipe)
    fakes = results_of([replace(spec, device="cpu") for spec in specs], tmp_path / "out")
    reals = run_ranks(8, real_rank, other)
    assert not any(map(error_of, reals)), "\n".join(map(error_of, reals))
    assert find_mismatches({real.rank: real.collectives for real in reals}) == []
    for fake in fakes:
        # Kind, group, dtype, count, bytes, peer and phase of each, in order.
        assert fake.collectives == reals[fake.rank].collectives
    first, last = fakes[0].collectives, fakes[3].collectives
    kinds, phases = found
    assert {call.kind for call in first + last} >= kinds
    assert {call.phase for call in first} >= phases


@pytest.mark.slow
def test_the_cluster_branches_of_every_corner_run_and_fit_together(model, tmp_path):
    results = results_of(tiny_specs(tmp_path / "inputs", model, CUBE, [0, 1, 4, 7]), tmp_path / "out")
    assert find_mismatches({result.rank: result.collectives for result in results}) == []
    for result in results:
        names = [phase.name for phase in result.phases]
        assert names[-3:] == ["evaluate", "save", "load checkpoint"]
    kinds = {call.kind for call in results[2].collectives}
    assert {"send", "recv_"} <= kinds, "stage 1 talks to stage 0"
    assert results[0].engine_steps["evicted"] == 2, "one a step"
    assert results[0].engine_steps["mixed"] > 0
    first, last = results[0], results[3]
    assert first.checkpoint_bytes > last.checkpoint_bytes == 0, "the adapter is on the first stage"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "phases", "overrides"),
    [
        ("align.yaml", [*GIVEN, *GIVEN, *END], ()),
        ("pairs.yaml", ["generate", "continue", "generate", "continue"], ()),
        (
            REWARD_MODEL,
            [*GIVEN, *GIVEN, "validate", "save", "load checkpoint"],
            ("data.validation=held-out", "evaluation.every_steps=1"),
        ),
        ("mpo.yaml", ["reference", *GIVEN, *GIVEN, *END], ()),
    ],
)
def test_every_stage_runs(model, tmp_path, recipe, phases, overrides):
    (spec,) = tiny_specs(tmp_path / "inputs", model, ALONE, [0], *overrides, recipe=recipe)
    (result,) = results_of([spec], tmp_path / "out")
    assert [phase.name for phase in result.phases][-len(phases) :] == phases


LAYOUTS = {"TP2": TENSOR, "PP2": Layout(1, 2, 1, 0, False), "DP2": Layout(1, 1, 2, 0, False), "TP2 PP2 DP2": CUBE}


def check_ranks_fit_together(model, folder, layout, recipe, *overrides):
    """Rehearse all ranks that differ, compare their collectives, and return the phases of the first one."""
    shape = LAYOUTS[layout]
    ranks = ranks_to_rehearse(shape, all_ranks=True)
    few = few_rows_of(recipe)
    results = results_of(
        tiny_specs(folder / "inputs", model, shape, ranks, *few, *overrides, recipe=recipe), folder / "out"
    )
    assert find_mismatches({result.rank: result.collectives for result in results}) == []
    (phases,) = {tuple(phase.name for phase in result.phases) for result in results}
    return phases


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "parts", "recompute", "coefficient"),
    [
        ("TP2", "adapter", "full", 0.1),
        ("PP2", "adapter, language", "selective", 0.1),
        ("DP2", "adapter, vision", "none", 0.0),
        ("TP2 PP2 DP2", "vision, adapter, language", "full", 0.1),
        ("TP2 PP2 DP2", "adapter", "selective", 0.0),
    ],
)
def test_all_ranks_of_layouts_parts_and_recomputations_fit_together(
    model, tmp_path, layout, parts, recompute, coefficient
):
    phases = check_ranks_fit_together(
        model,
        tmp_path,
        layout,
        "grpo.yaml",
        f"train.parts=[{parts}]",
        f"train.recompute={recompute}",
        f"algorithm.kl_coefficient={coefficient}",
        "train.updates_per_step=2",
    )
    assert phases[-3:] == END


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "layout", "parts", "recompute"),
    [
        ("align.yaml", "TP2", "vision, adapter, language", "selective"),
        ("align.yaml", "PP2", "adapter, vision", "full"),
        ("align.yaml", "DP2", "adapter, language", "none"),
        ("align.yaml", "TP2 PP2 DP2", "adapter", "full"),
        ("mpo.yaml", "TP2", "adapter, language", "full"),
        ("mpo.yaml", "PP2", "adapter", "none"),
        ("mpo.yaml", "DP2", "vision, adapter, language", "selective"),
        ("mpo.yaml", "TP2 PP2 DP2", "adapter, vision", "selective"),
        (REWARD_MODEL, "TP2", "adapter, vision, score", "none"),
        (REWARD_MODEL, "PP2", "vision, adapter, language, score", "selective"),
        (REWARD_MODEL, "DP2", "adapter, score", "full"),
        (REWARD_MODEL, "TP2 PP2 DP2", "adapter, language, score", "full"),
    ],
)
def test_all_ranks_of_stages_with_given_responses_fit_together(model, tmp_path, recipe, layout, parts, recompute):
    overrides = (f"train.parts=[{parts}]", f"train.recompute={recompute}")
    phases = check_ranks_fit_together(model, tmp_path, layout, recipe, *overrides)
    assert phases[-2:] == END[-2:]
    assert phases.count("update") == 2


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_ranks_that_make_pairs_fit_together(model, tmp_path, layout):
    phases = check_ranks_fit_together(model, tmp_path, layout, "pairs.yaml")
    assert phases[-4:] == ("generate", "continue", "generate", "continue")


def rehearse_with_fault(names, spec, folder):
    """Rehearse a rank with a fault, or several with commas between them."""
    folder.mkdir()
    spec.write(folder / "spec.json")
    command = [sys.executable, "-m", "tests.rehearsal.faults", names, folder / "spec.json", folder / "result.json"]
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


@pytest.mark.slow
def test_a_cache_that_is_too_large_does_not_fit(model, tmp_path):
    (spec,) = tiny_specs(tmp_path / "inputs", model, ALONE, [0], *FEW)
    result = rehearse_with_fault("large_cache", spec, tmp_path / "out")
    assert not error_of(result)
    plan = plan_of()
    found = Rehearsal(
        replace(plan, cluster=replace(plan.cluster, gpu_memory_gib=8, reserve_gib=0)), (result,), (), STEP_OF_FEW
    )
    assert not found.passed
    assert {phase.name for _, phase in found.too_full} == {"start", "gate", "generate", "evaluate"}
    _, phase = max(found.too_full, key=lambda each: each[1].at_peak["kv_cache"])
    assert phase.at_peak["kv_cache"] > 10 * 2**30


FIRST_FAULTS, SECOND_FAULTS = "large_cache,raises_on_cuda", "skips_collective,cpu_index"
"""Of two ranks, up to the gate; each fault alone is in the slow tests above."""


@pytest.fixture(scope="module")
def two_broken_ranks(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    specs = tiny_specs(folder / "inputs", model, TENSOR, [0, 1], *FEW)
    with ThreadPoolExecutor() as pool:
        faults, outputs = (FIRST_FAULTS, SECOND_FAULTS), (folder / "first", folder / "second")
        first, second = pool.map(rehearse_with_fault, faults, specs, outputs)
    assert (first.error_phase, second.error_phase) == ("gate", "gate")
    return first, second


def test_a_branch_for_gpus_and_an_index_of_the_host_are_found_at_the_gate(two_broken_ranks):
    first, second = two_broken_ranks
    assert "RuntimeError: a branch for GPUs alone (at " in first.error
    assert "same device" in second.error
    assert "megatron_r1v2/generation/engine.py" in second.error, "with the line of the product"


def test_a_collective_that_one_rank_of_two_skips_is_found_by_the_gate(two_broken_ranks):
    first, second = two_broken_ranks
    (found, *_) = find_mismatches({0: first.collectives, 1: second.collectives})
    assert "in the group of 2 ranks (0, 1): rank 0: allreduce_" in found


def test_ten_gib_too_many_of_a_cache_do_not_fit_at_the_gate(two_broken_ranks):
    plan = plan_of()
    cluster = replace(plan.cluster, gpu_memory_gib=8, reserve_gib=0)
    too_full = [
        {phase.name for _, phase in Rehearsal(replace(plan, cluster=cluster), (rank,), (), STEP_OF_FEW).too_full}
        for rank in two_broken_ranks
    ]
    assert too_full == [{"start", "gate"}, set()], "of the first rank alone"


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
