"""Where a server listens, and the key that its clients must send."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def read_api_key(variable: str, file: str = "") -> str:
    """Return the key that clients must send, or "" for none.

    Args:
        variable: environment variable that holds it (--api-key-variable); empty: none.
        file: that holds it (--api-key-file); empty: none.

    Raises:
        ValueError: both are given, or there is no key where one should be.
    """
    if variable and file:
        raise ValueError("--api-key-variable and --api-key-file are two places of one key; give one of them")
    if file:
        path = Path(file)
        if not path.is_file():
            raise ValueError(f"--api-key-file {file!r} is not a file")
        key = path.read_text(encoding="utf-8").strip()
    elif variable:
        key = os.environ.get(variable, "").strip()
    else:
        return ""
    if not key:
        where = f"--api-key-file {file}" if file else f"--api-key-variable {variable}"
        raise ValueError(f"{where}: there is no key in it; without the option clients need none")
    return key


def bind(host: str, port: int) -> socket.socket:
    """Reserve an address; nothing is accepted yet.

    Args:
        host: name or address of this machine.
        port: 0 for any that is free.

    Raises:
        ValueError: it is in use, or is none of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        raise ValueError(f"--host {host} --port {port}: cannot listen there: {error}; choose another") from error
    return listener
