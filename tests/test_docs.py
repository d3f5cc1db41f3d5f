"""The front door: README and docs/ are short, their links lead somewhere, and they name what exists."""

import ast
import re
import subprocess
import sys
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from examples.stages import read_steps
from megatron_r1v2.__main__ import COMMANDS, main
from megatron_r1v2.config.recipes import every_section
from megatron_r1v2.monitoring.metrics import METRICS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted((ROOT / "docs").glob("*.md"))
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"```.*?```", re.DOTALL)


def words_of(text):
    """Return the prose of a page as sentences: no code blocks, tables, headings or addresses."""
    prose = CODE.sub("", text)
    lines = [line for line in prose.splitlines() if not line.startswith(("|", "#", "!"))]
    plain = LINK.sub(lambda link: re.match(r"!?\[([^\]]*)\]", link[0])[1], "\n".join(lines))
    return [sentence.split() for part in plain.split("\n\n") for sentence in re.split(r"(?<=[.:?!])\s", part)]


def test_the_readme_is_short_and_its_sentences_too():
    assert len(README.splitlines()) <= 120
    assert len(README.split()) <= 1300
    longest = max(words_of(README), key=len)
    assert len(longest) <= 40, " ".join(longest)


def test_the_readme_has_a_picture_a_status_and_links():
    assert len(re.findall(r"!\[", README)) == 1
    assert len(LINK.findall(README)) >= 15
    assert "nothing yet" in README or "proven on a GPU" in README
    pages = {link.split("#")[0].removeprefix("docs/") for link in LINK.findall(README) if link.startswith("docs/")}
    assert len(pages & {path.name for path in PAGES}) >= 10


@pytest.mark.parametrize(
    "path",
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES, *sorted((ROOT / "examples").glob("*/README.md"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_links_lead_to_files_and_headings_that_exist(path):
    for link in LINK.findall(CODE.sub("", path.read_text(encoding="utf-8"))):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, link


def test_the_site_is_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    made = {path.stem for path in (tmp_path / "site").glob("*.html")}
    assert {path.stem for path in PAGES} <= made


def test_every_page_is_in_the_menu_of_the_site():
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    listed = {entry if isinstance(entry, str) else next(iter(entry.values())) for entry in menu}
    assert listed == {path.name for path in PAGES}


def test_commands_that_are_shown_exist():
    for path in (ROOT / "README.md", *PAGES):
        text = path.read_text(encoding="utf-8")
        shown = re.findall(r"(?:^ *|`|\d\. `)r1v2 ([a-z][a-z-]+)", text, re.MULTILINE)
        shown += re.findall(r"-m megatron_r1v2 ([a-z][a-z-]+)", text)
        assert set(shown) <= set(COMMANDS), path.name
        for module in re.findall(r"python -m ((?:checkpoint_tools|examples|benchmarks)[\w.]*)", text):
            place = ROOT / module.replace(".", "/")
            assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), f"{path.name}: {module}"


SHOWN = re.compile(r"(?:\br1v2|-m megatron_r1v2|-m (checkpoint_tools\.\w+)) ?([a-z][a-z-]*)?([^`\n|#;]*)")


def test_options_of_commands_that_are_shown_exist(capsys):
    options: dict[str, set[str]] = {}
    for path in (ROOT / "README.md", *PAGES):
        text = re.sub(r"\\\n\s*", " ", path.read_text(encoding="utf-8"))
        for tool, command, arguments in SHOWN.findall(text):
            found = set(re.findall(r"(?<!\S)--[a-z][\w-]*", f"{command} {arguments}"))
            if found - {"--help"} and (tool or command in COMMANDS):
                options.setdefault(tool or command, set()).update(found)
    assert {"prepare", "plan", "rehearse", "evaluate", "serve", "checkpoint_tools.megatron_to_hf"} <= set(options)
    for name, found in options.items():
        run = import_module(name).main if "." in name else main
        first = ["export"] if name.endswith(".parts") else [] if "." in name else [name]
        with pytest.raises(SystemExit):
            run([*first, "--help"])
        told = capsys.readouterr().out
        assert {option for option in found if not re.search(rf"{option}\b", told)} == set(), name


def test_files_that_are_shown_exist():
    top = "examples|slurm|benchmarks|checkpoint_tools|docs|tests|container"
    for path in (ROOT / "README.md", *PAGES):
        # Names in capitals stand for others: ROOM, RUN, DEVICE.
        text = re.sub(r"[\w./-]*[A-Z]{3}[\w./-]*", "", path.read_text(encoding="utf-8"))
        for name in re.findall(rf"(?<![\w/.])((?:{top})/[\w./-]*[\w/])", text):
            assert (ROOT / name).exists(), f"{path.name}: {name}"


def test_modules_that_pages_name_exist():
    rooms = "|".join(path.name for path in (ROOT / "megatron_r1v2").iterdir() if path.is_dir())
    for path in (ROOT / "CONTRIBUTING.md", *PAGES):
        for name in re.findall(rf"`((?:{rooms})/[\w/]*(?:\.py|/))`", path.read_text(encoding="utf-8")):
            assert (ROOT / "megatron_r1v2" / name).exists(), f"{path.name}: {name}"


def test_settings_that_are_named_exist():
    sections = every_section()
    known = {f"{name}.{key}" for name, section in sections.items() for key in section.model_fields}
    # A column of verl's rows; files; and places for a name.
    others = re.compile(
        r"reward_model\.ground_truth|run\.sh|\w+\.(md|py|yaml|json|html|jsonl|parquet|safetensors)|section\.key"
    )
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES, *(ROOT / "examples").glob("*/README.md")):
        for name in re.findall(r"(?<![\w./-])([a-z_]+\.[a-z_0-9]+)(?![\w/*]|\.\w)", path.read_text(encoding="utf-8")):
            if name.split(".")[0] in sections and not others.fullmatch(name):
                assert name in known, f"{path.name}: {name}"


def test_metrics_that_are_named_exist():
    names = [metric.name for metric in METRICS]
    rooms = "|".join({name.split("/")[0] for name in names} - {"data"})
    for path in (ROOT / "README.md", *PAGES):
        for name in re.findall(
            rf"`((?:{rooms}|data/share|data/effective_fraction)/[\w/*]+)`", path.read_text(encoding="utf-8")
        ):
            # A capital stands for a name: reward/NAME/mean; a star for all.
            pattern = re.sub(r"[A-Z]{2,}", "x", name)
            assert any(fnmatch(pattern, each) or fnmatch(each, name) for each in names), f"{path.name}: {name}"


def test_functions_of_the_method_are_where_it_says():
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    named = re.findall(r"`(\w+/[\w/]+\.py)`: ((?:`\w+`(?:, )?)+)", text)
    assert len(named) >= 8
    for file, names in named:
        tree = ast.parse((ROOT / "megatron_r1v2" / file).read_text(encoding="utf-8"))
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert set(re.findall(r"`(\w+)`", names)) <= defined, file


def test_messages_of_the_faq_are_those_of_the_program():
    text = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
    messages = [row.split("`")[1] for row in text.splitlines() if row.startswith("| `")]
    assert len(messages) >= 15
    printed = "\n".join(text for path in (ROOT / "megatron_r1v2").rglob("*.py") for text in texts_of(path))
    assert not [message for message in messages if message not in printed]


def texts_of(path):
    """Yield the texts of a module that a user may see: no docstrings, and "..." for values."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def test_the_figures_of_the_demo_are_the_same_everywhere():
    rows = re.findall(r"^\| [\w ]+ \| ([\d.]+ %) \| ([\d.]+ %) \|$", README, re.MULTILINE)
    assert len(rows) == 3
    picture, measured = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("demo.svg", "measured.md"))
    assert [rate for rate, _ in rows if rate not in picture] == []
    assert [row for row in rows if f"| {row[0]} | {row[1]} |" not in measured] == []


def test_the_demo_of_the_readme_is_the_script():
    assert "examples/digits/run.sh" in README
    assert "run.sh" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert len(read_steps(ROOT / "examples" / "digits" / "run.sh")) >= 12
