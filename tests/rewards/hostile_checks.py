"""Checks that do to their worker what hostile answers can do; test_verifiers.py runs them in real workers."""

import ctypes
import os
import re
import signal
import sys
import time
from pathlib import Path


def echo(value):
    return value


def loaded_modules():
    return sorted(sys.modules)


def busy_loop():
    while True:
        pass


def catastrophic_regex():
    return re.match(r"(a+)+$", "a" * 60 + "b") is None


def huge_power():
    return 9**9**9 > 0


def stop_itself():
    """Hang where the worker's own alarm cannot reach: only the pool's deadline ends this."""
    os.kill(os.getpid(), signal.SIGSTOP)


def exit_at_once():
    os._exit(0)


def segfault():
    ctypes.string_at(0)


def take_all_memory():
    return len(bytearray(1 << 40))


def raise_error():
    return {}["missing"]


def recurse():
    return recurse() + 1


def kill_itself():
    os.kill(os.getpid(), signal.SIGKILL)


def sleep(seconds):
    time.sleep(seconds)
    return os.getpid()


def interrupt_trainer(seconds):
    os.kill(os.getppid(), signal.SIGUSR2)
    return sleep(seconds)


def meet(folder, count):
    """Return when so many workers are here."""
    (Path(folder) / str(os.getpid())).touch()
    while len(list(Path(folder).iterdir())) < count:
        time.sleep(0.01)
    return os.getpid()
