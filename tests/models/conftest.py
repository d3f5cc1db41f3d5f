"""One rank in the test process itself."""

from collections.abc import Iterator

import pytest
import torch

from megatron_r1v2.config.schema import ParallelConfig
from megatron_r1v2.parallel import groups
from megatron_r1v2.parallel.groups import ParallelContext
from tests.ranks import free_port


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_PORT", str(free_port()))
        yield groups.initialize(ParallelConfig(), seed=1)
    groups.shut_down()
