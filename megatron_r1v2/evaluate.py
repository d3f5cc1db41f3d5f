"""`python -m megatron_r1v2.evaluate RECIPE.yaml [--name NAME] section.key=value ...` measures Pass@1; see `--help`."""

from __future__ import annotations

import sys

from megatron_r1v2.config.command_line import parse_command_line, quiet_libraries, tell_bad_input

NAME_OPTION = "--name"


def main() -> None:
    """Evaluate a checkpoint."""
    arguments = sys.argv[1:]
    name = "evaluation"
    if NAME_OPTION in arguments:
        position = arguments.index(NAME_OPTION)
        if position + 1 == len(arguments):
            raise SystemExit(f"error: {NAME_OPTION} needs a value: the result is written to evaluation-NAME.json")
        name = arguments[position + 1]
        del arguments[position : position + 2]
    recipe = parse_command_line(arguments, "evaluate")
    quiet_libraries()
    # Imported after the settings are checked: a typo should not take the seconds that megatron-core needs.
    from megatron_r1v2.training.evaluation_run import run_evaluation

    with tell_bad_input():
        run_evaluation(recipe, name)


if __name__ == "__main__":
    main()
