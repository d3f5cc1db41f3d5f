"""A look at a data set before the first step: what is too long, unanswered, or has `<think>` twice or never closed.

The texts and the heads of the images are read; no pixel is decoded.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import tarfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from megatron_r1v2.config.choices import StageName, TooLong
from megatron_r1v2.config.schema import DataConfig
from megatron_r1v2.data.images import image_size, tile_limit
from megatron_r1v2.data.prompts import PromptBuilder, PromptTooLong
from megatron_r1v2.data.samples import THINK, THINK_END, SampleError, ShardSample, parse_sample
from megatron_r1v2.data.shards import check_shards
from megatron_r1v2.data.tokenizer import ChatTokenizer

GIVEN_FIELDS = {
    StageName.align: ("response",),
    StageName.mpo: ("chosen", "rejected"),
    StageName.reward_model: ("chosen", "rejected"),
}
"""The fields with the responses of a row, for the stages that train on given ones."""
_NAMED = 20


@dataclass(frozen=True)
class GivenResponses:
    """The responses that a stage reads from the rows, and the positions that they share with their prompts."""

    fields: tuple[str, ...]
    end_token: str
    max_positions: int
    """Of the model: prompt and response together."""

    def lengths(self, sample: ShardSample, tokenizer: ChatTokenizer) -> list[int]:
        """Return the tokens of each response of a row, its end token counted.

        Raises:
            SampleError: a response contains a control token.
        """
        texts = [text for name in self.fields if (text := getattr(sample, name)) is not None]
        return [len(tokenizer.encode_response(text, self.end_token, key=sample.key)) for text in texts]

    def longest(self, sample: ShardSample, tokenizer: ChatTokenizer) -> int:
        """Return the tokens of the longest response of a row; 0 where there is none.

        Raises:
            SampleError: a response contains a control token.
        """
        return max(self.lengths(sample, tokenizer), default=0)

    def mistake(self, key: str, prompt: int, response: int) -> str | None:
        """Return an error for a row with more tokens than the model has positions, None for one that fits."""
        if prompt + response <= self.max_positions:
            return None
        return (
            f"sample {key!r}: prompt and response have {prompt} + {response} = {prompt + response} tokens, but the "
            f"model has {self.max_positions} positions (max_position_embeddings); shorten the response, or take the "
            "row out"
        )


@dataclass(frozen=True)
class DataSurvey:
    """The findings about a data set before a run, by the keys of samples."""

    too_long: Mapping[str, str] = field(default_factory=dict)
    """Prompts that cannot be made to fit into `data.max_prompt_tokens`, with an error for each."""
    past_positions: Mapping[str, str] = field(default_factory=dict)
    """Rows whose prompt and given response have more tokens than the model has positions, with an error for each."""
    reduced: tuple[str, ...] = ()
    """Prompts that fit with fewer tiles."""
    second_think: tuple[str, ...] = ()
    """Samples with a response that begins with the `<think>` of the chat template."""
    unclosed: tuple[str, ...] = ()
    """Pairs with a response that never closes its `<think>`, and that nobody asked for."""
    unanswered: tuple[str, ...] = ()
    """Samples without an answer."""
    shards: Mapping[str, str] = field(default_factory=dict)
    """A digest of the rows of each shard: their files by name and size, and their JSON."""

    @property
    def digest(self) -> str:
        """Return a digest of all rows, which does not depend on the folder they are in."""
        return hashlib.sha256(json.dumps(self.shards, sort_keys=True).encode()).hexdigest()

    def __add__(self, other: DataSurvey) -> DataSurvey:
        return DataSurvey(
            {**self.too_long, **other.too_long},
            {**self.past_positions, **other.past_positions},
            self.reduced + other.reduced,
            self.second_think + other.second_think,
            self.unclosed + other.unclosed,
            self.unanswered + other.unanswered,
            {**self.shards, **other.shards},
        )

    def with_prefix(self, prefix: str) -> DataSurvey:
        """Return the same findings about keys with a prefix."""
        lists = (self.reduced, self.second_think, self.unclosed, self.unanswered)
        mappings = (self.too_long, self.past_positions, self.shards)
        reduced, twice, unclosed, unanswered = (tuple(f"{prefix}{key}" for key in keys) for keys in lists)
        too_long, past, shards = ({f"{prefix}{key}": value for key, value in each.items()} for each in mappings)
        return DataSurvey(too_long, past, reduced, twice, unclosed, unanswered, shards)

    def sentences(self, folder: str, settings: DataConfig, *, pairs: bool = False) -> list[str]:
        """Return what there is to say.

        Args:
            pairs: whether the stage trains on pairs.

        Raises:
            ValueError: there are prompts that cannot be made to fit, and data.too_long does not skip them; or rows
                that are longer than the model has positions; or unclosed pairs.
        """
        if self.unclosed and pairs:
            raise ValueError(unclosed_mistake(self.unclosed, folder))
        if self.too_long and settings.too_long is not TooLong.skip:
            more = f". {len(self.too_long)} prompts of {folder} are too long: {_listed(self.too_long)}"
            raise ValueError(next(iter(self.too_long.values())) + more)
        if self.past_positions:
            more = f". {len(self.past_positions)} rows of {folder} are too long: {_listed(self.past_positions)}"
            raise ValueError(next(iter(self.past_positions.values())) + more)
        kinds = {"left out": tuple(self.too_long), "cut into fewer tiles": self.reduced}
        twice = (
            f"responses of {len(self.second_think)} samples of {folder} begin with {THINK}, which the chat template "
            f"gives already; it is taken off: {_listed(self.second_think)}"
        )
        return [twice] * bool(self.second_think) + [
            f"{len(keys)} prompts of {folder} are longer than data.max_prompt_tokens={settings.max_prompt_tokens} and "
            f"are {verb}: {_listed(keys)}"
            for verb, keys in kinds.items()
            if keys
        ]


def survey_data(
    folder: str | Path,
    builder: PromptBuilder,
    settings: DataConfig,
    *,
    given: GivenResponses | None = None,
    part: int = 0,
    parts: int = 1,
) -> DataSurvey:
    """Look at the samples of a data set; a corrupt one is left to the reader.

    Args:
        given: the responses that the stage trains on; None: it samples its own.
        part: of the shards: every `parts`-th from here.

    Raises:
        ValueError: the data set is incomplete, or a shard cannot be read.
    """
    too_long, past, reduced, twice, unclosed, unanswered, shards = {}, {}, [], [], [], [], {}
    tokenizer = builder.tokenizer
    for name in sorted(check_shards(folder))[part::parts]:
        digest = hashlib.sha256()
        for sample, sizes in sample_heads(Path(folder) / name, digest.update):
            pair = [text for text in (sample.chosen, sample.rejected) if text is not None]
            if any(tokenizer.without_second_think(text) != text for text in (*pair, sample.response or "")):
                twice.append(sample.key)
            if has_unclosed_think(sample, tokenizer):
                unclosed.append(sample.key)
            if not sample.answer.strip():
                unanswered.append(sample.key)
            try:
                length = builder.measure(sample.key, sample.messages, sizes)
                response = given.longest(sample, tokenizer) if given else 0
            except PromptTooLong as error:
                too_long[sample.key] = str(error)
            except SampleError:
                continue
            else:
                if length.max_tiles < tile_limit(settings.max_tiles, max(1, len(sizes))):
                    reduced.append(sample.key)
                if given and (mistake := given.mistake(sample.key, length.tokens, response)):
                    past[sample.key] = mistake
        shards[name] = digest.hexdigest()
    return DataSurvey(too_long, past, tuple(reduced), tuple(twice), tuple(unclosed), tuple(unanswered), shards)


def unclosed_mistake(keys: Collection[str], folder: str) -> str:
    """Return an error for pairs with a response that never closes its `<think>`."""
    return (
        f"{len(keys)} pairs of {folder} have a response that never closes its {THINK} by {THINK_END}: "
        f"{_listed(keys)}; take them out, or make the shards again with r1v2 prepare --unclosed-think "
        "to train on them"
    )


def has_unclosed_think(sample: ShardSample, tokenizer: ChatTokenizer) -> bool:
    """Return whether a response of a pair never closes its `<think>`, and nobody asked for that."""
    pair = [text for text in (sample.chosen, sample.rejected) if text is not None]
    return not sample.unclosed_think and any(never_closes_think(text, tokenizer) for text in pair)


def never_closes_think(response: str, tokenizer: ChatTokenizer) -> bool:
    """Return whether a response, or the template before it, opens `<think>` and nothing closes it."""
    return (tokenizer.opens_think or THINK in response) and THINK_END not in response


def sample_heads(
    shard: Path, note: Callable[[bytes], None] = lambda _: None
) -> Iterator[tuple[ShardSample, list[tuple[int, int]]]]:
    """Yield each sample that is not corrupt, without the bytes of its images, and their sizes.

    Args:
        note: called with what tells a sample from another, of the corrupt ones too.
    """
    try:
        with tarfile.open(shard) as tar:
            files: dict[str, dict[str, tarfile.TarInfo]] = defaultdict(dict)
            for member in tar:
                key, _, name = member.name.partition(".")
                files[key][name] = member
            for key, members in files.items():
                note(json.dumps([key, {name: member.size for name, member in members.items()}]).encode())
                try:
                    parts = dict.fromkeys(members, b"")
                    if "json" in members:
                        parts["json"] = _open(tar, members["json"]).read()
                        note(parts["json"])
                    sample = parse_sample(key, parts)
                    sizes = [image_size(_open(tar, members[name]), f"{key}.{name}") for name in sample.images]
                except SampleError:
                    continue  # counted where it is read for training
                yield sample, sizes
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{shard} cannot be read ({error}); copy the data set again") from error


def _open(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    file = tar.extractfile(member)
    if file is None:
        raise SampleError(f"{member.name} is no file")
    return file


def _listed(keys: Collection[str]) -> str:
    first = ", ".join(itertools.islice(keys, _NAMED))
    return f"{first}, ..." if len(keys) > _NAMED else first
