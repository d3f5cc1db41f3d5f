"""One command for everything: `python -m megatron_r1v2 COMMAND ...`, or `r1v2 COMMAND ...` where it is installed."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module

_NAME_OPTION = "--name"


@dataclass(frozen=True)
class Command:
    """A command of the list.

    Example: Command("write the report of a run", lambda arguments: print("report.html")).
    """

    summary: str
    """One line of the list of commands."""
    run: Callable[[Sequence[str]], int | None]
    """Takes the arguments behind the command's name; returns the exit status, None for 0."""


def _run_stage(stage: str, module: str, arguments: Sequence[str]) -> None:
    """Run a stage, the `run_STAGE` of a module below stages/, and name what it wrote; of a training run, the report."""
    from megatron_r1v2.config.choices import StageName
    from megatron_r1v2.config.command_line import parse_command_line, quiet_libraries, tell_bad_input
    from megatron_r1v2.config.recipes import STAGES
    from megatron_r1v2.stages.model_fit import all_mistakes

    recipe = parse_command_line(arguments, STAGES[StageName(stage)], all_mistakes)
    quiet_libraries()
    # Imported after the settings are checked: a typo should not take the seconds that megatron-core needs.
    from megatron_r1v2.report.page import write_report

    run = getattr(import_module(f"megatron_r1v2.stages.{module}"), f"run_{stage}")
    with tell_bad_input():
        output = run(recipe)
    if os.environ.get("RANK", "0") == "0":
        print(f"pairs: {output}" if stage == "pairs" else f"report: {write_report(output)}")


def _evaluate(arguments: Sequence[str]) -> int | None:
    """Evaluate a checkpoint or an endpoint, and write the results page of the run folder."""
    from megatron_r1v2.config.command_line import parse_command_line, quiet_libraries, tell_bad_input
    from megatron_r1v2.config.recipes import EvaluateRecipe
    from megatron_r1v2.stages.model_fit import all_mistakes

    name, settings = _without_name(arguments)
    recipe = parse_command_line(settings, EvaluateRecipe, all_mistakes)
    quiet_libraries()
    from rich.console import Console

    from megatron_r1v2.evaluation.chat_endpoint import EndpointFailed
    from megatron_r1v2.evaluation.pass_at_1 import EvaluationResult, comparison_table
    from megatron_r1v2.report.evaluation_page import write_evaluation_page

    try:
        with tell_bad_input():
            if recipe.evaluation.endpoint_url:
                from megatron_r1v2.stages.endpoint_evaluation import run_endpoint_evaluation

                result: EvaluationResult | None = run_endpoint_evaluation(recipe, name)
            else:
                from megatron_r1v2.stages.evaluate import run_evaluation

                result = run_evaluation(recipe, name)
    except EndpointFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if result is not None:
        Console().print(comparison_table([result]))
        print(f"responses: {write_evaluation_page([recipe.run.output_dir])}")
    return None


def _without_name(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Take the name of the result out of the arguments."""
    rest = list(arguments)
    if _NAME_OPTION not in rest:
        return "evaluation", rest
    position = rest.index(_NAME_OPTION)
    if position + 1 == len(rest):
        raise SystemExit(f"error: {_NAME_OPTION} needs a value: the result is written to evaluation-NAME.json")
    name = rest[position + 1]
    del rest[position : position + 2]
    return name, rest


def _main_of(module: str, arguments: Sequence[str]) -> int | None:
    """Run the `main` of a command line that is a module of its own."""
    status: int | None = import_module(f"megatron_r1v2.{module}").main(arguments)
    return status


COMMANDS: Mapping[str, Command] = {
    "align": Command("train parts of the model on given responses", partial(_run_stage, "align", "align")),
    "pairs": Command("make preference pairs of the model's own responses", partial(_run_stage, "pairs", "pairs")),
    "mpo": Command("train on preference pairs (MPO; DPO and SFT by its weights)", partial(_run_stage, "mpo", "mpo")),
    "reward-model": Command(
        "train a reward model on preference pairs", partial(_run_stage, "reward_model", "reward_model")
    ),
    "grpo": Command("train by GRPO with the Selective Sample Buffer", partial(_run_stage, "grpo", "grpo.stage")),
    "evaluate": Command("measure Pass@1 of a checkpoint or of a served model", _evaluate),
    "filter-prompts": Command(
        "keep the prompts that a model answers sometimes rightly, sometimes wrongly",
        partial(_main_of, "evaluation.filter_prompts_command"),
    ),
    "prepare": Command("turn rows and images into checked shards", partial(_main_of, "stages.prepare")),
    "benchmarks": Command(
        "turn the published files of a benchmark into shards", partial(_main_of, "evaluation.benchmarks.command")
    ),
    "plan": Command(
        "compute what a recipe needs of each GPU, and how long a step takes", partial(_main_of, "planning.command")
    ),
    "rehearse": Command(
        "run a recipe on a CPU as ranks of its cluster, on tensors without memory",
        partial(_main_of, "rehearsal.command"),
    ),
    "report": Command("write the page of a run, or of evaluations", partial(_main_of, "report.command")),
    "serve": Command("serve a checkpoint to OpenAI clients", partial(_main_of, "serve.command")),
    "serve-reward-model": Command("serve the scores of Skywork-VL-Reward", partial(_main_of, "serve.reward_command")),
}
"""By the name on the command line, in the order of the list."""


def usage() -> str:
    """Return the list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: [torchrun ... -m | python -m] megatron_r1v2 COMMAND ...",
            "",
            *lines,
            "",
            "COMMAND --help says more of each; --help WORD ... finds commands and settings by any of the words.",
        ]
    )


def _search(words: Sequence[str]) -> str:
    """Return the commands and settings that contain any of some words."""
    from megatron_r1v2.config.command_line import describe_settings, select_entries

    return select_entries(f"commands\n{usage()}\n{describe_settings()}", words, of="any command")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit status: 2 when there is no such command.

    Args:
        argv: the arguments; None: those of the process.
    """
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    with _reader_may_leave():
        if name in ("-h", "--help"):
            print(_search(arguments) if arguments else usage())
            return 0
        if name not in COMMANDS:
            print(f"error: there is no command {name!r}\n{usage()}", file=sys.stderr)
            return 2
        return COMMANDS[name].run(arguments) or 0


@contextmanager
def _reader_may_leave() -> Iterator[None]:
    """End the process quietly when nobody reads its standard output any more, as behind `| head`."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_is_gone():
            raise  # a connection broke, which is an error
        # Python flushes once more at its end, and would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None


def _reader_is_gone() -> bool:
    poll = select.poll()
    poll.register(sys.stdout, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


if __name__ == "__main__":
    sys.exit(main())
