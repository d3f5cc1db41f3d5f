"""The command line of `r1v2 prepare`: rows of files and their images to WebDataset shards."""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from megatron_r1v2.config.command_line import command_parser
from megatron_r1v2.config.schema import DataConfig
from megatron_r1v2.types import AnswerType

if TYPE_CHECKING:
    from megatron_r1v2.data.row_forms import RowForm
    from megatron_r1v2.data.samples import ShardSample

_ERRORS_SHOWN = 20
"""On a terminal."""
_BAR = 40
_DESCRIPTION = """\
Turn rows and their images into WebDataset shards that training reads. docs/data.md says all that is understood.

Files are JSONL, JSON, CSV or parquet, or folders of them. Every row and every image is checked first; the output folder
appears only when all of it is written. The form of a row shows in its fields:

  our own     {"messages": [{"role": "user", "content": "<image>\\nleft + right?"}], "answer": "8",
               "answer_type": "numeric", "images": ["17.png"], "facts": {"left": "3", "right": "5"}}
              optional: key, response (supervised data), chosen, rejected, margin, source,
              alternatives, tolerances and metadata
  MMPR        {"question": "...", "chosen": "...", "rejected": "...", "image": "a.jpg"}
  verl        {"prompt": [{"role": "user", "content": "<image>..."}], "images": [{"path": "a.jpg"}],
               "reward_model": {"ground_truth": "8"}, "data_source": "..."}
  others      question, problem, query, prompt, messages or conversations (LLaVA, ms-swift, OpenAI); answer,
              answers, ground_truth or solution; image or images. Further columns become metadata.
"""
_EXAMPLE = """\
example:
  python -m megatron_r1v2 prepare questions.jsonl --images pictures --output data/train --check-only
  python -m megatron_r1v2 prepare table.csv --columns image=file --images pictures --output data/train \\
      --held-out 0.2=data/heldout
  python -m megatron_r1v2 prepare data/*.parquet --columns question=problem,answer=solution,image=img --output data/t
then set data.train: data/train in the recipe.
"""
_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_GSM8K = re.compile(r"\n####(.*)\Z")


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = command_parser("prepare", _DESCRIPTION, epilog=_EXAMPLE)
    parser.add_argument("input", type=Path, nargs="+", help="file of rows, or folder of one split; several are joined")
    parser.add_argument("--images", type=Path, default=Path(), help="folder that image paths are relative to (.)")
    parser.add_argument("--output", type=Path, help="folder to make; must not exist yet")
    parser.add_argument(
        "--held-out", default="", metavar="SHARE=FOLDER",
        help="write this share of the rows to another folder, for evaluation, such as 0.2=data/heldout; rows with the "
        "same images stay together, and the same ones are chosen every time",
    )  # fmt: skip
    parser.add_argument("--samples-per-shard", type=int, default=1000, help="samples in one tar file (1000)")
    parser.add_argument(
        "--answer-type",
        choices=get_args(AnswerType),
        default="math",
        help="how answers of rows that do not say it are compared (math); our own rows say it themselves",
    )
    parser.add_argument(
        "--columns", default="", metavar="ROLE=COLUMN,...",
        help="columns of other names; roles: question, answer, image, response, chosen, rejected, margin, source, key",
    )  # fmt: skip
    parser.add_argument("--ignore", default="", metavar="COLUMN,...", help="columns to leave out")
    parser.add_argument(
        "--prompt", default="", metavar="TEMPLATE",
        help="text of the question with columns in braces, such as '{question} Choices: {options}'; {{ is a brace",
    )  # fmt: skip
    parser.add_argument("--no-answer", action="store_true", help="accept rows that a reward of your own judges")
    parser.add_argument("--unclosed-think", action="store_true", help="accept pairs that never close their <think>")
    parser.add_argument(
        "--skip-bad", type=int, default=0, metavar="N", help="leave out up to N bad rows and list them (0)"
    )
    parser.add_argument("--check-only", action="store_true", help="check all rows, list what is wrong, write nothing")
    parser.add_argument(
        "--model", type=Path, metavar="FOLDER", help="count tokens with the tokenizer of this HF folder"
    )
    limits = DataConfig()
    for name, what in (("max_prompt_tokens", "rows above it are listed"), ("max_tiles", "tiles an image is cut into")):
        default = getattr(limits, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=default, help=f"for --model: {what} ({default})"
        )
    arguments = parser.parse_args(argv)
    if not arguments.check_only and arguments.output is None:
        parser.error("--output is needed unless --check-only is given")
    try:
        arguments.held_out = _held_out(arguments.held_out)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def _held_out(given: str) -> tuple[float, Path] | None:
    """Return the share and the folder of --held-out; None where it is not given."""
    if not given:
        return None
    share, _, folder = given.partition("=")
    try:
        part = float(share)
    except ValueError:
        part = 0.0
    if not 0 < part < 1 or not folder:
        raise ValueError(f"--held-out {given!r}: give a share between 0 and 1 and a folder, such as 0.2=data/heldout")
    return part, Path(folder)


def _row_form(arguments: argparse.Namespace) -> RowForm:
    from megatron_r1v2.data.row_forms import RowForm

    pairs = [item.partition("=") for item in arguments.columns.split(",") if item]
    if bad := [role for role, equals, column in pairs if not equals or not column]:
        raise ValueError(f"--columns {arguments.columns!r}: {bad[0]!r} names no column; write ROLE=COLUMN,ROLE=COLUMN")
    return RowForm(
        answer_type=arguments.answer_type,
        columns={role.strip(): column.strip() for role, _, column in pairs},
        ignored=frozenset(name.strip() for name in arguments.ignore.split(",") if name),
        template=arguments.prompt,
        no_answer=arguments.no_answer,
        unclosed_think=arguments.unclosed_think,
    )


def finish_answer(sample: ShardSample) -> ShardSample:
    r"""Take the answer out of a worked solution, and check that a response can equal it.

    `<answer>8</answer>`, the last `\boxed{8}` and GSM8K's `#### 8` are 8.

    Raises:
        SampleError: no response could, whatever it says.
    """
    from megatron_r1v2.data.samples import SampleError
    from megatron_r1v2.rewards.answer import describe_misfit, type_of_alternative

    if not sample.answer.strip() or sample.answer_type is None:
        return sample
    answers = [_final_answer(answer) for answer in (sample.answer, *sample.alternatives)]
    for index, answer in enumerate(answers):
        kind = sample.answer_type if index == 0 else type_of_alternative(answer, sample.answer_type)
        if misfit := describe_misfit(answer, kind):
            raise SampleError(f"answer {answer!r:.80} {misfit} (answer type {kind})")
    return replace(sample, answer=answers[0], alternatives=tuple(answers[1:]))


def _final_answer(text: str) -> str:
    from megatron_r1v2.rewards.answer import last_boxed

    if tags := _ANSWER_TAG.findall(text):
        text = tags[-1].strip()
    elif marked := _GSM8K.search(text.rstrip()):
        text = marked[1].strip()
    boxed = last_boxed(text)
    return text if boxed is None else boxed


class _TokenCounts:
    """The lengths of prompts and responses under a model's tokenizer."""

    def __init__(self, folder: Path, *, max_prompt_tokens: int, max_tiles: int) -> None:
        from megatron_r1v2.checkpoint.hf.config import read_hf_architecture
        from megatron_r1v2.data.prompts import PromptBuilder
        from megatron_r1v2.data.tokenizer import ChatTokenizer

        architecture, _ = read_hf_architecture(folder)
        self._tokenizer = ChatTokenizer(folder)
        self._builder = PromptBuilder(
            # Longer ones are to be counted, not refused.
            settings=DataConfig(max_prompt_tokens=sys.maxsize, max_tiles=max_tiles),
            tokenizer=self._tokenizer,
            tile_size=architecture.vision.image_size,
            tokens_per_tile=architecture.tokens_per_tile,
        )
        self._limit = max_prompt_tokens
        self._prompts: list[int] = []
        self._responses: list[int] = []
        self._too_long: list[str] = []

    def add(self, sample: ShardSample) -> None:
        """Count a sample.

        Raises:
            SampleError: its text has a control token, or a pair never closes the `<think>` of the template.
        """
        from megatron_r1v2.data.images import image_size
        from megatron_r1v2.data.samples import SampleError
        from megatron_r1v2.data.survey import never_closes_think

        for side in ("chosen", "rejected"):
            text = getattr(sample, side)
            if text is not None and not sample.unclosed_think and never_closes_think(text, self._tokenizer):
                raise SampleError(
                    f"{side} never closes the <think> that the chat template opens: {text[:60]!r}; take the row out, "
                    "or accept such responses with --unclosed-think"
                )

        sizes = [image_size(io.BytesIO(data), name) for name, data in sample.images.items()]
        length = self._builder.measure(sample.key, sample.messages, sizes)
        texts = [text for text in (sample.response, sample.chosen, sample.rejected) if text is not None]
        self._prompts.append(length.tokens)
        self._responses += [len(self._tokenizer.encode_text(text)) for text in texts]
        if length.tokens > self._limit:
            self._too_long.append(f"{sample.key}: {length.tokens} tokens ({length.tiles} tiles)")

    def print(self) -> None:
        """Print the histograms, and the prompts beyond the limit."""
        for title, lengths in (("prompts", self._prompts), ("responses", self._responses)):
            if lengths:
                print(f"tokens of {len(lengths)} {title}: {min(lengths)} to {max(lengths)}, {sum(lengths)} in all")
                print("\n".join(histogram(lengths)))
        if self._too_long:
            print(
                f"{len(self._too_long)} prompts have more than {self._limit} tokens; in training, data.too_long decides"
            )
            print("\n".join(f"  {line}" for line in self._too_long))


def histogram(lengths: Sequence[int]) -> list[str]:
    """Return a line for each power of two with a length in it, and a bar as long as its share."""
    counts = Counter(max(length - 1, 0).bit_length() for length in lengths)
    most = max(counts.values())
    return [
        f"  up to {2**bits:>7}  {counts[bits]:>7}  {'#' * -(-_BAR * counts[bits] // most)}".rstrip()
        for bits in range(min(counts), max(counts) + 1)
    ]


def _with_progress(samples: Iterator[ShardSample], paths: Sequence[Path], verb: str) -> Iterator[ShardSample]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from megatron_r1v2.data.row_files import count_rows, find_inputs

    counts = [count_rows(file) for file in find_inputs(paths)]
    total = None if None in counts else sum(count or 0 for count in counts)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield from progress.track(samples, total=total, description=verb)


def _prepare(arguments: argparse.Namespace, problems: list[str]) -> int:
    """Write the shards, or only check the rows; append what is wrong with rows, and return the number of good ones."""
    # Imported after the arguments are checked: energon and torch take seconds.
    from megatron_r1v2.data.rows import read_rows
    from megatron_r1v2.data.samples import SampleError
    from megatron_r1v2.data.shards import write_shards, write_split_shards

    tokens = None
    if arguments.model is not None:
        limits = {"max_prompt_tokens": arguments.max_prompt_tokens, "max_tiles": arguments.max_tiles}
        tokens = _TokenCounts(arguments.model, **limits)

    def finish(sample: ShardSample) -> ShardSample:
        sample = finish_answer(sample)
        if tokens is not None:
            tokens.add(sample)
        return sample

    def report(problem: str) -> None:
        if not arguments.check_only and len(problems) >= arguments.skip_bad:
            more = f" (after {len(problems)} that --skip-bad left out)" if problems else ""
            raise SampleError(problem + more)
        problems.append(problem)

    samples = read_rows(arguments.input, arguments.images, form=_row_form(arguments), finish=finish, report=report)
    samples = _with_progress(samples, arguments.input, "Checking" if arguments.check_only else "Writing")
    if arguments.check_only:
        count = sum(1 for _ in samples)
    elif arguments.held_out is not None:
        share, folder = arguments.held_out
        trained, held_out = write_split_shards(samples, arguments.output, folder, share, arguments.samples_per_shard)
        print(f"{held_out} of {trained + held_out} samples are held out in {folder}; set evaluation.data to it")
        count = trained + held_out
    else:
        count = write_shards(samples, arguments.output, arguments.samples_per_shard)
    if tokens is not None:
        tokens.print()
    return count


def main(argv: Sequence[str]) -> int:
    """Write the shards, or only check the rows.

    Returns:
        The exit status: 0, or 1 when the input has an error, which is printed.
    """
    arguments = _arguments(argv)
    problems: list[str] = []
    try:
        count = _prepare(arguments, problems)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        if not arguments.check_only:
            print("Nothing was written. --check-only lists all bad rows at once.", file=sys.stderr)
        return 1
    shown = _ERRORS_SHOWN if arguments.check_only and sys.stderr.isatty() else len(problems)
    for problem in problems[:shown]:
        print(f"{'error' if arguments.check_only else 'left out'}: {problem}", file=sys.stderr)
    if len(problems) > shown:
        print(f"... and {len(problems) - shown} more; with 2> FILE the file has them all", file=sys.stderr)
    print(f"{count} samples are fine" + (f", {len(problems)} are not" if problems else ""))
    if arguments.check_only:
        return 1 if problems else 0
    print(f"written to {arguments.output}; set data.train or data.validation to it")
    return 0
