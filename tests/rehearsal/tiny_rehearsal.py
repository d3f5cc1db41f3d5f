"""A tiny model and recipe for rehearsals, and the processes that run them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from megatron_r1v2.checkpoint.hf.config import read_hf_architecture, read_hf_config
from megatron_r1v2.config.choices import StageName
from megatron_r1v2.config.load import load_recipe
from megatron_r1v2.config.recipes import STAGES
from megatron_r1v2.planning.parameters import Layout
from megatron_r1v2.rehearsal.preparation import write_rehearsal
from megatron_r1v2.rehearsal.rank import RankResult, RankSpec, rehearse_rank
from tests.tiny_hf import tiny_hf_model, tiny_text_config

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "examples" / "r1v2_38b"
TINY = (
    "data.max_prompt_tokens=256",
    "data.max_tiles=4",
    "generation.max_response_tokens=96",
    "generation.kv_cache_gib=0.01",
    "generation.max_requests=32",
    "generation.max_tokens_per_step=1024",
    "train.tokens_per_microbatch=256",
    "train.prompts_per_step=8",
    "checkpoint.asynchronous=false",
)
"""Overrides that make a recipe of the 38B model one for a tiny model."""


def tiny_model(folder: Path, *, hidden: int = 96) -> Path:
    """Write the model."""
    tiny_hf_model(folder, "6b", text=tiny_text_config(hidden=hidden))
    return folder


def tiny_specs(
    folder: Path, model: Path, layout: Layout, ranks: list[int], *overrides: str, recipe: str = "grpo.yaml"
) -> list[RankSpec]:
    """Write the inputs of a rehearsal and return the specification of each rank, on a fake GPU."""
    stage = StageName(load_recipe(RECIPES / recipe).stage)
    wanted = [
        *TINY,
        f"model.hf_path={model}",
        f"parallel.tensor={layout.tensor}",
        f"parallel.pipeline={layout.pipeline}",
        f"parallel.sequence={str(layout.sequence).lower()}",
    ]
    settings = STAGES[stage].settings()
    known = [each for each in wanted if _name(each)[1] in settings.get(_name(each)[0], ())]
    read = load_recipe(RECIPES / recipe, [*known, *overrides])
    config, _ = read_hf_config(model)
    architecture, _ = read_hf_architecture(model)
    inputs = write_rehearsal(read, config, architecture, layout, folder=folder, hf_path=model)
    step = inputs.step
    first = RankSpec(
        recipe=str(inputs.recipe),
        stage=read.stage,
        rank=0,
        world_size=layout.tensor * layout.pipeline * layout.data,
        gpus_per_node=8,
        gpu_memory_gib=80.0,
        rehearsed_prompts=step.long_of_replica,
        prompts_of_step=step.prompts_of_replica,
        mixed_groups=step.mixed_groups,
        whole_groups=step.whole_groups,
    )
    return [replace(first, rank=rank) for rank in ranks]


def _name(override: str) -> list[str]:
    return override.partition("=")[0].split(".")


def real_rank(spec: RankSpec) -> RankResult:
    """Run a rank on tensors with memory, with the other ranks of its world around it; for `run_ranks`."""
    return rehearse_rank(replace(spec, rank=int(os.environ["RANK"]), device="cpu", is_fake=False))


def error_of(result: RankResult) -> str:
    """Return what ended a rank, with its phase, for the message of an assertion."""
    return f"{result.error_phase}: {result.error}" if result.error else ""
