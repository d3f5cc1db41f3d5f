"""One model and one data set for all whole runs, and a port of its own for each in-process world."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.ranks import free_port
from tests.stages.tiny_run import tiny_recipe


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    """Return the folder of `tiny_recipe`, with model and data in it."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_recipe(folder)
    return folder


@pytest.fixture(autouse=True, scope="module")
def _one_process() -> Iterator[None]:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_PORT", str(free_port()))
        yield
