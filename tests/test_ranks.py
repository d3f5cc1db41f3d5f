"""The launcher of the distributed tests: results by rank, and no test hangs on a failed rank."""

import os
import time

import pytest

from tests.ranks import run_ranks


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


def how_torch_looks_for_a_gpu() -> str | None:
    return os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK")


def test_ranks_are_forked_from_a_server_that_has_not_asked_cuda():
    """Once CUDA itself has been asked how many devices there are, torch refuses them to every fork."""
    assert run_ranks(1, how_torch_looks_for_a_gpu) == ["1"], "the server had it before its imports"
