"""The prompts of a step: of the endless stream, or of one pass over a data set."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from itertools import islice

from megatron_r1v2.config.schema import DataConfig
from megatron_r1v2.data.mixture import MixtureStream, check_shares, num_train_samples
from megatron_r1v2.data.read_ahead import ReadAhead
from megatron_r1v2.data.samples import DataError
from megatron_r1v2.data.stream import PromptStream
from megatron_r1v2.types import Prompt


class TooFewPrompts(DataError):
    """Raised where a data set has fewer distinct prompts than a step takes."""


def in_groups(prompts: Iterable[Prompt], size: int) -> Iterator[list[Prompt]]:
    """Yield the prompts of one pass, so many at a time; the last group may be smaller."""
    source = iter(prompts)
    while group := list(islice(source, size)):
        yield group


def next_distinct(
    stream: PromptStream | MixtureStream | ReadAhead, count: int, *, besides: Collection[str] = ()
) -> list[Prompt]:
    """Read prompts with distinct keys: at the border of two epochs one may come twice, and would be one group.

    Args:
        stream: endless.
        besides: keys of the prompts that the step has already.

    Raises:
        TooFewPrompts: the data set has fewer.
    """
    taken = set(besides)
    found: dict[str, Prompt] = {}
    # A few rounds, not an endless loop: a data set may have fewer distinct prompts than are wanted.
    for _ in range(20):
        for prompt in stream.next(count - len(found)):
            if prompt.key not in taken:
                found.setdefault(prompt.key, prompt)
        if len(found) == count:
            return list(found.values())
    raise too_few_prompts(len(found), count, besides=len(taken))


def check_enough_samples(settings: DataConfig, count: int, *, left_out: int) -> None:
    """Refuse a data.train with fewer samples than a step takes.

    Args:
        left_out: samples that data.too_long=skip leaves out.

    Raises:
        ValueError: it names the numbers.
    """
    check_shares(settings, count)
    usable = num_train_samples(settings) - left_out
    if usable < count:
        raise too_few_prompts(usable, count)


def too_few_prompts(found: int, count: int, *, besides: int = 0) -> TooFewPrompts:
    """Return the error of a data set that has fewer distinct prompts than a step takes."""
    further = (
        f" beside the {besides} of earlier rounds (algorithm.dynamic_sampling_rounds) or steps "
        "(generation.segment_tokens)"
        if besides
        else ""
    )
    return TooFewPrompts(
        f"data.train has only {found} distinct prompts{further} but train.prompts_per_step={count}; "
        "lower train.prompts_per_step or give more data"
    )
