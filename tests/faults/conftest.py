"""One model and one data set for all runs that are interrupted or damaged."""

from pathlib import Path

import pytest

from tests.stages.tiny_run import tiny_recipe


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-kills", metavar="FILE", help="JSON file for what each random kill has come to")


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    """Return the folder of `tiny_recipe`, with model and data in it."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_recipe(folder)
    return folder
