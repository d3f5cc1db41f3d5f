"""The order of the test files, and the objects that no garbage collection looks at."""

import gc
from pathlib import Path
from types import SimpleNamespace

from hypothesis import settings

from tests.conftest import SLOWEST, pytest_collection_finish, pytest_collection_modifyitems
from tests.ranks import run_ranks

TESTS = Path(__file__).parent


def test_the_slowest_files_exist_and_come_first_in_their_order() -> None:
    assert [file for file in SLOWEST if not (TESTS / file).is_file()] == []
    files = ["rl/test_grpo.py", SLOWEST[2], "config/test_load.py", SLOWEST[0]]
    items = [SimpleNamespace(path=TESTS / file, number=number) for file in files for number in (1, 2)]
    pytest_collection_modifyitems(items)
    got = [(str(item.path.relative_to(TESTS)), item.number) for item in items]
    assert got == [(file, number) for file in (SLOWEST[0], SLOWEST[2], files[0], files[2]) for number in (1, 2)]


def test_imports_are_left_out_of_garbage_collection_here_and_in_ranks() -> None:
    pytest_collection_finish()  # again: energon thaws the heap when it has read
    assert gc.get_freeze_count() > 100_000
    assert run_ranks(1, gc.get_freeze_count)[0] > 100_000


def test_an_example_of_hypothesis_may_take_as_long_as_a_busy_machine_needs():
    assert settings().deadline is None
