"""The settings that an artifact on disk depends on: it is used with those only, and a difference can be named.

A fingerprint has named groups: sections of the settings, digests of contents, or single values. It is stored beside the
artifact; what was made by other settings is refused, or made anew, as its owner decides.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Change:
    """A setting with another value; None stands for one that a fingerprint lacks."""

    setting: str
    """With its groups: `generation.temperature`."""
    old: object
    new: object

    def __str__(self) -> str:
        return f"{self.setting}: {self.old!r} -> {self.new!r}"


@dataclass(frozen=True)
class Fingerprint:
    """Named groups of values, equal where their JSON is."""

    canonical: str
    """JSON with sorted keys."""

    @classmethod
    def of(cls, **groups: object) -> Fingerprint:
        """Make a fingerprint of values that JSON can hold, where a tuple is a list."""
        return cls(json.dumps(groups, sort_keys=True, separators=(",", ":")))

    @property
    def values(self) -> dict[str, object]:
        """Return the groups as JSON values for storage; `of(**values)` restores the fingerprint."""
        values: dict[str, object] = json.loads(self.canonical)
        return values

    @property
    def digest(self) -> str:
        """Return a SHA-256 in hexadecimal."""
        return hashlib.sha256(self.canonical.encode()).hexdigest()

    def changes_since(self, earlier: Fingerprint) -> list[Change]:
        """Return the settings that have changed since an earlier fingerprint, ordered by name."""
        old, new = _flat(earlier.values), _flat(self.values)
        changed = (Change(name, old.get(name), new.get(name)) for name in sorted({*old, *new}))
        return [change for change in changed if change.old != change.new]


def _flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return the values of nested mappings by dotted name; an empty mapping is a value too."""
    flat: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
