"""`python -m megatron_r1v2.evaluate [RECIPE.yaml] [--name NAME] section.key=value ...` measures Pass@1; see `--help`.

With evaluation.endpoint_url it evaluates what an OpenAI-compatible server serves, without loading a model.
"""

from __future__ import annotations

import sys

from rich.console import Console

from megatron_r1v2.config.command_line import parse_command_line, quiet_libraries, tell_bad_input

NAME_OPTION = "--name"
_DESCRIPTION = """\
Measures Pass@1 on evaluation.data: of model.checkpoint or model.hf_path in process; with evaluation.endpoint_url and
evaluation.endpoint_model, of what a server serves. --name NAME (default: evaluation) names the result, which goes to
evaluation-NAME.json in run.output_dir; the responses are beside it, and evaluation.html shows them. An evaluation that
was interrupted goes on where it stopped. Without RECIPE.yaml the settings are the defaults."""


def main() -> None:
    """Evaluate a checkpoint or an endpoint, and write the results page of the run folder."""
    arguments = sys.argv[1:]
    name = "evaluation"
    if NAME_OPTION in arguments:
        position = arguments.index(NAME_OPTION)
        if position + 1 == len(arguments):
            raise SystemExit(f"error: {NAME_OPTION} needs a value: the result is written to evaluation-NAME.json")
        name = arguments[position + 1]
        del arguments[position : position + 2]
    recipe = parse_command_line(arguments, "evaluate", description=_DESCRIPTION)
    quiet_libraries()
    # Imported after the settings are checked: a typo should not take the seconds that megatron-core needs.
    from megatron_r1v2.evaluation.chat_endpoint import EndpointFailed
    from megatron_r1v2.evaluation.pass_at_1 import EvaluationResult, comparison_table
    from megatron_r1v2.report.evaluation_page import write_evaluation_page

    try:
        with tell_bad_input():
            if recipe.evaluation.endpoint_url:
                from megatron_r1v2.evaluation.endpoint_run import run_endpoint_evaluation

                result: EvaluationResult | None = run_endpoint_evaluation(recipe, name)
            else:
                from megatron_r1v2.stages.evaluate import run_evaluation

                result = run_evaluation(recipe, name)
    except EndpointFailed as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    if result is not None:
        Console().print(comparison_table([result]))
        print(f"responses: {write_evaluation_page([recipe.run.output_dir])}")


if __name__ == "__main__":
    main()
