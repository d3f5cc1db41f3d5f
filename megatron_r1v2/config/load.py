"""YAML files and dotted overrides in, a checked recipe out; all that is wrong is said at once, as one ValueError."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from megatron_r1v2.config.choices import StageName
from megatron_r1v2.config.recipes import STAGES, PairsRecipe, Recipe, TrainingRecipe, every_section, stages_that_read
from megatron_r1v2.config.schema import Section
from megatron_r1v2.config.wording import refusal, shorten, type_name
from megatron_r1v2.config.yaml_files import is_mapping, parse_yaml, read_yaml_mapping, to_yaml

BASE_KEY = "defaults"
SCHEMA_KEY = "schema"
SCHEMA = 2
"""Of the settings, in recipes that are saved; raised with each line of `RENAMES`."""
RENAMES: Mapping[int, Mapping[str, str]] = {2: {"algorithm.gate_tokens": "", "buffer.priority_exponent": ""}}
"""By the schema that changed them: section.key of the schema before -> section.key, or "" where it is gone."""

Values = dict[str, dict[str, object]]
"""Section -> key -> value."""
AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def load_recipe(
    path: Path | str, overrides: Sequence[str] = (), *, saved: bool = False
) -> TrainingRecipe | PairsRecipe:
    """Read the recipe of the stage that its `run.stage` names.

    A recipe may start from another one, of any stage: `defaults: other.yaml`, relative to its own folder. Sections of
    that one which this stage does not read are left out.

    Args:
        overrides: `section.key=value`; the value of a text setting is taken as it stands, any other is read as YAML.
        saved: the file holds what `recipe_yaml` gave.

    Returns:
        The settings, with defaults for all that is not mentioned.

    Raises:
        ValueError: an unreadable file, and each unknown setting, section that the stage does not read, value that is
            not accepted, and combination that is impossible.
    """
    draft = _Draft.read(path, overrides, saved=saved)
    return draft.build(STAGES[draft.stage()])


def load_recipe_as(
    kind: type[AnyRecipe], path: Path | str | None, overrides: Sequence[str] = (), *, saved: bool = False
) -> AnyRecipe:
    """Read a recipe for a stage, or take what a command needs from the recipe of any stage.

    Args:
        kind: of a stage, which `run.stage` must name then; or of a command that takes the recipe of any.
        path: the YAML file; None, for a command alone: the defaults.
        overrides: see `load_recipe`; for a command they may also be those of the recipe's own stage.
        saved: the file holds what `recipe_yaml` gave.

    Raises:
        ValueError: see `load_recipe`; or the recipe is that of another stage.
    """
    draft = _Draft.read(path, overrides, saved=saved)
    stage = draft.stage() if path is not None else kind.stage
    if kind.stage and stage and stage is not kind.stage:
        raise ValueError(
            f"{path} is a recipe of the {stage.value} stage (run.stage), not of {kind.stage.value}; run python -m "
            f"megatron_r1v2 {stage.value.replace('_', '-')}, or give another recipe"
        )
    if kind.stage is None and stage is not None:
        # Once as what it is, so that nothing in it is passed over unchecked.
        draft.build(STAGES[stage], also=kind)
        return draft.build(kind, also=STAGES[stage])
    return draft.build(kind)


def recipe_yaml(recipe: Recipe) -> str:
    """Return every setting of a recipe, with the schema of the settings, as YAML that `load_recipe` reads."""
    values = recipe.model_dump(mode="json")
    if recipe.stage:
        values["run"]["stage"] = recipe.stage.value
    return to_yaml({SCHEMA_KEY: SCHEMA, **values})


class _Draft:
    """Settings on their way into a recipe: where each comes from, and what is wrong so far."""

    def __init__(
        self, path: str, sources: Sequence[tuple[str, Mapping[str, object], bool]], mistakes: list[str]
    ) -> None:
        """Take what was read.

        Args:
            sources: name of a file or override, sections in it, and whether they are inherited; later ones win.
        """
        self._path, self._sources, self.mistakes = path, sources, mistakes

    @classmethod
    def read(cls, path: Path | str | None, overrides: Sequence[str], *, saved: bool) -> _Draft:
        """Read a recipe, those that it starts from, and overrides."""
        files = _read_files(Path(path), saved=saved) if path is not None else []
        sources = [(str(file), values, number < len(files) - 1) for number, (file, values) in enumerate(files)]
        mistakes = []
        for override in overrides:
            try:
                sources.append((f"override {override!r}", _parse_override(override), False))
            except ValueError as error:
                mistakes.append(str(error))
        return cls(str(path), sources, mistakes)

    def stage(self) -> StageName:
        """Return the stage that the recipe is for.

        Raises:
            ValueError: it does not say.
        """
        named: object = None
        for _, values, _ in self._sources:
            run = values.get("run")
            if is_mapping(run):
                named = run.get("stage", named)
        names = [stage.value for stage in StageName]
        if named in names:
            return StageName(named)
        if named is None:
            raise ValueError(
                f"{self._path}: run.stage is not set; name the stage that the recipe is for: {', '.join(names)}"
            )
        raise ValueError(
            f"{self._path}: run.stage={shorten(named)} is not accepted; expected one of {', '.join(names)}"
        )

    def build(self, kind: type[AnyRecipe], *, also: type[Recipe] | None = None) -> AnyRecipe:
        """Return a recipe.

        Args:
            also: another kind, whose sections may be mentioned too.

        Raises:
            ValueError: all mistakes.
        """
        sections = dict(kind.sections()) | (dict(also.sections()) if also else {})
        values, origins = self._collect(kind, sections)
        made: dict[str, Section] = {}
        for name, section in sections.items():
            given = {**own_defaults(kind, name), **values.get(name, {})}
            try:
                made[name] = section(**given)
            except ValidationError as error:
                self._refuse(name, given, section, error, origins)
        self._raise_mistakes()
        try:
            return kind.model_validate({name: made[name] for name in kind.sections()})
        except ValidationError as error:
            for detail in error.errors(include_url=False, include_input=False):
                self.mistakes += str(detail["ctx"]["error"]).splitlines()
            self._raise_mistakes()
            raise

    def _raise_mistakes(self) -> None:
        if len(self.mistakes) == 1:
            raise ValueError(self.mistakes[0])
        if self.mistakes:
            raise ValueError(f"{len(self.mistakes)} mistakes\n" + "\n".join(f"  {text}" for text in self.mistakes))

    def _collect(self, kind: type[Recipe], sections: Mapping[str, type[Section]]) -> tuple[Values, dict[str, str]]:
        """Lay the sources over each other; return the values, and from which source each setting comes."""
        values: Values = {}
        origins: dict[str, str] = {}
        for source, given, inherited in self._sources:
            for section, settings in given.items():
                if section not in sections:
                    if not (inherited and section in every_section()):
                        self.mistakes.append(f"{source}: {_unknown_section(section, settings, kind, sections)}")
                    continue
                for key, value in self._known_settings(source, section, settings, sections[section]):
                    before = values.setdefault(section, {}).get(key)
                    values[section][key] = _merged(before, value)
                    origins[f"{section}.{key}"] = source
        return values, origins

    def _known_settings(
        self, source: str, section: str, settings: object, kind: type[Section]
    ) -> Iterator[tuple[str, object]]:
        if not is_mapping(settings):
            self.mistakes.append(
                f"{source}: {section}={shorten(settings)} is a section; it needs settings below it: "
                f"{', '.join(kind.model_fields)}"
            )
            return
        for key, value in settings.items():
            if key in kind.model_fields:
                yield str(key), value
            else:
                close = difflib.get_close_matches(str(key), kind.model_fields, n=1)
                advice = (
                    f"did you mean '{section}.{close[0]}'?" if close else f"accepted: {', '.join(kind.model_fields)}"
                )
                self.mistakes.append(f"{source}: unknown setting '{section}.{key}'; {advice}")

    def _refuse(
        self,
        name: str,
        given: Mapping[str, object],
        section: type[Section],
        error: ValidationError,
        origins: Mapping[str, str],
    ) -> None:
        """Report each setting of a section that is not accepted, once."""
        found: dict[str, str] = {}
        for detail in error.errors(include_url=False, include_input=False, include_context=False):
            key, *inside = map(str, detail["loc"])
            field = section.model_fields[key]
            if len(inside) == 2:  # a setting of an item of a list
                setting = f"{name}.{key}[{inside[0]}].{inside[1]}"
                found.setdefault(key, f"{setting}: {detail['msg']}; expected {type_name(field.annotation)}")
            else:
                found.setdefault(key, refusal(f"{name}.{key}", given.get(key), field, detail["type"]))
        self.mistakes += [f"{origins.get(f'{name}.{key}', self._path)}: {text}" for key, text in found.items()]


def own_defaults(kind: type[Recipe], section: str) -> dict[str, object]:
    """Return the settings of a section that have another default in this stage."""
    field = kind.model_fields.get(section)
    default = field.get_default(call_default_factory=True) if field else None
    return {key: getattr(default, key) for key in default.model_fields_set} if isinstance(default, Section) else {}


def _merged(before: object, value: object) -> object:
    """Lay a mapping over another one; any other value takes the place of the one before."""
    if not (is_mapping(before) and is_mapping(value)):
        return value
    return {**before, **{key: _merged(before.get(key), item) for key, item in value.items()}}


def _unknown_section(name: str, settings: object, kind: type[Recipe], sections: Mapping[str, type[Section]]) -> str:
    """Return why a section is refused."""
    if name in every_section():
        return (
            f"section {name} is not read by the {kind.title()} stage, only by {', '.join(stages_that_read(name))}; "
            "remove it"
        )
    close = difflib.get_close_matches(name, sections, n=1)
    if close and is_mapping(settings):
        inside = difflib.get_close_matches(str(next(iter(settings), "")), sections[close[0]].model_fields, n=1)
        close = [f"{close[0]}.{key}" for key in inside] or close
    if not close:
        close = [f"{section}.{name}" for section, settings in sections.items() if name in settings.model_fields]
    advice = f"did you mean {close[0]!r}?" if close else f"accepted: {', '.join(sections)}"
    return f"unknown setting {name!r}; {advice}"


def _read_files(path: Path, *, saved: bool) -> list[tuple[Path, dict[str, object]]]:
    """Return a recipe and those it starts from, the furthest base first."""
    chain: list[tuple[Path, dict[str, object]]] = []
    current: Path | None = path
    while current is not None:
        if any(current.resolve() == seen.resolve() for seen, _ in chain):
            raise ValueError(f"{current}: `{BASE_KEY}` leads back to this file; remove it from one of the recipes")
        values = read_yaml_mapping(current, what=f"section names to settings; sections: {', '.join(every_section())}")
        base = values.pop(BASE_KEY, None)
        if base is not None and not isinstance(base, str):
            raise ValueError(f"{current}: {BASE_KEY}={base!r} must be the path of one recipe")
        chain.insert(0, (current, _renamed(current, values, saved=saved)))
        current = current.parent / base if base else None
    return chain


def _renamed(path: Path, values: dict[str, object], *, saved: bool) -> dict[str, object]:
    """Give the settings of a saved recipe the names that they have now."""
    schema = values.pop(SCHEMA_KEY, None)
    if schema is None:
        if saved:
            raise ValueError(
                f"{path} was written by an earlier version, before recipes had a schema number, and is not read; start "
                "the run again in a new folder"
            )
        return values
    if not isinstance(schema, int) or not 1 <= schema <= SCHEMA:
        raise ValueError(
            f"{path} has {SCHEMA_KEY}={shorten(schema)}; this version reads 1 to {SCHEMA}: use the one that wrote it"
        )
    for number in range(schema + 1, SCHEMA + 1):
        for before, after in RENAMES.get(number, {}).items():
            section, _, key = before.partition(".")
            settings = values.get(section)
            if is_mapping(settings) and key in settings:
                value = settings.pop(key)
                if after:
                    new_section, _, new_key = after.partition(".")
                    target = values.setdefault(new_section, {})
                    assert is_mapping(target)
                    target[new_key] = value
                if not settings:
                    del values[section]
    return values


def _parse_override(override: str) -> dict[str, object]:
    name, equals, text = override.partition("=")
    parts = name.split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise ValueError(f"override {override!r} is not understood; write section.key=value, e.g. train.steps=200")
    value: object = text
    if not _is_text(parts):
        try:
            value = parse_yaml(text)
        except ValueError as error:
            raise ValueError(f"override {override!r}: the value is not valid YAML: {error}") from error
    for part in reversed(parts[1:]):
        value = {part: value}
    return {parts[0]: value}


def _is_text(parts: Sequence[str]) -> bool:
    """Return whether a dotted name leads to a setting that is a text."""
    section = every_section().get(parts[0])
    field = section.model_fields.get(parts[1]) if section and len(parts) == 2 else None
    return field is not None and field.annotation is str
