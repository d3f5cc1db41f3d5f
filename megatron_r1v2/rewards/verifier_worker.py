"""The process that runs one check at a time for a `VerifierPool`; it imports the standard library only, to start fast.

Messages on the socket: the pool sends 8 bytes of length and a JSON list [module, function, arguments, imports]; the
worker answers STARTED when all these modules are imported (imports do not count against the time limit), then 8 bytes
of length and the result as JSON. A check that raises ends the process: the pool counts and replaces it.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import resource
import select
import signal
import socket
import struct
import sys

from megatron_r1v2.rewards.function_file import load_file

STARTED = b"S"
LENGTH = struct.Struct("!Q")

# A hostile answer must not take the training's memory: beyond this the check alone gets a MemoryError.
_MEMORY_BYTES = 4 << 30
_ORPHAN_POLL_SECONDS = 1.0
# The pool ends a check at its limit; this much later the kernel does, in case the pool's process is gone.
_ORPHAN_GRACE_SECONDS = 2.0


def read_exactly(connection: socket.socket, size: int) -> bytes | None:
    """Return `size` bytes, or None when the other end is gone."""
    chunks = []
    while size:
        try:
            chunk = connection.recv(min(size, 1 << 20))
        except (ConnectionResetError, TimeoutError):
            return None
        if not chunk:
            return None
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)


def serve(connection: socket.socket, *, parent: int, timeout_seconds: float) -> None:
    """Run checks until the pool closes the socket or its process ends.

    Args:
        connection: the worker's end of the socket pair.
        parent: process id of the pool.
    """
    waiting = select.poll()  # select.select refuses the high file descriptors that a process with many groups has
    waiting.register(connection, select.POLLIN)
    while True:
        # A forked child of the pool's process may hold the socket open, so the end of the socket alone may never come.
        while not waiting.poll(_ORPHAN_POLL_SECONDS * 1000):
            if os.getppid() != parent:
                return
        header = read_exactly(connection, LENGTH.size)
        body = read_exactly(connection, LENGTH.unpack(header)[0]) if header is not None else None
        if body is None:
            return
        module, function, arguments, imports = json.loads(body)
        for name in imports:
            if name.endswith(".py"):
                load_file(name)
            else:
                importlib.import_module(name)
        check = getattr(importlib.import_module(module), function)
        connection.sendall(STARTED)
        # The default action of SIGALRM ends the process even inside a C function that never returns.
        signal.setitimer(signal.ITIMER_REAL, timeout_seconds + _ORPHAN_GRACE_SECONDS)
        result = json.dumps(check(*arguments)).encode()
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.sendall(LENGTH.pack(len(result)) + result)


def main() -> None:
    """Run a worker: arguments are the socket's file descriptor, the pool's process id and the time limit."""
    # Schedulers and terminals signal every process of a job; the training process acts on it and ends its workers.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # hostile text can crash it a thousand times a step
    if sys.platform == "linux":  # macOS refuses this limit
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    logging.disable(logging.WARNING)  # math-verify warns that its own time limit is off
    sys.tracebacklimit = 3  # a crash is counted by the pool; a thousand frames of sympy help nobody
    file_descriptor, parent, timeout_seconds = sys.argv[1:]
    # No `with`: the pool kills a worker whose socket closes, and an error must reach stderr before that. The traceback
    # keeps this frame, and with it the socket, until it is printed.
    connection = socket.socket(fileno=int(file_descriptor))
    serve(connection, parent=int(parent), timeout_seconds=float(timeout_seconds))


if __name__ == "__main__":
    main()
