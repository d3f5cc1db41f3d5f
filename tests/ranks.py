"""Runs a function in several gloo processes, as torchrun would, and gives back what each returned."""

from __future__ import annotations

import os
import pickle
import random
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch.multiprocessing as multiprocessing


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 240.0) -> list[Any]:
    """Call `function(*args)` in `world_size` processes and return the results by rank.

    `function` must be importable (top level of a test module); it starts the process groups itself. Results and
    arguments are pickled. The first rank that fails ends the others and its traceback is shown.

    Raises:
        AssertionError: a rank failed, or `timeout` seconds passed.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        context = forked_context()
        processes = [
            context.Process(target=_rank_main, args=(rank, world_size, port, folder, function, args), daemon=False)
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            _wait(processes, Path(folder), timeout)
            return [pickle.loads((Path(folder) / f"{rank}.result").read_bytes()) for rank in range(world_size)]
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()


def forked_context() -> Any:
    """Return a multiprocessing context whose processes start with megatron-core imported, and nothing else done."""
    # megatron-core asks for a GPU while it is imported. torch would ask CUDA, which no fork of the server could use any
    # more; with this it asks the driver's management library.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    return context


def _wait(processes: list[Any], folder: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while any(process.is_alive() for process in processes):
        failed = [rank for rank, process in enumerate(processes) if process.exitcode not in (None, 0)]
        if failed or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    failed = [rank for rank, process in enumerate(processes) if process.exitcode not in (None, 0)]
    if failed:
        reports = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime)
        told = reports[0].read_text() if reports else f"exit code {processes[failed[0]].exitcode}, no traceback"
        raise AssertionError(f"rank {reports[0].stem if reports else failed[0]} of {len(processes)} failed:\n{told}")
    running = [rank for rank, process in enumerate(processes) if process.is_alive()]
    if running:
        raise AssertionError(f"ranks {running} of {len(processes)} still ran after {timeout} s")


def _rank_main(rank: int, world_size: int, port: int, folder: str, function: Callable[..., Any], args: Any) -> None:
    enter_rank(rank, world_size, port)
    import torch

    try:
        result = function(*args)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # rank 0 holds the store: it must not leave first
        (Path(folder) / f"{rank}.result").write_bytes(pickle.dumps(result))
    except BaseException:
        (Path(folder) / f"{rank}.error").write_text(traceback.format_exc())
        # Other ranks wait in a collective: they are killed, so nothing is cleaned up here.
        _leave(1)
    _leave(0)


def enter_rank(rank: int, world_size: int, port: int) -> None:
    """Give this process the environment that torchrun gives a rank, and one thread."""
    os.environ.update(
        OMP_NUM_THREADS="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
    )
    import torch

    torch.set_num_threads(1)


def _leave(code: int) -> NoReturn:
    """Exit at once, but not without the children: megatron-core's checkpoint writer keeps a manager process."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


def free_port() -> int:
    """Return a port that nothing listens on, below those that systems give to outgoing connections."""
    # One of those could go to a connection of another test before the caller listens.
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
