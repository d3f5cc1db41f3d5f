"""What a user's path is: a Hugging Face folder, a run, a checkpoint or exported parts; and whether a base is right."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_r1v2.checkpoint.hf.config import layout_of
from megatron_r1v2.checkpoint.hf.folders import read_json
from megatron_r1v2.checkpoint.hf.mapping import LAYOUTS
from megatron_r1v2.checkpoint.hf.safetensors_files import tensor_info
from megatron_r1v2.checkpoint.manifest import combined, in_threads, sha256, tensor_entry
from megatron_r1v2.checkpoint.megatron.parameter_names import dist_entry
from megatron_r1v2.checkpoint.megatron.run_folder import RECIPE_FILE, resolve_checkpoint
from megatron_r1v2.checkpoint.megatron.tensor_checksum import MODULUS, tensor_checksum
from megatron_r1v2.checkpoint.sources import HF_IN_CHECKPOINT, PARTS_FILE, CheckpointSpec, HfSpec, Source, SourceSpec
from megatron_r1v2.models.architecture import R1V2Architecture

ALL_PARTS = ("adapter", "language", "vision")
PARTS_VERSION = 2
"""Of parts.json; version 1 said nothing of the base's architecture."""


def open_any(path: Path, base: Path | None = None) -> tuple[str, SourceSpec]:
    """Find out what a user names.

    Args:
        path: a Hugging Face folder of a whole model in either layout, a run, a checkpoint, or exported parts.
        base: what it was made from, where that is needed; None: what a run's recipe names.

    Returns:
        A word for its kind, and how to open it.

    Raises:
        ValueError: it is none of these.
    """
    if (path / PARTS_FILE).is_file():
        stated = read_parts(path)
        if base is None:
            raise ValueError(f"{path} holds parts alone; give --base, the model that they belong to")
        return "parts", HfSpec(path, base, tuple(stated["parts"]), stated["layout"])
    if (path / "config.json").is_file():
        return layout_of(read_json(path / "config.json")), HfSpec(path)
    checkpoint = resolve_checkpoint(path)
    base = base or recipe_base(checkpoint)
    return "checkpoint", CheckpointSpec(checkpoint, base, only_stored=True)


def read_parts(folder: Path) -> dict[str, Any]:
    """Read what `parts export` says of the parts.

    Raises:
        ValueError: the folder is not of `parts export`, or of one of another version.
    """
    path = folder / PARTS_FILE
    if not path.is_file():
        raise ValueError(f"{folder} has no {PARTS_FILE}; give a folder that `parts export` wrote")
    stated = read_json(path)
    if stated.get("version") != PARTS_VERSION:
        raise ValueError(f"{path} has version {stated.get('version')!r}; accepted: {PARTS_VERSION}; export again")
    parts = stated.get("parts")
    valid = {
        "parts": isinstance(parts, list) and bool(parts) and all(part in ALL_PARTS for part in parts),
        "layout": stated.get("layout") in LAYOUTS,
        "step": isinstance(stated.get("step"), int),
        "base_sha256": isinstance(stated.get("base_sha256"), str),
    }
    damaged = [key for key, good in valid.items() if not good]
    if damaged:
        raise ValueError(f"{path} is damaged: {', '.join(damaged)} is missing or is none; export again")
    return stated


def recipe_base(checkpoint: Path) -> Path | None:
    """Return the Hugging Face folder that a run started from, as its recipe names it; None: it is not there."""
    if (checkpoint / HF_IN_CHECKPOINT / "config.json").is_file():
        return None
    named = _named_base(checkpoint)
    return named if named and (named / "config.json").is_file() else None


def _named_base(checkpoint: Path) -> Path | None:
    recipe = checkpoint / RECIPE_FILE
    if not recipe.is_file():
        return None
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    named = (content.get("model") or {}).get("hf_path") if isinstance(content, dict) else None
    return Path(named) if named else None


def check_base(base: Path, checkpoint: Path, state: Mapping[str, Any], *, workers: int) -> None:
    """Refuse a base that is not the model that a run started from.

    Args:
        base: a Hugging Face folder of a whole model.
        checkpoint: of the run.
        state: what is beside its tensors.
        workers: threads.

    Raises:
        ValueError: the run's record of its base (architecture, checksums of what was not trained) is of another model;
            or there is no record, and the run's recipe names another folder.
    """
    rest = [part for part in ALL_PARTS if part not in state["parts"]]
    if not rest:
        return
    record = state.get("base", {})
    wrong = f"{base} is not the model that {checkpoint} was trained on: "
    unproven = [part for part in rest if part not in record.get("checksums", {})]
    if unproven:
        named = _named_base(checkpoint)
        if named is not None and named.is_dir() and named.resolve() != base.resolve():
            raise ValueError(f"{wrong}its recipe names {named}; give that as --base")
        print(
            f"warning: {checkpoint} has no checksum of the {' and '.join(unproven)} weights that it was trained on; "
            f"whether those of {base} are the same is not known",
            file=sys.stderr,
        )
    with HfSpec(base).open() as source:
        if record and _as_json(source.architecture) != _as_json(record["architecture"]):
            raise ValueError(
                f"{wrong}its architecture is {_as_json(source.architecture)}, that of the model trained on "
                f"{_as_json(record['architecture'])}"
            )
        for part in rest if record else ():
            found = _checksum_of(source, part, getattr(torch, record["dtype"]), workers=workers)
            expected = record["checksums"].get(part, found)
            if found != expected:
                raise ValueError(
                    f"{wrong}the checksum of its {part} weights in {record['dtype']} is {found:016x}, that of the "
                    f"model trained on {expected:016x}"
                )


def _checksum_of(source: Source, part: str, dtype: torch.dtype, *, workers: int) -> int:
    """Return the checksum that training computes of a part (`weight_checksums`)."""

    def checksum(ours: str) -> int:
        key = dist_entry(ours, source.architecture).key
        return int(tensor_checksum(source.parameter(ours).to(dtype), key))

    return sum(in_threads(checksum, _names_of(source, [part]), workers=workers).values()) % MODULUS


def _names_of(source: Source, parts: Iterable[str]) -> list[str]:
    return [name for name in source.names() if name.split(".")[0] in parts]


def _as_json(architecture: R1V2Architecture | Mapping[str, Any]) -> str:
    sizes = asdict(architecture) if isinstance(architecture, R1V2Architecture) else architecture
    return json.dumps(sizes, sort_keys=True)


def digest_of(source: Source, *, parts: tuple[str, ...], workers: int) -> str:
    """Return one SHA-256 of a model's architecture and some of its parts, whatever it is stored as.

    Args:
        source: open.
        parts: which.
        workers: threads.
    """

    def entry(ours: str) -> dict[str, Any]:
        tensor = source.parameter(ours)
        return tensor_entry(tensor_info(tensor), sha256(tensor))

    weights = combined(in_threads(entry, _names_of(source, parts), workers=workers))
    return hashlib.sha256(f"{_as_json(source.architecture)}\n{weights}".encode()).hexdigest()
