"""YAML file and dotted overrides in, a checked `RunRecipe` out; each complaint is a ValueError saying what to do."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_r1v2.config.schema import RunRecipe
from megatron_r1v2.config.validate import check_ranges

BASE_KEY = "defaults"


def load_recipe(path: Path | str | None, overrides: Sequence[str] = ()) -> RunRecipe:
    """Read a recipe, apply the overrides, and check each setting by itself and against the others.

    A recipe may start from another one: `defaults: other.yaml`, relative to its own folder.

    Args:
        path: the YAML file; None: the defaults alone.
        overrides: `section.key=value`; the value of a text setting is taken as it stands, any other is read as YAML.

    Returns:
        The settings, with defaults for all that is not mentioned.

    Raises:
        ValueError: an unreadable file, an unknown setting, a wrong type, an impossible value or combination.
    """
    merged = OmegaConf.structured(RunRecipe)
    for file, values in _read_files(Path(path)) if path is not None else ():
        merged = _merge(merged, values, source=str(file))
    for override in overrides:
        merged = _merge(merged, _parse_override(override), source=f"override {override!r}")
    try:
        recipe = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(f"{path or 'settings'}: {_first_line(error)}") from error
    assert isinstance(recipe, RunRecipe)
    check_ranges(recipe)
    return recipe


def recipe_yaml(recipe: RunRecipe) -> str:
    """Return every setting of a recipe as YAML that `load_recipe` reads."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def settings_of(section: type) -> dict[str, Any]:
    """Return the resolved type of each setting of a configuration class, by name."""
    hints = typing.get_type_hints(section)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


def type_name(expected: Any) -> str:
    """Return what is accepted for a type, in words: "a number", "one of local, te", ..."""
    origin = typing.get_origin(expected)
    if origin is list:
        return f"a list, each {type_name(typing.get_args(expected)[0])}"
    if origin is dict:
        return "a mapping"
    if isinstance(expected, type) and issubclass(expected, Enum):
        return "one of " + ", ".join(member.name for member in expected)
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[expected]


def _read_files(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return a recipe and those it starts from, the furthest base first."""
    chain: list[tuple[Path, dict[str, Any]]] = []
    current: Path | None = path
    while current is not None:
        if any(current.resolve() == seen.resolve() for seen, _ in chain):
            raise ValueError(f"{current}: `{BASE_KEY}` leads back to this file; remove it from one of the recipes")
        values = _read_yaml(current)
        base = values.pop(BASE_KEY, None)
        if base is not None and not isinstance(base, str):
            raise ValueError(f"{current}: {BASE_KEY}={base!r} must be the path of one recipe")
        chain.insert(0, (current, values))
        current = current.parent / base if base else None
    return chain


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"recipe {str(path)!r} is not a file; give the path of a YAML recipe, see examples/")
    try:
        loaded = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ValueError(f"{path} must map section names to settings, got a list; sections: {_names(RunRecipe)}")
    values = OmegaConf.to_container(loaded)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _parse_override(override: str) -> dict[str, Any]:
    name, equals, text = override.partition("=")
    parts = name.split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise ValueError(f"override {override!r} is not understood; write section.key=value, e.g. train.steps=200")
    value: Any = text
    if _type_of(parts) is not str:
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"override {override!r}: the value is not valid YAML: {error}") from error
    for part in reversed(parts):
        value = {part: value}
    return value


def _type_of(parts: Sequence[str]) -> Any:
    """Return the type of the setting that a dotted name leads to, or None where there is no such setting."""
    current: Any = RunRecipe
    for part in parts:
        is_section = isinstance(current, type) and dataclasses.is_dataclass(current)
        current = settings_of(current).get(part) if is_section else None
    return current


def _merge(config: Any, values: Mapping[str, Any], *, source: str) -> Any:
    for name, value in _walk(RunRecipe, values, "", source):
        try:
            OmegaConf.update(config, name, value, merge=isinstance(value, dict))
        except OmegaConfBaseException as error:
            raise ValueError(
                f"{source}: {name}={value!r} is not accepted; expected {type_name(_type_of(name.split('.')))}"
                f" ({_first_line(error)})"
            ) from error
    return config


def _walk(section: type, values: Any, prefix: str, source: str) -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of every setting below a section, refusing names that the schema does not have."""
    if not isinstance(values, dict):
        raise ValueError(
            f"{source}: {prefix[:-1]}={values!r} is a section; it needs settings below it: {_names(section)}"
        )
    settings = settings_of(section)
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in settings:
            raise ValueError(f"{source}: unknown setting {name!r}{_suggestion(str(key), section)}")
        if dataclasses.is_dataclass(settings[key]):
            yield from _walk(settings[key], value, f"{name}.", source)
        else:
            _check_literal(name, value, settings[key], source)
            yield name, value


def _check_literal(name: str, value: Any, expected: Any, source: str) -> None:
    """Refuse what OmegaConf would quietly convert: true as a number, nothing as the text "None"."""
    if value is None or (isinstance(value, bool) and expected in (int, float, str)):
        got = "nothing" if value is None else str(value).lower()
        raise ValueError(f"{source}: {name} is {got}; expected {type_name(expected)}; remove the line for the default")


def _suggestion(key: str, section: type) -> str:
    close = difflib.get_close_matches(key, settings_of(section), n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    elsewhere = [
        f"{name}.{key}"
        for name, kind in settings_of(RunRecipe).items()
        if section is RunRecipe and key in settings_of(kind)
    ]
    return f"; did you mean {elsewhere[0]!r}?" if elsewhere else f"; accepted: {_names(section)}"


def _names(section: type) -> str:
    return ", ".join(settings_of(section))


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
