"""The model folder, and one rank in the test process itself."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_r1v2.config.schema import ParallelConfig
from megatron_r1v2.models.r1v2 import R1V2Model
from megatron_r1v2.parallel import groups
from megatron_r1v2.parallel.groups import ParallelContext
from tests.generation.worlds import start
from tests.ranks import free_port
from tests.tiny_hf import tiny_hf_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> str:
    folder: Path = tmp_path_factory.mktemp("model")
    tiny_hf_model(folder)
    return str(folder)


@pytest.fixture(scope="module")
def one_rank(model_folder) -> Iterator[tuple[R1V2Model, ParallelContext]]:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_PORT", str(free_port()))
        yield start(model_folder, ParallelConfig())
    groups.shut_down()
