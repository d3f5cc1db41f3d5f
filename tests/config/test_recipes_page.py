"""docs/recipes.md is what the settings and recipes say, and the page has all of them."""

import subprocess
import sys
from pathlib import Path

from megatron_r1v2.config.recipes import every_section
from megatron_r1v2.config.recipes_page import recipes_page

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


def rows_of(section):
    text = recipes_page().split(f"\n## {section}\n")[1].split("\n## ")[0]
    return {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}


def test_the_documentation_is_what_the_settings_say():
    assert PAGE.read_text(encoding="utf-8") == recipes_page(), "run `make docs`"


def test_each_setting_is_a_row_below_its_section():
    sections = every_section()
    assert {name: list(rows_of(name)) for name in sections} == {
        name: list(section.model_fields) for name, section in sections.items()
    }


def test_a_row_has_what_is_accepted_the_default_the_meaning_the_stages_and_the_rule():
    assert rows_of("run")["seed"] == (
        "| `seed` | a whole number, 0 to 2147483647 | `1234` | Seeds data order, sampling and buffer draws. | all | "
        "refused |"
    )
    assert rows_of("reward_model")["centring_weight"].endswith(" | reward_model | asked |")
    assert rows_of("parallel")["tensor"].endswith(" | all | free |")


def test_the_module_writes_the_page():
    """As `make docs` runs it."""
    module = "megatron_r1v2.config.recipes_page"
    result = subprocess.run([sys.executable, "-m", module], capture_output=True, text=True, check=True)
    assert result.stdout == recipes_page()
