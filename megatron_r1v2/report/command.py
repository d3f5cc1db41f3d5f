"""The command line of `r1v2 report`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_r1v2.config.command_line import command_parser, quiet_libraries

_DESCRIPTION = """\
Write the report of a run, RUN_DIR/report.html, for each RUN_DIR, finished or still going; of a folder of preference
pairs it shows some of them. Of several runs write
comparison.html too, in the first of them: their curves in the same pictures, and the settings in which they differ.

With --evaluations write one page of all evaluations in these folders, with their responses: evaluation.html in the
first of them. Pages need nothing from anywhere else."""


def main(argv: Sequence[str]) -> None:
    """Write the pages and print their paths; exit 2 on bad input.

    Raises:
        SystemExit: 2 after bad input, with the message on standard error.
    """
    parser = command_parser("report", _DESCRIPTION)
    parser.add_argument("run_dir", nargs="+", metavar="RUN_DIR", help="folder of a run")
    parser.add_argument("--evaluations", action="store_true", help="one page of the evaluations in these folders")
    parser.add_argument(
        "--compare", nargs=2, metavar="NAME", help="the evaluations to compare; else the first and the last"
    )
    parser.add_argument("--output", type=Path, metavar="PAGE", help="the page of --evaluations or of several runs")
    arguments = parser.parse_args(argv)
    if arguments.output and not arguments.evaluations and len(arguments.run_dir) == 1:
        parser.error("--output is the page of --evaluations or of several runs; a report goes into its RUN_DIR")
    if arguments.compare and arguments.evaluations:
        parser.error("--compare is for a run's report; the page of --evaluations shows all of them")
    compare = tuple(arguments.compare) if arguments.compare else None
    quiet_libraries()
    # Imported after the arguments are checked: matplotlib takes seconds.
    from megatron_r1v2.report.comparison_page import write_comparison
    from megatron_r1v2.report.evaluation_page import write_evaluation_page
    from megatron_r1v2.report.page import write_report

    try:
        if arguments.evaluations:
            print(write_evaluation_page(arguments.run_dir, arguments.output))
        else:
            for run_dir in arguments.run_dir:
                print(write_report(run_dir, compare))
            if len(arguments.run_dir) > 1:
                print(write_comparison(arguments.run_dir, arguments.output))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
