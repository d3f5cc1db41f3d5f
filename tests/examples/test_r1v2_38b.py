"""The 38B recipes are accepted for the real model's sizes and agree with the jobs that start them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_r1v2.checkpoint.hf.architecture import r1v2_architecture
from megatron_r1v2.config.load import load_recipe, load_recipe_as
from megatron_r1v2.config.recipes import EvaluateRecipe, Recipe
from megatron_r1v2.config.schema import Fp8, Layers, Packing, Part, Recompute
from megatron_r1v2.parallel.groups import check_world_size
from megatron_r1v2.planning.hardware import HARDWARE
from megatron_r1v2.planning.memory import kv_cache_bytes
from megatron_r1v2.planning.plan import Cluster, make_plan
from megatron_r1v2.stages.model_fit import fit_mistakes
from tests.models.test_meta_38b import HF, RECIPES

ROOT = Path(__file__).parents[2]
NAMES = [path.stem for path in RECIPES]
OTHER_JOBS = [ROOT / "slurm" / f"{name}_38b.sh" for name in ("convert", "evaluate", "pipeline")]
JOBS = sorted(set((ROOT / "slurm").glob("*_38b*.sh")) - set(OTHER_JOBS))
TRAINING = [name for name in NAMES if name != "pairs"]


def recipe_of(name: str) -> Recipe:
    return load_recipe(ROOT / "examples" / "r1v2_38b" / f"{name}.yaml")


def cluster_of(name: str) -> tuple[int, int, int]:
    """Return the nodes, GPUs of a node, and GB of a GPU that a recipe's header names."""
    first = (ROOT / "examples" / "r1v2_38b" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    found = re.fullmatch(r"# Cluster: (\d+) nodes? x (\d+) GPUs x (\d+) GB", first)
    assert found, f"{name}.yaml does not say in its first line what cluster it is for"
    nodes, gpus, memory = map(int, found.groups())
    return nodes, gpus, memory


def cache_bytes_of(name: str) -> float:
    """Return the size of a recipe's cache on a GPU, as planned where the recipe takes what is free."""
    recipe = recipe_of(name)
    if recipe.generation.kv_cache_gib != "auto":
        return recipe.generation.kv_cache_gib * 2**30
    nodes, gpus, memory = cluster_of(name)
    hardware = HARDWARE["h200" if memory > 100 else "h100"]
    plan = make_plan(recipe, HF, Cluster(nodes * gpus, gpus, hardware.memory_gib, 4.0, hardware))
    assert plan.fits, f"{name}: {plan.memory.peak}"
    phase = "generate" if "generate" in plan.work.phases else "evaluate"
    return min(
        kv_cache_bytes(plan.architecture, plan.layout, plan.work, stage, phase) for stage in range(plan.layout.pipeline)
    )


def test_every_recipe_is_here():
    assert {"align", "mpo", "grpo", "grpo_64k", "grpo_fp8", "grpo_language", "grpo_language_64k"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_fits_the_real_model_and_its_cluster(name):
    recipe = recipe_of(name)
    assert list(fit_mistakes(recipe, r1v2_architecture(HF).language)) == []
    assert name.startswith(recipe.stage.value)
    nodes, gpus, _ = cluster_of(name)
    check_world_size(recipe.parallel, nodes * gpus)
    assert recipe.parallel.tensor == gpus, "tensor parallelism fills a node and stays inside it"
    assert recipe.train.prompts_per_step % (nodes * gpus // (recipe.parallel.tensor * recipe.parallel.pipeline)) == 0


@pytest.mark.parametrize("name", NAMES)
def test_the_longest_sequence_fits_a_packed_row_and_the_cache(name):
    recipe = recipe_of(name)
    longest = recipe.data.max_prompt_tokens + recipe.generation.max_response_tokens
    assert recipe.train.packing is Packing.shared
    assert longest * (2 if name == "mpo" else 1) <= recipe.train.tokens_per_microbatch
    # Keys and values of the layers of a stage, bf16, one of the eight key-value heads on each rank.
    bytes_per_token = 64 // recipe.parallel.pipeline * 2 * 128 * 2
    assert cache_bytes_of(name) >= 8 * longest * bytes_per_token, "a group at least"
    assert recipe.data.max_tiles * 256 + 256 < recipe.data.max_prompt_tokens, "the thumbnail and some text too"


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.stem)
def test_jobs_ask_for_the_cluster_of_their_recipe(job):
    text = job.read_text(encoding="utf-8")
    stage, name = re.search(r"launch ([\w-]+) examples/r1v2_38b/(\w+)\.yaml", text).groups()
    assert name.startswith(stage.replace("-", "_"))
    asked = [
        int(re.search(rf"^#SBATCH --{option}=(\d+)$", text, re.MULTILINE)[1]) for option in ("nodes", "gpus-per-node")
    ]
    assert tuple(asked) == cluster_of(name)[:2]
    assert f"sbatch slurm/{job.name} " in text
    assert re.search(r"^#SBATCH --job-name=(.+)$", text, re.MULTILINE)[1] in recipe_of(name).run.name.replace(
        "-38b", ""
    )


@pytest.mark.parametrize("name", TRAINING)
def test_preemption_costs_a_step_at_most_where_a_checkpoint_is_small(name):
    recipe = recipe_of(name)
    assert recipe.checkpoint.asynchronous
    assert recipe.checkpoint.keep_rollouts
    if recipe.train.parts == (Part.adapter,):
        assert recipe.checkpoint.every_steps == 1


def test_recipes_have_names_and_folders_of_their_own():
    recipes = [recipe_of(name) for name in NAMES]
    assert len({recipe.run.name for recipe in recipes}) == len(NAMES)
    assert len({recipe.run.output_dir for recipe in recipes}) == len(NAMES)


def test_each_stage_starts_from_what_the_one_before_writes():
    align, pairs, mpo, grpo = (recipe_of(name) for name in ("align", "pairs", "mpo", "grpo"))
    assert align.model.checkpoint == ""
    assert pairs.model.checkpoint == mpo.model.checkpoint == align.run.output_dir
    assert mpo.data.train == pairs.run.output_dir
    assert {recipe.model.hf_path for recipe in (align, pairs, mpo, grpo)} == {grpo.model.hf_path}
    published = {"grpo_from_skywork", "grpo_from_internvl3"}
    for name in NAMES:
        if name.startswith("grpo"):
            assert recipe_of(name).model.checkpoint == ("" if name in published else mpo.run.output_dir), name
    assert len({recipe_of(name).model.hf_path for name in published} - {grpo.model.hf_path}) == 2


FAKE_SBATCH = """#!/usr/bin/env bash
echo "tool=${R1V2_TOOL:-} $*" >> "$SUBMITTED"
echo "$((100 + $(wc -l < "$SUBMITTED")));cluster-a"
"""


def submitted(tmp_path: Path, *arguments: str, **environment: str) -> list[str]:
    """Return the command lines of sbatch that the pipeline gives, in a folder that has what the chain begins with."""
    (tmp_path / "sbatch").write_text(FAKE_SBATCH)
    (tmp_path / "sbatch").chmod(0o755)
    log = tmp_path / "submitted"
    for name in CHAIN_BEGINS_WITH:
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SUBMITTED": str(log)} | environment
    submit(tmp_path, *arguments, **variables).check_returncode()
    return log.read_text().splitlines()


def submit(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    for name in ("slurm", "examples/r1v2_38b"):
        shutil.copytree(ROOT / name, folder / name, dirs_exist_ok=True)
    command = ["bash", str(folder / "slurm" / "pipeline_38b.sh"), *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


def test_the_pipeline_submits_every_stage_after_the_one_before(tmp_path):
    lines = submitted(tmp_path, "--partition=long")
    stages = ["align", "pairs", "mpo", "grpo", "evaluate", "convert"]
    for number, (line, stage) in enumerate(zip(lines, stages, strict=True)):
        tool, parsable, *options = line.split()
        assert (tool, parsable) == ("tool=megatron_to_hf" if stage == "convert" else "tool=", "--parsable")
        expected = [f"--dependency=afterok:{100 + number}"] if number else []
        assert options[: len(expected) + 2] == [*expected, "--partition=long", f"slurm/{stage}_38b.sh"]
        assert (ROOT / "slurm" / f"{stage}_38b.sh").is_file()
    grpo = recipe_of("grpo")
    assert f"--checkpoint {grpo.run.output_dir} --base {grpo.model.hf_path} --output" in lines[-1]


CHAIN_BEGINS_WITH = (
    "checkpoints/r1v2-38b-hf",
    *(f"data/align/{split}" for split in ("train", "validation")),
    *(f"data/multimodal-math/{split}" for split in ("train", "validation", "test")),
)


def test_the_pipeline_submits_nothing_where_a_later_job_would_fail(tmp_path):
    ended = submit(tmp_path, PATH=os.environ["PATH"])
    assert ended.returncode == 2
    missing = [re.fullmatch(r"\w+ reads (\S+), which is not here", line)[1] for line in ended.stderr.splitlines()]
    assert sorted(missing) == sorted(CHAIN_BEGINS_WITH)
    from_recipes = {recipe_of(name).data.validation for name in ("align", "mpo", "grpo")}
    from_recipes |= {recipe_of(name).data.train for name in ("align", "pairs", "grpo")}
    assert from_recipes | {recipe_of("grpo").model.hf_path} <= set(missing)
    for name in (*CHAIN_BEGINS_WITH, "runs/r1v2-38b-align", "runs/r1v2-38b-pairs", "checkpoints/r1v2-38b-trained"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    assert [line.split(",")[0] for line in submit(tmp_path).stderr.splitlines()] == [
        "pairs writes runs/r1v2-38b-pairs",
        "export writes checkpoints/r1v2-38b-trained",
    ]
    told = submit(tmp_path, R1V2_FROM="evaluate").stderr.splitlines()
    assert told[0] == "evaluate reads runs/r1v2-38b-grpo, which is not here"


def test_the_pipeline_begins_where_it_is_told(tmp_path):
    for name in ("align", "pairs"):
        (tmp_path / "runs" / f"r1v2-38b-{name}").mkdir(parents=True)
    assert [line.split("/")[-1] for line in submitted(tmp_path, R1V2_FROM="mpo")][:2] == ["mpo_38b.sh", "grpo_38b.sh"]
    with pytest.raises(subprocess.CalledProcessError):
        submitted(tmp_path, R1V2_FROM="sft")


def test_evaluate_takes_the_recipe_and_the_run_of_grpo():
    command = re.search(r"launch (evaluate .*)\"\$@\"", OTHER_JOBS[1].read_text(encoding="utf-8"), re.DOTALL)[1]
    _, path, *overrides = command.replace("\\\n", " ").split()
    recipe = load_recipe_as(EvaluateRecipe, ROOT / path, overrides)
    assert recipe.model.checkpoint == recipe.run.output_dir == recipe_of("grpo").run.output_dir
    assert recipe.evaluation.data


def test_they_are_what_their_names_say():
    grpo, long, fp8, language = (recipe_of(name) for name in ("grpo", "grpo_64k", "grpo_fp8", "grpo_language"))
    assert grpo.train.parts == long.train.parts == fp8.train.parts == (Part.adapter,)
    assert language.train.parts == (Part.adapter, Part.language)
    assert (grpo.generation.max_response_tokens, long.generation.max_response_tokens) == (8192, 65536)
    assert (grpo.parallel.tensor, grpo.parallel.pipeline, language.parallel.pipeline) == (8, 1, 1)
    assert all(recipe.parallel.sequence for recipe in (grpo, long, fp8, language))
    assert (fp8.model.layers, fp8.model.fp8, fp8.model.fp8_weights) == (Layers.te, Fp8.tensorwise, True)
    assert long.train.recompute is Recompute.full
    assert recipe_of("align").train.parts == recipe_of("mpo").train.parts == (Part.adapter,)
