"""The recipe's own rows: the length of each against the limits, and a data set of the longest ones."""

from __future__ import annotations

import heapq
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as changed
from pathlib import Path

from megatron_r1v2.config.choices import StageName, TooLong
from megatron_r1v2.config.schema import DataConfig
from megatron_r1v2.data.packing import nemo_mistake
from megatron_r1v2.data.prompts import PromptBuilder, PromptTooLong
from megatron_r1v2.data.samples import SampleError, ShardSample, parse_sample
from megatron_r1v2.data.shards import check_shards, write_shards
from megatron_r1v2.data.survey import (
    GIVEN_FIELDS,
    GivenResponses,
    has_unclosed_think,
    sample_heads,
    unclosed_mistake,
)
from megatron_r1v2.rehearsal.rows import ANSWER, LONG, MARGIN
from megatron_r1v2.types import DataEndsRunError

_NAMED = 5
"""Of the rows of a data set that are too long."""
PAIR_STAGES = (StageName.mpo, StageName.reward_model)


@dataclass(frozen=True, order=True)
class RowLength:
    """The length of one row."""

    tokens: int
    """Of the prompt and its longest response."""
    prompt: int
    shard: str
    key: str
    responses: tuple[int, ...] = ()

    @property
    def place(self) -> str:
        """Return the row's place in the data set."""
        return f"{self.shard}: {self.key}"


@dataclass
class DataLengths:
    """The lengths of a data set."""

    folder: str
    rows: int = 0
    longest_prompt: RowLength | None = None
    longest: list[RowLength] = field(default_factory=list)
    """The longest rows, the longest first."""
    left_out: list[str] = field(default_factory=list)
    """A sentence for each prompt above the limit that data.too_long=skip leaves out."""
    mistakes: list[str] = field(default_factory=list)
    """An error for each row that would end the run: its prompt is above the limit, or the row past the positions."""
    unclosed: list[str] = field(default_factory=list)
    """The keys of pairs that would end the run, since a response never closes its `<think>`."""

    def sentences(self, settings: DataConfig) -> list[str]:
        """Return the findings in words."""
        if self.longest_prompt is None or not self.longest:
            return [f"{self.folder}: none of {self.rows} rows can be trained on", *self.left_out[:1]]
        prompt, row = self.longest_prompt, self.longest[0]
        found = [
            f"{self.folder}: {self.rows} rows; the longest prompt has {prompt.prompt} of "
            f"{settings.max_prompt_tokens} tokens ({prompt.place}), the longest row {row.tokens} ({row.place})"
        ]
        if self.left_out:
            found.append(f"{self.folder}: {len(self.left_out)} rows are too long and are left out: {self.left_out[0]}")
        return found


def check_lengths(measured: Iterable[DataLengths]) -> None:
    """Refuse data sets with rows that would end the run.

    Raises:
        DataEndsRunError: the first such rows of each data set, and how many there are.
    """
    told: list[str] = []
    for lengths in measured:
        if count := len(lengths.mistakes):
            told.append(f"{lengths.folder}: {count} of {lengths.rows} rows are too long and would end the run")
            told += [f"  {mistake}" for mistake in lengths.mistakes[:_NAMED]]
            told += [f"  ... and {count - _NAMED} more"] * (count > _NAMED)
        told += [unclosed_mistake(lengths.unclosed, lengths.folder)] * bool(lengths.unclosed)
    if told:
        raise DataEndsRunError("\n".join(told))


@dataclass(frozen=True)
class NemoRows:
    """The rows of `train.packing=nemo`, which ends a run by a sequence that is longer than a row."""

    capacity: int
    """Tokens of a row."""
    length_multiple: int
    pads: int
    """Tokens behind each response."""

    def mistake(self, prompt: int, responses: Iterable[int]) -> str | None:
        """Return an error for responses that stay together, each behind its prompt; None: they fit into a row."""
        lengths = (prompt + response + self.pads for response in responses)
        padded = sum(-(-length // self.length_multiple) * self.length_multiple for length in lengths)
        return nemo_mistake(padded, self.capacity)


@dataclass(frozen=True)
class OwnRows:
    """The data sets of a recipe, read for one model."""

    stage: StageName
    builder: PromptBuilder
    settings: DataConfig
    end_token: str
    max_positions: int
    max_response_tokens: int
    needs_image: bool
    """Whether a row without images has no gradient, so that it is in no step."""
    nemo: NemoRows | None = None
    """None: rows of any length are packed."""

    def measure(self, folder: str, count: int, *, given: bool = True) -> DataLengths:
        """Measure every row of a data set.

        Args:
            count: of the longest rows, to be kept.
            given: whether the stage trains on the responses in the rows.

        Raises:
            ValueError: the data set is missing or incomplete.
        """
        found = DataLengths(folder)
        heap: list[RowLength] = []
        for shard in sorted(check_shards(folder)):
            for sample, sizes in sample_heads(Path(folder) / shard):
                found.rows += 1
                if given and self.stage in PAIR_STAGES and has_unclosed_think(sample, self.builder.tokenizer):
                    found.unclosed.append(sample.key)
                try:
                    length = self._measure(shard, sample, sizes, given=given)
                except PromptTooLong as error:
                    skips = self.settings.too_long is TooLong.skip
                    (found.left_out if skips else found.mistakes).append(f"{shard}: {error}")
                    continue
                except SampleError:
                    continue  # counted where it is read for training
                if length.tokens > self.max_positions:
                    found.mistakes.append(
                        f"{length.place}: prompt and response have {length.tokens} tokens, the model has "
                        f"{self.max_positions} positions; take the row out, or shorten its response"
                    )
                    continue
                trains = given and (sizes or not self.needs_image)
                if trains and self.nemo and (mistake := self.nemo.mistake(length.prompt, length.responses)):
                    found.mistakes.append(f"{length.place}: {mistake}")
                    continue
                if found.longest_prompt is None or length.prompt > found.longest_prompt.prompt:
                    found.longest_prompt = length
                if trains or not given:
                    (heapq.heappush if len(heap) < count else heapq.heappushpop)(heap, length)
        found.longest = sorted(heap, reverse=True)
        return found

    def _measure(self, shard: str, sample: ShardSample, sizes: list[tuple[int, int]], *, given: bool) -> RowLength:
        prompt = self.builder.measure(sample.key, sample.messages, sizes).tokens
        responses = [self.max_response_tokens]
        if given and self.stage in GIVEN_FIELDS:
            in_rows = GivenResponses(GIVEN_FIELDS[self.stage], self.end_token, self.max_positions)
            responses = in_rows.lengths(sample, self.builder.tokenizer)
        return RowLength(prompt + max(responses, default=0), prompt, shard, sample.key, tuple(responses))

    def write(self, measured: Sequence[DataLengths], folder: Path, *, rows: int, steps: int = 1) -> None:
        """Write a data set of the longest rows, one step after the other; where there are too few, they come again.

        Args:
            measured: the data sets of a mixture, or one.

        Raises:
            ValueError: no row fits.
        """
        found = [(row, Path(lengths.folder)) for lengths in measured for row in lengths.longest]
        if not found:
            raise ValueError("; ".join(each for lengths in measured for each in lengths.sentences(self.settings)))
        longest = sorted(found, reverse=True)[: rows * steps]
        samples = [read_sample(source / row.shard, row.key) for row, source in longest]
        write_shards(self._renamed(samples, rows, steps), folder)

    def _renamed(self, samples: list[ShardSample], rows: int, steps: int) -> Iterator[ShardSample]:
        for step in range(steps):
            for index in range(rows):
                sample = changed(samples[(step * rows + index) % len(samples)], key=f"{LONG}-{step}-{index}")
                # Above every preference.min_margin; the scripted responses of a stage that samples give this answer.
                yield changed(
                    sample, margin=MARGIN, answer=ANSWER, answer_type="numeric", alternatives=(), tolerances=()
                )


def read_sample(shard: Path, key: str) -> ShardSample:
    """Read one sample of a shard with its images."""
    with tarfile.open(shard) as tar:
        parts = {}
        for member in tar:
            name, _, part = member.name.partition(".")
            if name == key and (file := tar.extractfile(member)) is not None:
                parts[part] = file.read()
    return parse_sample(key, parts)
