"""YAML as recipes are written in it: 1e-6 is a number, a date is text, and no key comes twice."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import TypeGuard

import yaml

# PyYAML wants a dot in a number with an exponent, and makes objects of dates, which no setting takes.
_FLOAT = "tag:yaml.org,2002:float"
_REPLACED = (_FLOAT, "tag:yaml.org,2002:timestamp")
_NUMBER = re.compile(
    r"^(?:[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_RESOLVERS = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        keys: list[object] = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            # PyYAML keeps the last of two equal keys without a word.
            if key in keys:
                raise yaml.constructor.ConstructorError(None, None, f"found duplicate key {key!r}", key_node.start_mark)
            keys.append(key)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    pass


# The dumper has the same rules: it puts into quotes what the loader would not read back as text.
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = dict(_RESOLVERS)
    _class.add_implicit_resolver(_FLOAT, _NUMBER, list("-+.0123456789"))


def parse_yaml(text: str) -> object:
    """Return what a text means.

    Raises:
        ValueError: it is not valid YAML.
    """
    try:
        value: object = yaml.load(text, Loader=_Loader)
    # PyYAML calls itself once a level of nesting.
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from error
    return value


def read_yaml_mapping(path: Path, *, what: str) -> dict[str, object]:
    """Read a file that maps names to values; an empty one is an empty mapping.

    Args:
        what: "names to values", in the words of the error.

    Raises:
        ValueError: it is not there, not valid YAML, or not a mapping.
    """
    if not path.is_file():
        raise ValueError(f"recipe {str(path)!r} is not a file; give the path of a YAML recipe, see examples/")
    try:
        loaded = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if loaded is None:
        return {}
    if not is_mapping(loaded):
        raise ValueError(f"{path} must map {what}, got {'a list' if isinstance(loaded, list) else repr(loaded)[:200]}")
    return {str(key): value for key, value in loaded.items()}


def to_yaml(values: dict[str, object]) -> str:
    """Return values as a text that `parse_yaml` reads back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def is_mapping(value: object) -> TypeGuard[dict[object, object]]:
    """Return whether a value is a mapping."""
    return isinstance(value, dict)
