"""The one way in which a rehearsal puts its own functions in the place of others: in its own process, for good."""

from __future__ import annotations

from typing import Any


def original(owner: object, name: str) -> Any:
    """Return an attribute that is about to be replaced."""
    # Through a class, so that a static method or a property would show.
    return getattr(owner, name)


def replace(owner: object, name: str, value: object) -> None:
    """Replace an attribute of a module or a class.

    Raises:
        AttributeError: it has none of this name: what is replaced has moved.
    """
    original(owner, name)
    setattr(owner, name, value)
