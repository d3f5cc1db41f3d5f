"""A user's file and its functions, as a worker loads and calls them."""

import sys
from pathlib import Path

import pytest

from megatron_r1v2.rewards import function_file
from megatron_r1v2.rewards.function_file import INPUTS, check_function, load_file, score_response

OWN = str(Path(__file__).with_name("own_functions.py"))
INPUT = {"response": "12345", "prompt": "add", "answer": "8", "metadata": {"level": "1"}, "images": []}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Load files anew, and leave nothing of them behind."""
    load_file.cache_clear()
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    load_file.cache_clear()


def write(tmp_path, text):
    path = tmp_path / "reward.py"
    path.write_text(text)
    return str(path)


def test_a_number_or_named_parts():
    assert score_response(OWN, "short", INPUT) == ({"": 0.5}, "")
    assert score_response(OWN, "parts", INPUT) == (
        {"says_answer": 0.0, "level": 0.25, "images": 0.0, "asked": 1.0},
        "",
    )


def test_numbers_of_numpy_are_numbers(tmp_path):
    path = write(tmp_path, "import numpy\ndef f(**_): return {'a': numpy.float32(0.5), 'b': numpy.int64(1)}\n")
    assert score_response(path, "f", INPUT) == ({"a": 0.5, "b": 1.0}, "")


@pytest.mark.parametrize("result", ["nan", "two", "text", "nothing", "empty", "one bad part"])
def test_anything_else_is_no_score(result):
    parts, error = score_response(OWN, "returns", {**INPUT, "response": result})
    assert parts == {}
    assert "not a number from 0 to 1, or a dict of such numbers by name" in error


def test_an_error_is_told_with_its_line(tmp_path):
    line = Path(OWN).read_text().splitlines().index('        raise KeyError("level 2")') + 1
    assert score_response(OWN, "fails_on_b", {**INPUT, "metadata": {"level": "2"}}) == (
        {},
        f"KeyError: 'level 2' (line {line})",
    )
    # The line of the user's file, not that of the library that it calls.
    path = write(tmp_path, "import json\n\ndef f(**_):\n    return json.loads('{')\n")
    assert score_response(path, "f", INPUT)[1].endswith("(line 4)")


@pytest.mark.parametrize("name", ["short", "parts", "fails_on_b"])
def test_good_functions_pass(name):
    assert check_function(OWN, name) == ""


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("shrt", "it has no function 'shrt', only by_position, fails_on_b, hangs_on_b"),
        ("NUMBER", "it has no function 'NUMBER'"),
        ("later", "later is asynchronous; write def, not async def"),
        ("too_few", "too_few(response, answer) is called with response, prompt, answer, metadata, images by name"),
        ("by_position", "by_position(response, /, **others) is called with response, prompt"),
    ],
)
def test_a_function_that_cannot_score_is_named(name, problem):
    assert problem in check_function(OWN, name)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("import nowhere_to_be_found", "it cannot be imported: ModuleNotFoundError: No module named"),
        ("x = 1\n1 / 0\n", "it cannot be imported: ZeroDivisionError: division by zero (line 2)"),
        ("def f(:\n", "SyntaxError: invalid syntax"),
        ("", "it has no function 'f', only none at all"),
    ],
)
def test_a_file_that_cannot_be_imported_is_told(tmp_path, text, problem):
    assert problem in check_function(write(tmp_path, text), "f")


def test_what_cannot_be_imported_gives_no_score(tmp_path):
    parts, error = score_response(write(tmp_path, "1 / 0"), "f", INPUT)
    assert parts == {}
    assert "ZeroDivisionError" in error


def test_a_file_is_imported_once_and_sees_its_neighbours(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    (tmp_path / "neighbour.py").write_text("VALUE = 0.25\n")
    path = write(tmp_path, "from neighbour import VALUE\n\ndef f(**_):\n    return VALUE\n")
    assert score_response(path, "f", INPUT) == ({"": 0.25}, "")
    assert load_file(path) is load_file(path)
    # Behind everything else: a user's json.py must not take the place of Python's.
    assert sys.path[-1] == str(tmp_path)
    sys.modules.pop("neighbour")


def test_it_imports_little():
    """Else each worker would take seconds to start."""
    source = Path(function_file.__file__).read_text()
    assert "megatron_r1v2" not in source.partition('"""\n')[2]
    assert tuple(INPUT) == INPUTS
