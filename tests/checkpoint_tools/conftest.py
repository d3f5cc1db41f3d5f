"""One rank in the test process itself."""

import socket
from collections.abc import Iterator

import pytest
import torch

from megatron_r1v2.config.schema import ParallelConfig
from megatron_r1v2.parallel import groups
from megatron_r1v2.parallel.groups import ParallelContext


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        patch.setenv("MASTER_PORT", str(probe.getsockname()[1]))
        probe.close()
        yield groups.initialize(ParallelConfig(), seed=1)
    groups.shut_down()
