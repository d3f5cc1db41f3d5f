"""The command line of `r1v2 plan`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_r1v2.config.choices import StageName
from megatron_r1v2.config.command_line import command_parser, describe_settings, quiet_libraries
from megatron_r1v2.config.load import Check, load_recipe, load_recipe_as
from megatron_r1v2.config.recipes import STAGES, PairsRecipe, Recipe, TrainingRecipe
from megatron_r1v2.planning.hardware import HARDWARE
from megatron_r1v2.planning.known_models import KNOWN_MODELS, find_hf_config
from megatron_r1v2.stages.model_fit import fit_mistakes
from megatron_r1v2.types import NoRoomError

if TYPE_CHECKING:
    from megatron_r1v2.planning.plan import Cluster

_DESCRIPTION = """\
Plan what a run needs of each GPU, which layout fits, and how long a step takes, by arithmetic alone.

example:
  python -m megatron_r1v2 plan RECIPE.yaml --gpus 16 --gpu-memory 80"""


def main(argv: Sequence[str]) -> None:
    """Print the plan; exit 1 when the recipe does not fit and 2 on bad input.

    Raises:
        SystemExit: 1 or 2, see above.
    """
    # Intermixed, because people write overrides before, between and after the options.
    arguments = _parser().parse_intermixed_args(argv)
    quiet_libraries()
    stage = StageName(arguments.stage) if arguments.stage else None
    try:
        recipe = recipe_to_plan(arguments.recipe, stage, arguments.hf_config)
        hf_config = find_hf_config(recipe.model.hf_path, arguments.hf_config)
        # Imported after the settings are checked: a typo should not take the seconds that megatron-core needs.
        from megatron_r1v2.planning.plan import AssumedLengths, make_plan
        from megatron_r1v2.planning.show import as_json, print_plan

        plan = make_plan(
            recipe,
            hf_config,
            read_cluster(arguments),
            stage=stage,
            tiles=arguments.tiles,
            lengths=AssumedLengths(
                arguments.mean_response_tokens, arguments.spread, arguments.lengths, arguments.segment_tokens
            ),
        )
    except NoRoomError as error:
        print(f"It does not fit: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    if arguments.json:
        print(json.dumps(as_json(plan), indent=1))
    else:
        print_plan(plan)
    if not plan.fits:
        raise SystemExit(1)


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name the GPUs and the model, for every command that plans."""
    parser.add_argument("--gpus", type=int, required=True, help="GPUs of the run")
    parser.add_argument("--gpu-memory", type=float, default=0.0, help="GiB of one GPU; default: that of --gpu")
    parser.add_argument("--gpu", choices=sorted(HARDWARE), default="h100", help="for the times (default: h100)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="bounds tensor parallelism (default: 8)")
    parser.add_argument(
        "--hf-config",
        default="",
        help=f"config.json, its folder, or one of {', '.join(KNOWN_MODELS)}; default: that in model.hf_path",
    )
    parser.add_argument(
        "--reserve",
        type=float,
        default=4.0,
        help="GiB of each GPU for CUDA, NCCL, kernels and the allocator's gaps (default: 4, an assumption)",
    )
    parser.add_argument("--matmul-efficiency", type=float, default=0.0, help="attained part of the FLOP/s")
    parser.add_argument("--bandwidth-efficiency", type=float, default=0.0, help="attained part of the bandwidth")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def read_cluster(arguments: argparse.Namespace) -> Cluster:
    """Return the GPUs that the options of `add_cluster_options` name.

    Raises:
        ValueError: an option is out of range.
    """
    from megatron_r1v2.planning.plan import Cluster

    _check_ranges(arguments)
    hardware = HARDWARE[arguments.gpu]
    if arguments.matmul_efficiency:
        hardware = replace(hardware, matmul_efficiency=arguments.matmul_efficiency)
    if arguments.bandwidth_efficiency:
        hardware = replace(hardware, bandwidth_efficiency=arguments.bandwidth_efficiency)
    return Cluster(
        gpus=arguments.gpus,
        gpus_per_node=arguments.gpus_per_node,
        gpu_memory_gib=arguments.gpu_memory or hardware.memory_gib,
        reserve_gib=arguments.reserve,
        hardware=hardware,
    )


def _check_ranges(arguments: argparse.Namespace) -> None:
    if arguments.gpus_per_node < 1:
        raise ValueError(f"--gpus-per-node={arguments.gpus_per_node} is less than 1; give the GPUs of one node")
    if not arguments.reserve >= 0:
        raise ValueError(f"--reserve={arguments.reserve:g} is negative; give the GiB to keep free, 0 or more")
    for part in ("matmul", "bandwidth"):
        efficiency = getattr(arguments, f"{part}_efficiency")
        if not 0 <= efficiency <= 1:
            raise ValueError(f"--{part}-efficiency={efficiency:g} is not a part of the whole; accepted: from 0 to 1")


def recipe_to_plan(
    given: Sequence[str], stage: StageName | None, hf_config: str, *, first: Check = lambda _: ()
) -> TrainingRecipe | PairsRecipe:
    """Read the recipe that comes first, or take the defaults of a stage where there are only overrides.

    Args:
        first: a check that needs no library; where it finds something, the model is not looked at.
    """
    check = partial(_mistakes, hf_config=hf_config, first=first)
    if given and "=" not in given[0]:
        return load_recipe(given[0], given[1:], check=check)
    return load_recipe_as(STAGES[stage or StageName.grpo], None, given, check=check)


def _mistakes(recipe: Recipe, *, hf_config: str, first: Check) -> Iterator[str]:
    """Yield a sentence when the model's sizes cannot be found, or for each that does not fit."""
    if told := list(first(recipe)):
        yield from told  # before the imports below, which take seconds
        return
    try:
        config = find_hf_config(recipe.model.hf_path, hf_config)
        from megatron_r1v2.checkpoint.hf.architecture import r1v2_architecture
        from megatron_r1v2.checkpoint.hf.config import sizes_config

        architecture = r1v2_architecture(sizes_config(config))
    except ValueError as error:
        yield str(error)
    else:
        yield from fit_mistakes(recipe, architecture.language)


def _positive(text: str) -> float:
    number = float(text)
    if not 0.01 <= number <= 3:
        raise argparse.ArgumentTypeError(f"{text} is not between 0.01 and 3")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("plan", _DESCRIPTION, settings=describe_settings)
    parser.add_argument(
        "recipe",
        nargs="*",
        metavar="RECIPE.yaml section.key=value",
        help="recipe of any stage, and overrides as for the stages; without a recipe: the defaults of --stage",
    )
    parser.add_argument(
        "--stage", choices=[stage.value for stage in StageName], help="as which it is planned; default: its own"
    )
    add_cluster_options(parser)
    parser.add_argument("--tiles", type=int, default=0, help="image tiles of a prompt; default: the most possible")
    parser.add_argument(
        "--mean-response-tokens", type=int, default=0, help="for the times; default: half of the longest response"
    )
    parser.add_argument(
        "--spread",
        type=_positive,
        default=0.8,
        help="standard deviation of the logarithm of a response's tokens, for the tails (default: 0.8, an assumption)",
    )
    parser.add_argument(
        "--lengths", type=Path, metavar="METRICS.jsonl", help="of a grpo run: mean and spread of its responses"
    )
    parser.add_argument(
        "--segment-tokens",
        type=int,
        default=0,
        help="for the tails in segments; default: the recipe's generation.segment_tokens, or half of the mean response",
    )
    return parser
