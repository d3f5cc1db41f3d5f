"""Signals come to every process of a job step: the trainer hears them, what it has started works on."""

from __future__ import annotations

import subprocess
import sys

import pytest

# In a process of its own, as torchrun starts it: one from a fork server has inherited a resource tracker, and starting
# that one is what unblocks SIGTERM.
TRAINER = """
import multiprocessing, os, signal, sys, time
import torch
from megatron_r1v2.resilience.signals import StopSignals

def write(queue):
    time.sleep(1)
    queue.put("written")

if __name__ == "__main__":
    number = signal.Signals[sys.argv[1]]
    with StopSignals(torch.device("cpu")) as stop_signals:
        manager = multiprocessing.get_context("spawn").Manager()  # as megatron-core's checkpoint writer does
        queue = manager.Queue()
        writer = multiprocessing.get_context("fork").Process(target=write, args=(queue,))
        writer.start()
        os.killpg(0, number)
        writer.join()
        assert writer.exitcode == 0, writer.exitcode
        print(queue.get(timeout=5), number in stop_signals._received, flush=True)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_to_all_processes_does_not_end_the_checkpoint_writer_and_its_manager(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TRAINER, name],
        start_new_session=True,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "written True\n"), done.stderr
