"""A run of one step, what it answers in process, and a server of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_r1v2.types import Prompt
from tests.generation.conftest import model_folder, one_rank
from tests.ranks import run_ranks
from tests.serve.running import Served, served, train_and_generate

__all__ = ["model_folder", "one_rank"]


@dataclass(frozen=True)
class Run:
    """A run, and its greedy answers by prompt."""

    root: Path
    prompts: list[Prompt]
    texts: list[str]
    log_probs: list[list[float]]

    @property
    def folder(self) -> Path:
        return self.root / "run"


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Run:
    root = tmp_path_factory.mktemp("served")
    return Run(root, *run_ranks(1, train_and_generate, root)[0])


@pytest.fixture(scope="session")
def server(run, tmp_path_factory) -> Iterator[Served]:
    """Return a server that wants the key "secret" and takes 64 requests, of which it works at 16."""
    arguments = ("--max-queue", "48", "--api-key-variable", "SERVE_TEST_KEY", "--max-body-mib", "1")
    with served(run.folder, *arguments, log=tmp_path_factory.mktemp("log") / "server") as running:
        yield running


@pytest.fixture
def client(server):
    return server.client(api_key="secret")
