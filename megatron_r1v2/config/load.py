"""YAML files and dotted overrides in, a checked recipe out; all that is wrong is said at once, as one ValueError."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from megatron_r1v2.config.choices import StageName
from megatron_r1v2.config.recipes import STAGES, PairsRecipe, Recipe, TrainingRecipe, every_section, stages_that_read
from megatron_r1v2.config.schema import ModelConfig, Section
from megatron_r1v2.config.validate import base_of_checkpoint
from megatron_r1v2.config.wording import refusal, shorten, type_name
from megatron_r1v2.config.yaml_files import is_mapping, parse_yaml, read_yaml_mapping, to_yaml

BASE_KEY = "defaults"
SCHEMA_KEY = "schema"
SCHEMA = 3
"""Of the settings, in recipes that are saved; raised with each line of `RENAMES`, and when a stage reads less."""
RENAMES: Mapping[int, Mapping[str, str]] = {
    2: {
        "algorithm.gate_tokens": "",
        "logging.sample_rollouts": "",
        "train.micro_batch_size": "",
    }
}
"""By the schema that changed them: section.key of the schema before -> section.key, or "" where it is gone."""
GONE_VALUES: Mapping[int, Mapping[str, object]] = {2: {"train.packing": "none", "train.tokens_per_microbatch": 0}}
"""By the schema that dropped them: section.key -> the value in whose place the default comes."""

Check = Callable[[Recipe], Iterable[str]]
"""Finds what is wrong with a recipe beyond its settings: a sentence for each mistake."""
AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def load_recipe(
    path: Path | str, overrides: Sequence[str] = (), *, saved: bool = False, check: Check | None = None
) -> TrainingRecipe | PairsRecipe:
    """Read the recipe of the stage that its `run.stage` names.

    A recipe may start from another one, of any stage: `defaults: other.yaml`, relative to its own folder. What this
    stage does not read of that one is left out.

    Args:
        overrides: `section.key=value`; the value of a text setting is taken as it stands, any other is read as YAML.
        saved: the file holds what `recipe_yaml` gave.
        check: its mistakes are told with the others.

    Returns:
        The settings, with defaults for all that is not mentioned.

    Raises:
        ValueError: an unreadable file, and each unknown setting, setting that the stage does not read, value that is
            not accepted, and combination that is impossible.
    """
    recipe = _load(None, path, overrides, saved=saved, check=check)
    assert isinstance(recipe, TrainingRecipe | PairsRecipe)
    return recipe


def load_recipe_as(
    kind: type[AnyRecipe],
    path: Path | str | None,
    overrides: Sequence[str] = (),
    *,
    saved: bool = False,
    check: Check | None = None,
) -> AnyRecipe:
    """Read a recipe for a stage, or take what a command needs from the recipe of any stage.

    Args:
        kind: of a stage, which `run.stage` must name then; or of a command that takes the recipe of any.
        path: the YAML file; None: the defaults.
        overrides: see `load_recipe`; for a command they may also be those of the recipe's own stage.
        saved: the file holds what `recipe_yaml` gave.
        check: its mistakes are told with the others.

    Raises:
        ValueError: see `load_recipe`; or the recipe is that of another stage.
    """
    recipe = _load(kind, path, overrides, saved=saved, check=check)
    assert isinstance(recipe, kind)
    return recipe


def recipe_yaml(recipe: Recipe) -> str:
    """Return every setting that a recipe's stage reads, with their schema, as YAML that `load_recipe` reads."""
    values = recipe.model_dump(mode="json", include={name: set(keys) for name, keys in recipe.settings().items()})
    if recipe.stage:
        values["run"]["stage"] = recipe.stage.value
    return to_yaml({SCHEMA_KEY: SCHEMA, **values})


def _load(
    kind: type[Recipe] | None, path: Path | str | None, overrides: Sequence[str], *, saved: bool, check: Check | None
) -> Recipe:
    draft = _Draft.read(path, overrides, saved=saved)
    stage = draft.stage() if path is not None else None
    if kind is None or (kind.stage is None and path is not None):
        command = [kind] if kind else []
        # Where no stage is named, the recipe is judged as that of the stage that it suits best.
        choices = [[own, *command] for own in ([STAGES[stage]] if stage else STAGES.values())]
    else:
        if kind.stage and stage and stage is not kind.stage:
            draft.mistakes.append(
                f"{path} is a recipe of the {stage.value} stage (run.stage), not of {kind.stage.value}; run python -m "
                f"megatron_r1v2 {stage.value.replace('_', '-')}, or give another recipe"
            )
            kind = STAGES[stage]
        choices = [[kind]]
    recipe, mistakes = draft.judge(choices, check)
    if recipe is None:
        listed = "\n".join(f"  {text}" for text in mistakes)
        raise ValueError(mistakes[0] if len(mistakes) == 1 else f"{len(mistakes)} mistakes\n{listed}")
    return recipe


@dataclass(frozen=True)
class _Source:
    """A file or an override."""

    name: str
    sections: Mapping[str, object]
    strict: bool = True
    """Whether it must hold no setting that the stage does not read, as a recipe that another starts from may."""


@dataclass
class _Draft:
    """Settings on their way into a recipe."""

    path: str
    sources: list[_Source] = field(default_factory=list)
    """Later ones win."""
    mistakes: list[str] = field(default_factory=list)
    wrong: set[str] = field(default_factory=set)
    """Settings whose value is not known: a sentence that names one of them cannot be judged."""
    is_whole: bool = True
    """Whether every file could be read."""

    @classmethod
    def read(cls, path: Path | str | None, overrides: Sequence[str], *, saved: bool) -> _Draft:
        """Read a recipe, those that it starts from, and overrides."""
        draft = cls(str(path))
        try:
            for source in _read_files(Path(path), saved=saved) if path is not None else ():
                # The nearest file is read first, and later sources win.
                draft.sources.insert(0, source)
        except ValueError as error:
            draft.mistakes.append(str(error))
            draft.is_whole = False
        for override in overrides:
            try:
                draft.sources.append(_Source(f"override {override!r}", _parse_override(override)))
            except ValueError as error:
                draft.mistakes.append(str(error))
                name = override.partition("=")[0]
                draft.wrong |= {name, *_with_key(name, _every_setting())}
        return draft

    def stage(self) -> StageName | None:
        """Return the stage that the recipe is for; None, which is a mistake: it names none."""
        runs = [source.sections.get("run") for source in self.sources]
        named = [run["stage"] for run in runs if is_mapping(run) and run.get("stage") is not None]
        names = [stage.value for stage in StageName]
        if not named and self.is_whole:
            self.mistakes.append(
                f"{self.path}: run.stage is not set; name the stage that the recipe is for: {', '.join(names)}"
            )
        return StageName(named[-1]) if named and named[-1] in names else None

    def judge(self, choices: Sequence[Sequence[type[Recipe]]], check: Check | None) -> tuple[Recipe | None, list[str]]:
        """Return a recipe, or None, and all mistakes.

        Args:
            choices: what it may be, of which the one counts that it suits best: the kind of the recipe's stage, and
                that of the command, where it is another: settings of both may be mentioned. The last is returned.
        """
        found = min((_Findings(kinds, self) for kinds in choices), key=lambda found: len(found.mistakes))
        sections: dict[str, Any] = {name: found.section(name, self.path) for name in found.sections}
        if "model" in sections:
            sections["model"] = _with_base(sections["model"])
        # Without pydantic's checks: combinations are told together with the mistakes of single settings.
        recipes = [kind.model_construct(**{name: sections[name] for name in kind.sections()}) for kind in found.kinds]
        if self.is_whole:
            told = chain(*(recipe.mistakes() for recipe in recipes), check(recipes[-1]) if check else ())
            found.mistakes += dict.fromkeys(text for text in told if not found.names_wrong(text))
        # Made again, with the checks that model_construct has left out.
        return None if found.mistakes else found.kinds[-1](**dict(recipes[-1])), found.mistakes


class _Findings:
    """The values and mistakes of a draft, as a recipe of some kinds."""

    def __init__(self, kinds: Sequence[type[Recipe]], draft: _Draft) -> None:
        self.kinds, self.mistakes, self.wrong = kinds, [*draft.mistakes], {*draft.wrong}
        self.sections = {name: section for kind in kinds for name, section in kind.sections().items()}
        self.read = [f"{name}.{key}" for kind in kinds for name, keys in kind.settings().items() for key in keys]
        self.values: dict[str, tuple[str, object]] = {}
        """The source and the value of each setting."""
        for source in draft.sources:
            self._add(source)

    def _add(self, source: _Source) -> None:
        """Lay the settings of a source over those before."""
        for section, settings in source.sections.items():
            known = every_section().get(section)
            if known is None:
                self._refuse(source, f"unknown setting {section!r}; {self._advise_section(section, settings)}")
            elif section not in self.sections:
                if source.strict:
                    self._refuse(source, self._unread(f"section {section}", stages_that_read(section)))
            elif not is_mapping(settings):
                names = ", ".join(known.model_fields)
                self._refuse(source, f"{section}={shorten(settings)} is a section; it needs settings below it: {names}")
                self.wrong |= {f"{section}.{key}" for key in known.model_fields}
            else:
                for key, value in settings.items():
                    self._add_setting(source, section, str(key), value)

    def _add_setting(self, source: _Source, section: str, key: str, value: object) -> None:
        name = f"{section}.{key}"
        if name in self.read:
            _, before = self.values.get(name, ("", None))
            self.values[name] = (source.name, _merged(before, value))
        elif key not in _keys(section):
            self._refuse(source, f"unknown setting {name!r}; {self._advise_setting(section, key)}")
        elif source.strict:
            self._refuse(source, self._unread(name, stages_that_read(section, key)))

    def section(self, name: str, path: str) -> Section:
        """Return a section with the values that are accepted, and note each setting that is not, once."""
        kind = self.sections[name]
        given = {key: default for recipe in self.kinds for key, default in own_defaults(recipe, name).items()}
        given |= {key: self.values[f"{name}.{key}"][1] for key in kind.model_fields if f"{name}.{key}" in self.values}
        try:
            return kind(**given)
        except ValidationError as error:
            for detail in error.errors(include_url=False, include_input=False, include_context=False):
                # Without the name that pydantic gives to one of several kinds of value.
                key, *inside = (str(part) for part in detail["loc"] if not str(part).endswith("-tag"))
                # Another item of a list that is refused already: one sentence a setting.
                if key not in given:
                    continue
                field, value = kind.model_fields[key], given.pop(key)
                text = refusal(f"{name}.{key}", value, field, detail["type"])
                if len(inside) == 2:  # a setting of an item of a list
                    item = f"{name}.{key}[{inside[0]}].{inside[1]}"
                    text = f"{item}: {detail['msg']}; expected {type_name(field.annotation)}"
                self.mistakes.append(f"{self.values.get(f'{name}.{key}', (path,))[0]}: {text}")
                self.wrong.add(f"{name}.{key}")
            return kind(**given)

    def names_wrong(self, text: str) -> bool:
        """Return whether a sentence is about a setting whose value is not known."""
        # Whole names only: train.clip must not be found in train.clip_grad.
        return any(re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", text) for name in self.wrong)

    def _refuse(self, source: _Source, text: str) -> None:
        self.mistakes.append(f"{source.name}: {text}")

    def _unread(self, what: str, readers: Sequence[str]) -> str:
        return f"{what} is not read by the {self.kinds[0].title()} stage, only by {', '.join(readers)}; remove it"

    def _advise_section(self, name: str, settings: object) -> str:
        """Return what the unknown name of a section may mean."""
        if not is_mapping(settings):
            return self._advise(_with_key(name, self.read), self.sections)
        close = _closest(name, every_section())
        if close is None:
            return self._advise([], self.sections)
        keys = [key for given in settings if (key := _closest(str(given), _keys(close)))]
        self.wrong |= {f"{close}.{key}" for key in keys}
        return self._advise([f"{close}.{key}" for key in keys[:1]] or [close], self.sections)

    def _advise_setting(self, section: str, key: str) -> str:
        """Return what an unknown setting of a section may mean."""
        if close := _closest(key, _keys(section)):
            return self._advise([f"{section}.{close}"], ())
        other = _closest(key, self.sections)
        elsewhere = [name for name in self.read if name.endswith(f".{key}") or name.startswith(f"{other}.")]
        return self._advise(elsewhere, [name for name in self.read if name.startswith(f"{section}.")])

    def _advise(self, meant: Sequence[str], accepted: Iterable[str]) -> str:
        self.wrong |= {*meant}
        if not meant:
            return f"accepted: {', '.join(accepted)}"
        readers = stages_that_read(*meant[0].split("."))
        is_read = meant[0] in (*self.read, *self.sections)
        return f"did you mean {' or '.join(map(repr, meant))}?" + (
            "" if is_read else f" It is read only by {', '.join(readers)}"
        )


def _with_base(model: ModelConfig) -> ModelConfig:
    """Return the section with the folder that a checkpoint's run began from, where only the checkpoint is named."""
    base = "" if model.hf_path else base_of_checkpoint(model.checkpoint)
    return model.changed(hf_path=base) if base and Path(base).is_dir() else model


def own_defaults(kind: type[Recipe], section: str) -> dict[str, object]:
    """Return the settings of a section that have another default in this stage."""
    field = kind.model_fields.get(section)
    # A section that is made as it stands has the defaults of its class; to make it takes a while.
    if field is None or field.default_factory is field.annotation:
        return {}
    default = field.get_default(call_default_factory=True)
    assert isinstance(default, Section)
    return {key: getattr(default, key) for key in default.model_fields_set}


def _merged(before: object, value: object) -> object:
    """Lay a mapping over another one; any other value takes the place of the one before."""
    if not (is_mapping(before) and is_mapping(value)):
        return value
    return {**before, **{key: _merged(before.get(key), item) for key, item in value.items()}}


def _keys(section: str) -> Collection[str]:
    return every_section()[section].model_fields


def _every_setting() -> list[str]:
    return [f"{section}.{key}" for section in every_section() for key in _keys(section)]


def _with_key(key: str, names: Iterable[str]) -> list[str]:
    """Return the settings whose last part is nearest to a key, if any is near."""
    by_name = {name: name.rpartition(".")[2] for name in names}
    close = _closest(key, by_name.values())
    return [name for name, last in by_name.items() if last == close]


def _closest(word: str, choices: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, list(choices), n=1)), None)


def _read_files(path: Path, *, saved: bool) -> Iterator[_Source]:
    """Yield a recipe and those it starts from, the nearest first."""
    seen: list[Path] = []
    current: Path | None = path
    while current is not None:
        if current.resolve() in seen:
            raise ValueError(f"{current}: `{BASE_KEY}` leads back to this file; remove it from one of the recipes")
        values = read_yaml_mapping(current, what=f"section names to settings; sections: {', '.join(every_section())}")
        base = values.pop(BASE_KEY, None)
        is_old = values.get(SCHEMA_KEY, SCHEMA) != SCHEMA
        # A recipe of an older schema may have settings that its stage does not read any more.
        yield _Source(str(current), _renamed(current, values, saved=saved), strict=not seen and not is_old)
        if base is not None and not isinstance(base, str):
            raise ValueError(f"{current}: {BASE_KEY}={base!r} must be the path of one recipe")
        seen.append(current.resolve())
        current = current.parent / base if base else None


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
        for name, gone in GONE_VALUES.get(number, {}).items():
            section, _, key = name.partition(".")
            settings = values.get(section)
            if is_mapping(settings) and settings.get(key) == gone:
                del settings[key]
    return values


def _parse_override(override: str) -> dict[str, object]:
    name, equals, text = override.partition("=")
    parts = name.split(".")
    if not equals or len(parts) < 2 or not all(parts):
        meant = _with_key(name, _every_setting()) if len(parts) == 1 else []
        advice = f"; did you mean {' or '.join(map(repr, meant))}?" if meant else ""
        raise ValueError(
            f"override {override!r} is not understood; write section.key=value, e.g. train.steps=200{advice}"
        )
    # A folder named 2026 or a pattern in brackets is text, whatever YAML makes of it.
    value: object = text
    if not _is_text(parts, text):
        try:
            value = parse_yaml(text)
        except ValueError as error:
            raise ValueError(f"override {override!r}: the value is not valid YAML: {error}") from error
    for part in reversed(parts[1:]):
        value = {part: value}
    return {parts[0]: value}


def _is_text(parts: Sequence[str], text: str) -> bool:
    """Return whether a dotted name leads to a setting that is a text, or that may be one and looks like no list."""
    section = every_section().get(parts[0])
    field = section.model_fields.get(parts[1]) if section and len(parts) == 2 else None
    if field is None:
        return False
    return field.annotation is str or (parts == ["data", "train"] and not text.startswith("["))
