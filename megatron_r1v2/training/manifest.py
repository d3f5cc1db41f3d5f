"""The files of a checkpoint and their checksums: written when it is saved, compared before it is loaded.

CRC-32, which a CPU core computes at 1 to 3 GB/s: it is to find damage, not malice. Each rank reads back the files it
wrote (about a second for the 1.3 GB of an adapter with its optimizer); before loading, the files are dealt out to all
ranks.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch.distributed as dist

from megatron_r1v2.parallel import objects

MANIFEST = "manifest.json"
_BYTES_AT_ONCE = 2**24
_OF_RANK = re.compile(r"(?:__(\d+)_\d+\.distcp|rng-(\d+)\.pt)$")


def write_manifest(folder: Path) -> None:
    """Collective over the world: write the manifest of a checkpoint that is complete but for it.

    Args:
        folder: all of its files are on the disk.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    files = [path for path in _files(folder) if _writer(path) % size == rank]
    parts = objects.all_gather(_describe(folder, files))
    if rank == 0:
        listed = {name: entry for part in parts for name, entry in part.items()}
        with (folder / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump({"files": listed}, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())


def check_manifest(folder: Path) -> str | None:
    """Collective over the world: compare a checkpoint with its manifest.

    Args:
        folder: a finished checkpoint.

    Returns:
        What is wrong, the same on all ranks; None: nothing.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    try:
        listed = _read(folder) if rank == 0 else {}
        found = None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        listed, found = {}, f"{MANIFEST} is not readable ({error})"
    listed, found = objects.all_gather((listed, found))[0]
    if found is None:
        found = next((told for told in objects.all_gather(_first_wrong(folder, listed, rank, size)) if told), None)
    return found


def _read(folder: Path) -> dict[str, tuple[int, int]]:
    listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    return {name: (size, checksum) for name, (size, checksum) in listed.items()}


def _first_wrong(folder: Path, listed: Mapping[str, tuple[int, int]], rank: int, size: int) -> str | None:
    for name in sorted(listed)[rank::size]:
        expected_size, expected_sum = listed[name]
        path = folder / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected_size:
                return f"{name} has {path.stat().st_size} bytes instead of {expected_size}"
            if _checksum(path) != expected_sum:
                return f"{name} has other content than when it was written"
        except OSError as error:  # of a bad disk: told to the other ranks too
            return f"{name} cannot be read ({error})"
    return None


def _describe(folder: Path, files: Iterable[Path]) -> dict[str, list[int]]:
    return {str(path.relative_to(folder)): [path.stat().st_size, _checksum(path)] for path in files}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _writer(path: Path) -> int:
    """Return the rank that wrote a file, whose node may have it in memory still; the first for what has no rank."""
    found = _OF_RANK.search(path.name)
    return int(found[1] or found[2]) if found else 0


def _checksum(path: Path) -> int:
    total = 0
    with path.open("rb") as file:
        while block := file.read(_BYTES_AT_ONCE):
            total = zlib.crc32(block, total)
    return total
