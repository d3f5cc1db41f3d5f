"""A stream whose next prompts are read and tiled in a thread, while a generation phase needs none."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event

from megatron_r1v2.data.mixture import MixtureStream
from megatron_r1v2.data.stream import MixtureState, PromptStream, StreamState
from megatron_r1v2.types import Prompt


@dataclass
class _Ahead:
    """The prompts that were read but not given out."""

    before: StreamState | MixtureState
    """The position of the stream before them."""
    samples_read: int
    corrupt: int
    left_out: int
    """The counts of the stream before them."""
    stop: Event = field(default_factory=Event)
    prompts: Future[list[Prompt]] = field(default_factory=Future)


class ReadAhead:
    """A stream of prompts that can read ahead; its position and its counts are those of what it has given out."""

    def __init__(self, stream: PromptStream | MixtureStream) -> None:
        self._stream = stream
        self._ahead: _Ahead | None = None

    @property
    def num_distinct(self) -> int:
        """Return the number of distinct prompts, in the shares of a mixture."""
        return self._stream.num_distinct

    @property
    def samples_read(self) -> int:
        """Return the number of samples read since the start of training, corrupt ones included."""
        return (self._ahead or self._stream).samples_read

    @property
    def corrupt(self) -> int:
        """Return the number of corrupt samples among them."""
        return (self._ahead or self._stream).corrupt

    @property
    def left_out(self) -> int:
        """Return the number of samples left out as too long."""
        return (self._ahead or self._stream).left_out

    def next(self, count: int) -> list[Prompt]:
        """Return the next prompts; see `PromptStream.next` for what is raised."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return self._stream.next(count)
        # An error is met again, and raised here, where the prompts are asked for.
        if ahead.prompts.exception() is None and len(prompts := ahead.prompts.result()) <= count:
            return prompts + self._stream.next(count - len(prompts))
        self._stream.load_state_dict(ahead.before)
        return self._stream.next(count)

    @contextmanager
    def reading(self, count: int) -> Iterator[None]:
        """Read the next `count` prompts in a thread while the block runs, which must not use the data set itself.

        An error in the block ends the reading after the sample at hand.
        """
        if self._ahead is not None or not count:
            yield
            return
        stream = self._stream
        ahead = self._ahead = _Ahead(stream.state_dict(), stream.samples_read, stream.corrupt, stream.left_out)
        # Nothing goes on after the block: energon knows one active loader in a process.
        with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
            ahead.prompts = pool.submit(self._read, count, ahead.stop)
            try:
                yield
            except BaseException:
                ahead.stop.set()
                raise

    def state_dict(self) -> StreamState | MixtureState:
        """Return the position behind what was given out."""
        return self._stream.state_dict() if self._ahead is None else self._ahead.before

    def load_state_dict(self, state: StreamState | MixtureState) -> str | None:
        """Continue at a position; see `PromptStream.load_state_dict`."""
        self._ahead = None
        return self._stream.load_state_dict(state)

    def _read(self, count: int, stop: Event) -> list[Prompt]:
        prompts: list[Prompt] = []
        while len(prompts) < count and not stop.is_set():
            prompts += self._stream.next(1)
        return prompts
