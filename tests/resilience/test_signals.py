"""Signals come to every process of a job step: the trainer hears them, what it has started works on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from megatron_r1v2.config.schema import ParallelConfig
from megatron_r1v2.parallel import groups
from megatron_r1v2.resilience.signals import StepAbandoned, StopSignals, shutdown_timeout, torchrun_patience
from tests.ranks import run_ranks

# In a process of its own, as torchrun starts it: one from a fork server has inherited a resource tracker, and starting
# that one is what unblocks SIGTERM. Its forks have none yet, and share the import of torch.
TRAINERS = """
import multiprocessing, os, signal, sys, time
import torch
from megatron_r1v2.resilience.signals import StopSignals

def write(queue):
    time.sleep(1)
    queue.put("written")

def train(number):
    with StopSignals(torch.device("cpu")) as stop_signals:
        manager = multiprocessing.get_context("spawn").Manager()  # as megatron-core's checkpoint writer does
        queue = manager.Queue()
        writer = multiprocessing.get_context("fork").Process(target=write, args=(queue,))
        writer.start()
        os.killpg(0, number)
        writer.join()
        assert writer.exitcode == 0, writer.exitcode
        print(number.name, queue.get(timeout=60), number in stop_signals._received, flush=True)

if __name__ == "__main__":
    for name in sys.argv[1:]:
        trainer = os.fork()
        if not trainer:
            os.setsid()
            train(signal.Signals[name])
            sys.exit()
        _, status = os.waitpid(trainer, 0)
        assert status == 0, (name, status)
"""


def test_a_signal_to_all_processes_does_not_end_the_checkpoint_writer_and_its_manager() -> None:
    names = ("SIGTERM", "SIGUSR1", "SIGINT")
    done = subprocess.run(
        [sys.executable, "-c", TRAINERS, *names], capture_output=True, text=True, check=False, timeout=120
    )
    told = [f"{name} written True" for name in names]
    assert (done.returncode, done.stdout.splitlines()) == (0, told), done.stderr


@pytest.fixture
def heard() -> Iterator[StopSignals]:
    groups.initialize(ParallelConfig(), seed=1)
    with StopSignals(torch.device("cpu")) as stop_signals:
        yield stop_signals
    groups.shut_down()


def send(stop_signals: StopSignals, number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    deadline = time.monotonic() + 30
    while number not in stop_signals._received and time.monotonic() < deadline:
        time.sleep(0.01)


def test_the_most_urgent_signal_counts(heard: StopSignals) -> None:
    assert heard.sync_stop_signal() is None
    send(heard, signal.SIGUSR1)
    assert heard.sync_stop_signal() is signal.SIGUSR1
    assert not heard.is_abandon_asked
    heard.abandon_step_if_asked()  # SIGUSR1 lets the step finish
    send(heard, signal.SIGTERM)
    assert heard.sync_stop_signal() is signal.SIGTERM
    with pytest.raises(StepAbandoned):
        heard.abandon_step_if_asked()


def test_ctrl_c_lets_the_step_finish_and_once_more_gives_it_up(heard: StopSignals, capsys) -> None:
    send(heard, signal.SIGINT)
    assert heard.sync_stop_signal() is signal.SIGINT
    heard.abandon_step_if_asked()
    assert "Ctrl-C once more gives it up" in capsys.readouterr().err
    heard._received.clear()
    heard._received.add(signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    deadline = time.monotonic() + 30
    while not heard.is_abandon_asked and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(StepAbandoned, match="a second SIGINT"):
        heard.abandon_step_if_asked()


def test_ctrl_c_under_a_launcher_without_patience_gives_a_long_step_up_in_time(capsys) -> None:
    """torchrun kills its workers some seconds after Ctrl-C: 1 s is kept beside the grace."""
    groups.initialize(ParallelConfig(), seed=1)
    with StopSignals(torch.device("cpu"), grace_seconds=5.0, patience_seconds=8.0) as stop_signals:
        send(stop_signals, signal.SIGINT)
        stop_signals.abandon_step_if_asked()
        time.sleep(2.1)
        with pytest.raises(StepAbandoned, match=r"SIGINT, 8 s before torchrun kills"):
            stop_signals.abandon_step_if_asked()
    groups.shut_down()
    assert "start torchrun with --shutdown-timeout 3600" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "environment", "seconds"),
    [
        ("python torchrun --nproc-per-node 2 -m megatron_r1v2", {}, 30.0),
        ("python torchrun --shutdown-timeout 3600 -m megatron_r1v2", {}, 3600.0),
        ("python torchrun --shutdown_timeout=90 -m megatron_r1v2", {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}, 90.0),
        ("python torchrun -m megatron_r1v2", {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}, 5.0),
        ("", {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5", "PET_SHUTDOWN_TIMEOUT": "7"}, 7.0),
    ],
)
def test_the_patience_of_torchrun_is_that_of_its_command(command: str, environment: dict, seconds: float) -> None:
    assert shutdown_timeout(command.split(), environment) == seconds


def test_a_process_that_torchrun_did_not_start_is_not_killed_by_it(monkeypatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert torchrun_patience() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "8")
    assert torchrun_patience() == 8.0


def test_handlers_and_mask_are_as_before_when_the_block_ends(heard: StopSignals) -> None:
    inside = signal.getsignal(signal.SIGTERM)
    with StopSignals(torch.device("cpu")):
        assert signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert signal.getsignal(signal.SIGTERM) == inside


GRACE = """
import os, signal, time
import torch
from megatron_r1v2.resilience.signals import StopSignals

with StopSignals(torch.device("cpu"), grace_seconds=0.5) as stop_signals:
    stop_signals.call_before_leaving(lambda: print("where the ranks were", flush=True))
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


def test_a_process_that_goes_on_after_sigterm_ends_within_its_grace() -> None:
    done = subprocess.run([sys.executable, "-c", GRACE], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 128 + signal.SIGTERM
    assert "since SIGTERM came checkpoint.grace_seconds=0.5 ago; start again" in done.stderr
    assert done.stdout == "where the ranks were\n"


def agree() -> tuple[signal.Signals | None, bool]:
    groups.initialize(ParallelConfig(), seed=1)
    with StopSignals(torch.device("cpu")) as stop_signals:
        if dist.get_rank() == 1:
            send(stop_signals, signal.SIGTERM)
        dist.barrier()
        agreed = stop_signals.sync_stop_signal()
        try:
            stop_signals.abandon_step_if_asked()
        except StepAbandoned:
            return agreed, True
    return agreed, False


def test_a_signal_to_one_rank_stops_all() -> None:
    assert run_ranks(2, agree) == [(signal.SIGTERM, True)] * 2
