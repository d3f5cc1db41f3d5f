"""The manifest of a run's checkpoint: written by all ranks when it is saved, compared by all before it is loaded.

Each rank reads back the files it wrote (well below a second for the 1.3 GB of an adapter with its optimizer); before
loading, the files are dealt out to all ranks.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

import torch.distributed as dist

from megatron_r1v2.checkpoint.manifest import MANIFEST, Manifest, file_entry, listed_files, write_manifest
from megatron_r1v2.parallel import objects

_EARLIER_NAME = "manifest.json"
"""Of the development versions whose formats had no number."""
_OF_RANK = re.compile(r"(?:__(\d+)_\d+\.distcp|rng-(\d+)\.pt)$")


def write_run_manifest(folder: Path, *, random_parts: Collection[str] = ()) -> None:
    """Collective over the world: write the manifest of a checkpoint whose other files are all on the disk.

    Args:
        random_parts: those of its parts whose weights were drawn and never trained.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = [path for path in listed_files(folder) if _writer(path) % size == rank]
    entries = objects.all_gather({str(path.relative_to(folder)): file_entry(path) for path in mine})
    if rank == 0:
        files = {name: entry for part in entries for name, entry in sorted(part.items())}
        write_manifest(folder, files, random_parts=random_parts)


def check_manifest(folder: Path) -> str | None:
    """Collective over the world: return how a finished checkpoint differs from its manifest; None: it does not.

    Returns:
        The same sentence on all ranks.

    Raises:
        ValueError: on all ranks, when a development version without format numbers wrote the checkpoint.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    is_earlier, manifest, damage = objects.all_gather(_read(folder) if rank == 0 else (False, None, None))[0]
    if is_earlier:
        raise ValueError(
            f"{folder} was written by an earlier development version of this program, whose checkpoints are not read "
            "any more; set run.output_dir to a new folder and train again"
        )
    if manifest is None:
        return damage
    found = (manifest.find_damage(name) for name in sorted(manifest.files)[rank::size])
    return next(filter(None, objects.all_gather(next(filter(None, found), None))), None)


def _read(folder: Path) -> tuple[bool, Manifest | None, str | None]:
    if (folder / _EARLIER_NAME).is_file() and not (folder / MANIFEST).exists():
        return True, None, None
    try:
        return False, Manifest(folder), None
    except (OSError, ValueError) as error:
        return False, None, f"{MANIFEST} is not readable ({error})"


def _writer(path: Path) -> int:
    """Return the rank that wrote a file, whose node may have it in memory still; the first for files of no rank."""
    found = _OF_RANK.search(path.name)
    return int(found[1] or found[2]) if found else 0
