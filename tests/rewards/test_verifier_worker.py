"""The worker's side of the protocol, without a pool: what it answers, when it ends, what reaches it."""

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_r1v2.rewards import verifier_worker
from megatron_r1v2.rewards.verifier_worker import LENGTH, STARTED, read_exactly

HERE = str(Path(__file__).parent)
ROOT = str(Path(__file__).parents[2])
SECONDS = 20.0


@contextlib.contextmanager
def worker(*, parent=None, limit=1.0):
    """Start a worker as a pool does, and give its process and the pool's end of the socket."""
    ours, theirs = socket.socketpair()
    ours.settimeout(SECONDS)
    arguments = [str(theirs.fileno()), str(parent or os.getpid()), str(limit)]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "megatron_r1v2.rewards.verifier_worker", *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([HERE, ROOT])},
        stderr=subprocess.PIPE,
        pass_fds=[theirs.fileno()],
        text=True,
    )
    theirs.close()
    try:
        yield process, ours
    finally:
        ours.close()
        process.kill()
        process.communicate()


def ask(connection, module, function, *arguments, imports=()):
    body = json.dumps([module, function, arguments, imports]).encode()
    connection.sendall(LENGTH.pack(len(body)) + body)


def answer_of(connection):
    assert read_exactly(connection, 1) == STARTED
    (size,) = LENGTH.unpack(read_exactly(connection, LENGTH.size))
    return json.loads(read_exactly(connection, size))


def test_messages_are_read_whole_however_they_arrive():
    ours, theirs = socket.socketpair()
    message = os.urandom(3 << 20)
    sender = threading.Thread(target=theirs.sendall, args=(message,))
    sender.start()
    assert read_exactly(ours, 1) == message[:1]
    assert read_exactly(ours, len(message) - 1) == message[1:]
    sender.join()
    assert read_exactly(ours, 0) == b""
    theirs.sendall(b"half")
    theirs.close()
    assert read_exactly(ours, 5) is None
    ours.close()


def test_a_reader_that_waits_too_long_gets_nothing():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(0.05)
        assert read_exactly(ours, 1) is None


def test_it_answers_one_check_after_the_other_and_ends_with_the_socket():
    with worker() as (process, connection):
        for value in ({"a": [1, None]}, "\ud800", 0.1):
            ask(connection, "hostile_checks", "echo", value)
            assert answer_of(connection) == value
        connection.shutdown(socket.SHUT_RDWR)
        assert process.wait(SECONDS) == 0


def test_a_check_that_raises_ends_it_with_a_short_traceback():
    with worker() as (process, connection):
        ask(connection, "hostile_checks", "recurse")
        assert read_exactly(connection, 1) == STARTED
        assert read_exactly(connection, 1) is None
        _, errors = process.communicate(timeout=SECONDS)
        assert process.returncode == 1
        assert "RecursionError" in errors
        assert len(errors.splitlines()) < 20


def test_it_says_started_only_when_everything_is_imported():
    with worker() as (process, connection):
        ask(connection, "hostile_checks", "echo", 1, imports=["broken_import"])
        assert read_exactly(connection, 1) is None
        assert "no_such_module_anywhere" in process.communicate(timeout=SECONDS)[1]


def test_the_kernel_ends_a_check_that_the_pool_does_not():
    with worker(limit=0.2) as (process, connection):
        ask(connection, "hostile_checks", "catastrophic_regex")
        assert process.wait(SECONDS) == -signal.SIGALRM


def test_the_alarm_of_a_check_does_not_hit_the_next_one():
    with worker(limit=-1.7) as (process, connection):  # 0.3 seconds with the grace
        ask(connection, "hostile_checks", "echo", 1)
        assert answer_of(connection) == 1
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.6)


def test_it_ends_when_its_pool_is_gone_though_the_socket_is_open():
    with worker(parent=1) as (process, _):
        assert process.wait(SECONDS) == 0


def test_signals_to_the_job_are_ignored_and_hostile_memory_is_refused():
    with worker() as (process, connection):
        ask(connection, "hostile_checks", "echo", 1)
        assert answer_of(connection) == 1
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            process.send_signal(number)
        limits = resource.prlimit(process.pid, resource.RLIMIT_AS), resource.prlimit(process.pid, resource.RLIMIT_CORE)
        assert limits == ((4 << 30, 4 << 30), (0, 0))
        ask(connection, "hostile_checks", "take_all_memory")
        assert read_exactly(connection, 1) == STARTED
        assert "MemoryError" in process.communicate(timeout=SECONDS)[1]


def test_serving_stops_in_the_middle_of_a_message():
    ours, theirs = socket.socketpair()
    ours.sendall(LENGTH.pack(100) + b"[")
    ours.close()
    with theirs:
        verifier_worker.serve(theirs, parent=os.getppid(), timeout_seconds=1.0)


def test_a_file_is_imported_before_the_time_limit_begins(tmp_path):
    path = tmp_path / "slow.py"
    path.write_text("import time\ntime.sleep(1.5)\ndef f(**_): return 0.5\n")
    with worker(limit=0.5) as (_, ours):
        ask(ours, "megatron_r1v2.rewards.function_file", "score_response", str(path), "f", {}, imports=[str(path)])
        assert answer_of(ours) == [{"": 0.5}, ""]
