"""`torchrun ... -m megatron_r1v2.grpo RECIPE.yaml section.key=value ...` runs the grpo stage; see `--help`."""

from __future__ import annotations

import os
import sys

from megatron_r1v2.config.command_line import parse_command_line, quiet_libraries, tell_bad_input


def main() -> None:
    """Run the stage and write its report."""
    recipe = parse_command_line(sys.argv[1:], "grpo")
    quiet_libraries()
    # Imported after the settings are checked: a typo should not take the seconds that megatron-core needs.
    from megatron_r1v2.report.page import write_report
    from megatron_r1v2.stages.grpo.stage import run_grpo

    with tell_bad_input():
        run_dir = run_grpo(recipe)
    if os.environ.get("RANK", "0") == "0":
        print(f"report: {write_report(run_dir)}")


if __name__ == "__main__":
    main()
