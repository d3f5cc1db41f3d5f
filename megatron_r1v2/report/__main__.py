"""python -m megatron_r1v2.report RUN_DIR [RUN_DIR ...]: write RUN_DIR/report.html for each."""

from __future__ import annotations

import argparse
import sys

from megatron_r1v2.report.page import write_report


def main() -> None:
    """Write the reports and print their paths; exit 2 on a folder that does not exist."""
    parser = argparse.ArgumentParser(prog="python -m megatron_r1v2.report", description=__doc__)
    parser.add_argument("run_dir", nargs="+", help="folder of a run, finished or still going")
    try:
        for run_dir in parser.parse_args().run_dir:
            print(write_report(run_dir))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
