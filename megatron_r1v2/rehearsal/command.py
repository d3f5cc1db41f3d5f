"""The command line of `r1v2 rehearse`."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from megatron_r1v2.config.command_line import command_parser, describe_settings, quiet_libraries
from megatron_r1v2.config.recipes import Recipe
from megatron_r1v2.planning.command import add_cluster_options, read_cluster, recipe_to_plan
from megatron_r1v2.planning.known_models import find_hf_config
from megatron_r1v2.types import DataEndsRunError, NoRoomError

TESTED_TORCH = "2.13.0"
"""That of requirements.lock: a rehearsal replaces private parts of torch, which other versions may have elsewhere."""
_DESCRIPTION = """\
Rehearse a run on a CPU before it is queued: the stage's own code as one rank of each pipeline stage, on tensors without
memory, for two steps on rows as long as the recipe allows. Prints the memory of each phase beside the plan's, the
collectives, and every assumption. Exit status 1: it would not run, not fit, or hang.

example:
  python -m megatron_r1v2 rehearse RECIPE.yaml --gpus 8 --hf-config r1v2-38b"""


def main(argv: Sequence[str]) -> None:
    """Print the rehearsal; exit 1 when something was found and 2 on bad input.

    Raises:
        SystemExit: 1 or 2, see above.
    """
    parser = command_parser("rehearse", _DESCRIPTION, settings=describe_settings)
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="recipe of a stage")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="as for the stages")
    add_cluster_options(parser)
    parser.add_argument(
        "--all-ranks",
        action="store_true",
        help="the first and the last tensor-parallel rank of each stage, in the first and the last replica",
    )
    parser.add_argument(
        "--data",
        action="store_true",
        help="check the length of every row of data.train and data.validation, and rehearse on the longest ones",
    )
    parser.add_argument("--svg", type=Path, help="write the memory of the fullest rank over the step to this file")
    # Intermixed, because people write overrides before, between and after the options.
    arguments = parser.parse_intermixed_args(argv)
    quiet_libraries()
    _warn_of_other_torch()
    try:
        _check_files(arguments)
        check = partial(_tokenizer_mistakes, hf_config=arguments.hf_config) if arguments.data else lambda _: ()
        recipe = recipe_to_plan([arguments.recipe, *arguments.overrides], None, arguments.hf_config, first=check)
        # Imported after the settings are checked: a typo should not take the seconds that megatron-core needs.
        from megatron_r1v2.checkpoint.hf.config import sizes_config
        from megatron_r1v2.planning.plan import make_plan

        hf_config = sizes_config(find_hf_config(recipe.model.hf_path, arguments.hf_config))
        plan = make_plan(recipe, hf_config, read_cluster(arguments))
        from megatron_r1v2.rehearsal.run import rehearse
        from megatron_r1v2.rehearsal.show import as_json, print_rehearsal

        found = rehearse(
            recipe,
            hf_config,
            plan,
            hf_path=_model_folder(arguments.hf_config or recipe.model.hf_path),
            all_ranks=arguments.all_ranks,
            own_data=arguments.data,
        )
    except NoRoomError as error:
        print(f"It does not fit: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except DataEndsRunError as error:
        print(f"Its data would end the run, so nothing was rehearsed.\n{error}", file=sys.stderr)
        raise SystemExit(1) from error
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    if arguments.json:
        print(json.dumps(as_json(found), indent=1))
    else:
        print_rehearsal(found)
    if arguments.svg is not None:
        from megatron_r1v2.rehearsal.chart import memory_chart

        fullest = max(found.ranks, key=lambda rank: max((phase.peak for phase in rank.phases), default=0))
        if fullest.samples:
            arguments.svg.write_text(memory_chart(f"{plan.name}, {fullest.place}", fullest.samples, plan.cluster.limit))
        else:
            print(f"{arguments.svg} is not written: the rehearsal has seen no tensor", file=sys.stderr)
    if not found.passed:
        raise SystemExit(1)


def _warn_of_other_torch() -> None:
    version = importlib.metadata.version("torch").partition("+")[0]
    if version != TESTED_TORCH:
        print(
            f"warning: rehearsals are tested with torch {TESTED_TORCH}, this is {version}: what is found may be the "
            "rehearsal's own mistake; make install brings the tested one",
            file=sys.stderr,
        )


def _model_folder(given: str) -> Path | None:
    """Return the folder of a model, which a config.json lies in; None: there is none."""
    folder = Path(given).parent if Path(given).name == "config.json" else Path(given)
    return folder if folder.is_dir() else None


def _tokenizer_mistakes(recipe: Recipe, *, hf_config: str) -> Iterator[str]:
    hf_path = _model_folder(hf_config or recipe.model.hf_path)
    if hf_path is None or not any(hf_path.glob("tokenizer*")):
        missing = "there is no folder of the model" if hf_path is None else f"{hf_path} has none"
        yield (
            f"--data measures rows with the model's own tokenizer, but {missing}; give --hf-config a folder with its "
            "config.json and tokenizer (weights are not needed), or leave --data out"
        )


def _check_files(arguments: argparse.Namespace) -> None:
    """Refuse what would be noticed only after minutes, or not at all.

    Raises:
        ValueError: the recipe is an override, or the chart has no place.
    """
    if "=" in arguments.recipe:
        raise ValueError(
            f"recipe {arguments.recipe!r} is an override; give the path of a YAML recipe before it, see examples/"
        )
    svg = arguments.svg
    if svg is not None and (svg.is_dir() or not svg.parent.is_dir()):
        raise ValueError(f"--svg={str(svg)!r} cannot be written; give a file in a folder that exists")
