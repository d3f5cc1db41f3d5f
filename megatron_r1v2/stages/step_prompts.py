"""The prompts of a step: of the endless stream, or of one pass over a data set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from megatron_r1v2.data.samples import DataError
from megatron_r1v2.data.stream import PromptStream
from megatron_r1v2.types import Prompt


def in_groups(prompts: Iterable[Prompt], size: int) -> Iterator[list[Prompt]]:
    """Yield the prompts of one pass, so many at a time; the last group may be smaller."""
    source = iter(prompts)
    while group := list(islice(source, size)):
        yield group


def next_distinct(stream: PromptStream, count: int, *, besides: Sequence[Prompt] = ()) -> list[Prompt]:
    """Read prompts with distinct keys: at the border of two epochs one may come twice, and would be one group.

    Args:
        stream: endless.
        besides: prompts that the step has already.

    Raises:
        DataError: the data set has fewer.
    """
    taken = {prompt.key for prompt in besides}
    found: dict[str, Prompt] = {}
    # A few rounds, not an endless loop: a data set may have fewer distinct prompts than are wanted.
    for _ in range(20):
        for prompt in stream.next(count - len(found)):
            if prompt.key not in taken:
                found.setdefault(prompt.key, prompt)
        if len(found) == count:
            return list(found.values())
    further = f" beside the {len(taken)} of earlier rounds (algorithm.dynamic_sampling_rounds)" if taken else ""
    raise DataError(
        f"data.train has only {len(found)} distinct prompts{further} but train.prompts_per_step={count}; "
        "lower train.prompts_per_step or give more data"
    )
