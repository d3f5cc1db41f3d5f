"""The trained parts of a run as a folder of their own, and the whole model made of them and their base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_r1v2.checkpoint.base_model import check_base, recipe_base
from megatron_r1v2.checkpoint.conversion import RunOptions, convert
from megatron_r1v2.checkpoint.destinations import HfCompanions, HfConversion, HfFormat, write_hf
from megatron_r1v2.checkpoint.hf.config import folder_layout
from megatron_r1v2.checkpoint.hf.folders import read_json
from megatron_r1v2.checkpoint.hf.mapping import LAYOUTS, Layout
from megatron_r1v2.checkpoint.hf.refusals import check_folder
from megatron_r1v2.checkpoint.identity import model_digest
from megatron_r1v2.checkpoint.manifest import ALL_PARTS
from megatron_r1v2.checkpoint.megatron.run_folder import load_state, resolve_checkpoint
from megatron_r1v2.checkpoint.sources import CheckpointSpec, HfSpec, OverlaySpec
from megatron_r1v2.resilience.files import write_json

PARTS_FILE = "parts.json"
_VERSION = 2
"""Version 1 said nothing of the base's architecture."""
_THREADS = 2


@dataclass(frozen=True)
class TrainedParts:
    """The description of exported parts, as parts.json holds it."""

    parts: tuple[str, ...]
    layout: Layout
    step: int
    base_sha256: str
    """Of the architecture and the other parts of the base (`model_digest`)."""


def read_parts(folder: Path) -> TrainedParts:
    """Read the description that `export_parts` wrote.

    Raises:
        ValueError: `parts export` did not write the folder, or wrote it in another version.
    """
    path = folder / PARTS_FILE
    if not path.is_file():
        raise ValueError(f"{folder} has no {PARTS_FILE}; give a folder that `parts export` wrote")
    stated = read_json(path)
    if stated.get("version") != _VERSION:
        raise ValueError(f"{path} has version {stated.get('version')!r}; accepted: {_VERSION}; export again")
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
    return TrainedParts(tuple(stated["parts"]), stated["layout"], stated["step"], stated["base_sha256"])


def export_parts(
    path: Path, output: Path, *, base: Path | None, dtype: str, options: RunOptions
) -> tuple[TrainedParts, Path]:
    """Write the trained parts of a run alone, and return their description and the base.

    Args:
        path: a run (its newest checkpoint) or a checkpoint.
        base: the model that the run started from; None: the one that its recipe names.
        dtype: a key of DTYPES; empty: that of the checkpoint.

    Raises:
        ValueError: the base is not known, or is not the one that the run was trained on.
    """
    checkpoint = resolve_checkpoint(path)
    base = base or recipe_base(checkpoint)
    if base is None:
        raise ValueError(f"{checkpoint} does not say which model it started from, or that is gone; give --base")
    state = load_state(checkpoint)
    parts = tuple(str(part) for part in state["parts"])
    check_base(base, checkpoint, state, workers=options.workers or _THREADS)
    layout = folder_layout(base)
    digest = _digest_of_rest(base, parts, workers=options.workers)
    described = TrainedParts(parts, layout, int(state["step"]), digest)

    def write(folder: Path, _: set[torch.dtype]) -> None:
        content = {"version": _VERSION, "parts": list(parts), "layout": layout, "step": described.step}
        write_json(folder / PARTS_FILE, {**content, "base_sha256": digest})

    spec = CheckpointSpec(checkpoint, base, only_stored=True)
    conversion = HfConversion(spec, (checkpoint, base), HfFormat(layout, dtype), parts)
    convert(conversion, output, options, HfCompanions(write))
    return described, base


def apply_parts(folder: Path, output: Path, *, base: Path, form: HfFormat, options: RunOptions) -> TrainedParts:
    """Write a whole model, exported parts over the base that they were trained on, and return their description.

    Args:
        base: a Hugging Face folder of a whole model.

    Raises:
        ValueError: the parts were trained on another model.
    """
    check_folder(folder)
    described = read_parts(folder)
    found = _digest_of_rest(base, described.parts, workers=options.workers)
    if found != described.base_sha256:
        raise ValueError(
            f"{base} is not the model that {folder} was trained on: the checksum of its architecture and weights "
            f"(without {', '.join(described.parts)}) is {found[:12]}, that of the model trained on "
            f"{described.base_sha256[:12]}; a model of the same weights in another dtype is another model too"
        )
    top = HfSpec(folder, base, described.parts, described.layout)
    conversion = HfConversion(OverlaySpec(base, top), (base, folder), form)
    write_hf(conversion, output, companions=base, options=options)
    return described


def _digest_of_rest(base: Path, parts: tuple[str, ...], *, workers: int) -> str:
    """Return the digest of the parts that were not trained."""
    rest = tuple(part for part in ALL_PARTS if part not in parts)
    with HfSpec(base).open() as source:
        return model_digest(source, parts=rest, workers=workers or _THREADS)
