"""The shape of the tree: imports go one way, files stay short, the README tells the truth about what is where."""

import ast
import functools
import io
import re
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_r1v2"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *ROOT.glob("checkpoint_tools/**/*.py")])
CODE = sorted([*SOURCES, *ROOT.glob("examples/**/*.py"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/**/*.py")])

# A part may import parts of a lower rank, and itself. Modules that are not listed (entry points) may import anything.
RANKS = {
    "types": 0,
    "config": 0,
    "parallel": 1,
    "resilience": 2,
    "monitoring": 3,
    "models": 4,
    "data": 4,
    "checkpoint": 5,
    "generation": 5,
    "rewards": 5,
    "rl": 5,
    "training": 6,
    "evaluation": 7,
    "stages": 8,
    "report": 9,
    "planning": 9,
    "serve": 9,
    "rehearsal": 10,
}

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# Functions that stand in for a library's, with its arguments.
LIBRARY_SIGNATURES = {"flash_decode_and_prefill"}


def name_of(path):
    return str(path.relative_to(ROOT))


def part_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py") if path.is_relative_to(PACKAGE) else ""


@functools.cache
def tree_of(path):
    """Return the parsed code of a file; most rules look at every file."""
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.fixture(autouse=True, scope="module")
def _forget_trees():
    yield
    tree_of.cache_clear()


def imports_of(path):
    """Return (line, dotted module) of everything that a file imports, at any depth, under its absolute name."""
    found = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno} imports relatively"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def violations_of_direction(path, imported):
    """Return the imports that go up, or sideways between parts of one rank."""
    part = part_of(path)
    if part not in RANKS:
        return []
    wrong = []
    for line, module in imported:
        package, _, rest = module.partition(".")
        other = rest.split(".")[0]
        upwards = package == "megatron_r1v2" and other not in ("", part) and RANKS.get(other, 99) >= RANKS[part]
        if upwards or package in ("checkpoint_tools", "examples", "tests"):
            wrong.append((line, module))
    return wrong


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_go_one_way(path):
    wrong = violations_of_direction(path, imports_of(path))
    assert not wrong, f"{name_of(path)} imports upwards or sideways: {wrong}"


def test_an_upward_import_would_be_found():
    path = PACKAGE / "models" / "vision.py"
    assert violations_of_direction(path, [(1, "megatron_r1v2.training.step")])
    assert violations_of_direction(path, [(1, "megatron_r1v2.data.shards")])
    assert violations_of_direction(path, [(1, "megatron_r1v2.__main__")])
    assert not violations_of_direction(path, [(1, "megatron_r1v2.parallel.groups"), (2, "torch")])


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("rl/*.py")), ids=name_of)
def test_algorithms_know_nothing_but_torch_and_types(path):
    outside = {module.split(".")[0] for _, module in imports_of(path)} - sys.stdlib_module_names
    assert outside <= {"torch", "megatron_r1v2"}
    ours = {module for _, module in imports_of(path) if module.startswith("megatron_r1v2.")}
    assert all(module.startswith(("megatron_r1v2.types", "megatron_r1v2.rl.")) for module in ours), ours
    assert not {module for _, module in imports_of(path) if module.startswith("torch.distributed")}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_parallel_state_is_asked_in_one_place(path):
    if part_of(path) == "parallel":
        return
    asked = [(line, module) for line, module in imports_of(path) if "parallel_state" in module]
    assert not asked, f"{name_of(path)}: take process groups as arguments instead"
    assert "parallel_state." not in path.read_text(encoding="utf-8")


def test_no_folder_or_file_is_named_after_nothing():
    vague = {"utils", "util", "common", "helpers", "helper", "misc"}
    named = [
        name_of(path) for path in CODE if vague & {part.removesuffix(".py") for part in path.relative_to(ROOT).parts}
    ]
    assert not named


def code_lines(path):
    """Return the numbers of the lines of code: none that is blank, a comment, a docstring or the text below a field."""
    texts = {
        line
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type not in layout:
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines - texts


def functions_of(path):
    return [node for node in ast.walk(tree_of(path)) if isinstance(node, FUNCTIONS)]


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_files_and_functions_stay_short(path):
    lines = code_lines(path)
    assert len(lines) <= 400, f"{name_of(path)} has {len(lines)} lines of code; split it"
    for node in functions_of(path):
        length = len([line for line in lines if node.lineno <= line <= node.end_lineno])
        assert length <= 60, f"{name_of(path)}: {node.name} has {length} lines of code; split it"


def is_override(node):
    return any(getattr(decorator, "id", "") == "override" for decorator in node.decorator_list)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_functions_take_seven_arguments_at_most(path):
    """Overrides of a library's methods take what the library passes; `typing_extensions.override` marks them."""
    for node in functions_of(path):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        names = [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]
        too_many = len(names) > 7 and not is_override(node) and node.name not in LIBRARY_SIGNATURES
        assert not too_many, f"{name_of(path)}: {node.name} takes {len(names)} arguments; use a frozen dataclass"


def test_folders_have_twenty_modules_at_most():
    for folder in {path.parent for path in SOURCES}:
        modules = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= 20, f"{name_of(folder)} has {len(modules)} modules"


def test_any_is_rare():
    """Four in a thousand lines: what JSON and megatron-core's untyped calls need."""
    sources = [path.read_text(encoding="utf-8") for path in SOURCES]
    lines = sum(source.count("\n") for source in sources)
    names = [node for path in SOURCES for node in ast.walk(tree_of(path)) if isinstance(node, ast.Name)]
    count = sum(node.id == "Any" for node in names)
    assert count <= 0.004 * lines, f"{count} in {lines} lines"


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def import_graph():
    """Return for each module of ours those that it imports, at any depth of its code."""
    modules = {module_name(path): path for path in SOURCES}
    return {
        name: {
            module if module in modules else module.rpartition(".")[0]
            for _, module in imports_of(path)
            if module in modules or module.rpartition(".")[0] in modules
        }
        - {name}
        for name, path in modules.items()
    }


def find_circle(graph):
    """Return the modules of one circle of imports, or an empty list."""
    done, way = set(), []

    def visit(name):
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        way.append(name)
        circle = next((found for other in sorted(graph.get(name, ())) if (found := visit(other))), [])
        way.pop()
        done.add(name)
        return circle

    return next((circle for name in sorted(graph) if (circle := visit(name))), [])


def test_no_modules_import_each_other_in_a_circle():
    assert not find_circle(import_graph())


def test_a_circle_would_be_found():
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert not find_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_nine_of_ten_modules_have_a_test_file_of_their_name():
    modules = [path for path in SOURCES if path.name not in ("__init__.py", "__main__.py")]
    missing = []
    for path in modules:
        inside = path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT)
        if not (ROOT / "tests" / inside.parent / f"test_{inside.name}").is_file():
            missing.append(name_of(path))
    assert len(missing) <= 0.1 * len(modules), missing


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_docstrings_are_noun_phrases_and_imperatives(path):
    questions = re.compile(r"(What|Which|Where|Who|Whether|How|Hold|Tell|Say|Prepare\.)\b")
    tree = tree_of(path)
    documented = [tree, *(node for node in ast.walk(tree) if isinstance(node, FUNCTIONS))]
    wrong = [text for node in documented if (text := ast.get_docstring(node) or "") and questions.match(text)]
    assert not wrong, f"{name_of(path)}: {wrong}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_collectives_are_verbs(path):
    """Whoever reads `if self.is_done()` must not start a call that all ranks have to make together."""
    for node in functions_of(path):
        text = ast.get_docstring(node) or ""
        if text.startswith("Collective over"):
            assert not re.match(r"_?(is|has|must|can|should|find|needs)_", node.name), f"{name_of(path)}: {node.name}"
            assert not any(getattr(item, "id", "") == "property" for item in node.decorator_list), node.name


CALLED_BY_ALL = {
    *("all_gather", "all_gather_object", "all_reduce", "barrier", "broadcast", "broadcast_object_list"),
    *("broadcast_from_first", "exchange", "gather_object", "monitored_barrier", "scatter_object_list"),
}


def calls_a_collective(node):
    """Return whether a function calls a collective of torch.distributed or of parallel/objects.py itself."""
    called = [call.func for call in ast.walk(node) if isinstance(call, ast.Call)]
    attributes = [func for func in called if isinstance(func, ast.Attribute) and func.attr in CALLED_BY_ALL]
    return any(getattr(func.value, "id", "") in ("dist", "objects") for func in attributes)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_collectives_say_so(path):
    if part_of(path) == "rehearsal":
        return  # it stands in for them, on one rank
    silent = [
        node.name
        for node in functions_of(path)
        if calls_a_collective(node) and not (ast.get_docstring(node) or "").startswith("Collective over")
    ]
    assert not silent, f"{name_of(path)}: begin the docstring of {silent} with: Collective over GROUP"


def test_a_silent_collective_would_be_found():
    (node,) = ast.parse("def agree(x):\n    return all(objects.all_gather(x))").body
    assert calls_a_collective(node)
    (node,) = ast.parse("def agree(x):\n    return all(x.all_gather(x))").body
    assert not calls_a_collective(node)


def readable_files():
    skipped = {".git", ".venv", "runs", "wandb", "build", "dist", "node_modules"}
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        hidden = any(part.startswith(".") and part not in (".ci", ".gitignore", ".dockerignore") for part in parts)
        if hidden or skipped & set(parts) or any(part.endswith((".egg-info", "__pycache__")) for part in parts):
            continue
        if path.is_file() and path.suffix in {".py", ".md", ".sh", ".yaml", ".toml", ".html", ".css", ".lock", ""}:
            yield path


def test_text_is_ascii():
    wrong = [name_of(path) for path in readable_files() if not path.read_bytes().isascii()]
    assert not wrong


def test_the_tree_of_the_architecture_names_every_room():
    tree = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("```")[1]
    rooms = {f"{path.name}/" for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms <= set(re.findall(r"^  (\w+/) ", tree, re.MULTILINE))
