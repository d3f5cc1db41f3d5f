"""The key-value store of the process groups, asked with a time limit: who has it may be stopped, and never answer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

Answer = TypeVar("Answer")


def default_store() -> Any:
    """Return the store that all ranks share."""
    return dist.distributed_c10d._get_default_store()


def ask(question: Callable[[Any], Answer]) -> Answer:
    """Return what the store answers; torch's own limit holds for keys that are waited for, not for a silent store.

    Args:
        question: given the store.

    Raises:
        RuntimeError: no answer came within the time limit of the process groups, or the store is gone.
    """
    store = default_store()
    answers: list[Answer] = []
    errors: list[Exception] = []

    def wait() -> None:
        try:
            answers.append(question(store))
        except (RuntimeError, ValueError) as error:
            errors.append(error)

    # A daemon: what is asked of a stopped process must not keep this one from ending.
    thread = threading.Thread(target=wait, name="store-question", daemon=True)
    thread.start()
    thread.join(store.timeout.total_seconds())
    if errors:
        raise errors[0]
    if not answers:
        raise RuntimeError(
            f"the store of the process groups has not answered for {store.timeout.total_seconds():.0f} s "
            "(parallel.timeout_minutes): the first rank, or the torchrun that started it, hangs or is out of reach"
        )
    return answers[0]
