"""The options of both servers: limits on a request, the address, and the key that clients must send."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeVar, get_args

from annotated_types import Ge
from pydantic import BaseModel, ConfigDict, Field, ValidationError

Options = TypeVar("Options", bound=BaseModel)


class ServerOptions(BaseModel):
    """The options that both servers have."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    host: str = Field("127.0.0.1", description="address to listen on; 127.0.0.1 is this machine alone")
    port: int = Field(8000, ge=0, description="0: any that is free")
    max_body_mib: float = Field(64.0, gt=0, description="largest request")
    api_key_variable: str = Field("", description="environment variable with the key clients must send")
    api_key_file: str = Field("", description="file with the key clients must send")


class ChatOptions(ServerOptions):
    """The options of a chat server; the settings of the model and of generation are those of the recipe."""

    name: str = Field("", description="of the model, for clients (default: the folder's name)")
    reasoning_ends: str = Field("", description="such as '</think>': the text before it is sent as reasoning_content")
    max_queue: int = Field(256, ge=0, description="responses that may wait beside generation.max_requests under way")
    request_seconds: float = Field(3600.0, gt=0, description="a request that takes longer is ended")
    grace_seconds: float = Field(20.0, ge=0, description="for the responses under way at SIGTERM")


class RewardOptions(ServerOptions):
    """The options of a reward server."""

    port: int = Field(8001, ge=0, description="0: any that is free")
    device: str = Field("", description="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="of the model's weights")


def parse_options(
    model: type[Options], parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, Options]:
    """Add an option for each field of a model and parse the arguments; exit 2 on bad ones."""
    for name, field in model.model_fields.items():
        default = "" if field.default == "" else f" (default: {field.default})"
        text, choices = f"{field.description}{default}", get_args(field.annotation) or None
        parser.add_argument(_option(name), default=field.default, help=text, choices=choices)
    # Intermixed: options may stand between CHECKPOINT and its settings.
    arguments = parser.parse_intermixed_args(argv)
    try:
        return arguments, model.model_validate(vars(arguments))
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        kind = "a whole number" if model.model_fields[name].annotation is int else "a number"
        bound = ", 0 or more" if Ge(0) in model.model_fields[name].metadata else " above 0"
        parser.error(f"argument {_option(name)}: {getattr(arguments, name)!r}; accepted: {kind}{bound}")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


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
    if file and not Path(file).is_file():
        raise ValueError(f"--api-key-file {file!r} is not a file")
    key = (Path(file).read_text(encoding="utf-8") if file else os.environ.get(variable, "")).strip()
    if not key and (variable or file):
        where = f"--api-key-file {file}" if file else f"--api-key-variable {variable}"
        raise ValueError(f"{where}: there is no key in it; without the option clients need none")
    return key


def bind(host: str, port: int) -> socket.socket:
    """Reserve an address of this machine; nothing is accepted yet. Port 0: any that is free.

    Raises:
        ValueError: it is in use, or not an address of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        # A server that is started again must not wait for the connections of the last one to be forgotten.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        raise ValueError(f"--host {host} --port {port}: cannot listen there: {error}; choose another") from error
    return listener
