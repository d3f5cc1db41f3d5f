"""docs/recipes.md, made from the settings and the recipes that read them: `make docs` writes it."""

from __future__ import annotations

import sys

from megatron_r1v2.config.choices import OnResume
from megatron_r1v2.config.command_line import show_value
from megatron_r1v2.config.recipes import STAGES, EvaluateRecipe, every_section, stages_that_read
from megatron_r1v2.config.schema import Section
from megatron_r1v2.config.wording import range_text, type_name

_INTRODUCTION = """\
# Recipes

A recipe is a YAML file of sections. Every stage has its own kind of recipe, and refuses a setting that it does not
read. `section.key=value` on the command line changes one; `defaults: FILE` in a recipe starts from another file.
`r1v2 grpo --help` shows the settings of a stage, `r1v2 --help WORD` finds one. Made from
`megatron_r1v2/config/schema.py` by `make docs`.

| command | what it does |
| --- | --- |
"""

_RULES = """
When a run is resumed with another value, the setting is

* `refused`: the run would be another one;
* `larger`: it may grow;
* `asked`: the curves would mean something else, so `checkpoint.accept_changes=true` is needed;
* `free`: taken, and listed in the log.
"""

_HEAD = "| setting | accepted | default | meaning | read by | on resume |\n| --- | --- | --- | --- | --- | --- |"


def recipes_page() -> str:
    """Return the text of the page: the stages, then a table for each section."""
    stages = [(name.value.replace("_", "-"), kind) for name, kind in STAGES.items()]
    commands = [*stages, ("evaluate", EvaluateRecipe)]
    rows = [f"| `r1v2 {command}` | {_cell(kind.purpose().split(chr(10) * 2)[0])} |" for command, kind in commands]
    tables = [_table(name, section) for name, section in every_section().items()]
    return "\n".join([_INTRODUCTION + "\n".join(rows), _RULES, *tables])


def _table(name: str, section: type[Section]) -> str:
    lines = [f"## {name}", "", (section.__doc__ or "").strip().splitlines()[0], "", _HEAD]
    for key, field in section.model_fields.items():
        accepted = ", ".join(filter(None, (type_name(field.annotation), range_text(field))))
        default = show_value(field.get_default(call_default_factory=True))
        rule: OnResume = section.resume_rule(key)
        readers = stages_that_read(name, key)
        read_by = "all" if len(readers) > len(STAGES) else ", ".join(readers)
        cells = (f"`{key}`", accepted, f"`{default}`", field.description or "", read_by)
        lines.append(f"| {' | '.join(map(_cell, cells))} | {rule.value} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    # A bar inside a cell would end it.
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(recipes_page())
