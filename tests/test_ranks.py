"""The launcher of the distributed tests: results by rank, and no test hangs on a failed rank."""

import os
import subprocess
import sys
import time

import pytest

from tests.ranks import forked_context, run_ranks


def describe(what: str) -> tuple:
    return what, os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["OMP_NUM_THREADS"]


def fail_on_one(rank: str) -> None:
    if os.environ["RANK"] == rank:
        raise KeyError("the reason")
    time.sleep(600)


def test_results_come_by_rank():
    assert run_ranks(2, describe, "x") == [("x", "0", "2", "1"), ("x", "1", "2", "1")]


def test_a_failing_rank_ends_the_others_and_shows_its_traceback():
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"(?s)rank 1 of 2 failed.*in fail_on_one.*KeyError: 'the reason'"):
        run_ranks(2, fail_on_one, "1")
    assert time.monotonic() - start < 60


def test_ranks_that_hang_are_ended():
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] of 2 still ran after 4 s"):
        run_ranks(2, fail_on_one, "none", timeout=4)


# A torch with CUDA, which keeps a device from the forks of a process that has asked CUDA how many there are.
WITH_A_GPU = """
import torch

asked = []
torch._C._cuda_getDeviceCount = lambda: asked.append("CUDA") or 1
torch.cuda._device_count_nvml = lambda: 1
torch.cuda._lazy_init = lambda: asked.append("a device")
import tests.preloaded

print(torch.cuda.is_available(), asked)
"""


def test_ranks_that_are_forked_can_use_a_gpu():
    forked_context()
    done = subprocess.run([sys.executable, "-c", WITH_A_GPU], capture_output=True, text=True)
    assert done.stdout == "True []\n", done.stderr
