"""The model that a run was trained on: found through its recipe, and refused where training noted another one."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_r1v2.checkpoint.identity import architecture_json
from megatron_r1v2.checkpoint.manifest import ALL_PARTS
from megatron_r1v2.checkpoint.megatron.parameter_names import dist_entry
from megatron_r1v2.checkpoint.megatron.run_folder import HF_IN_CHECKPOINT, RECIPE_FILE
from megatron_r1v2.checkpoint.megatron.tensor_checksum import MODULUS, tensor_checksum
from megatron_r1v2.checkpoint.sources import HfSpec, Source
from megatron_r1v2.checkpoint.tensor_files import in_threads


def recipe_base(checkpoint: Path) -> Path | None:
    """Return the Hugging Face folder that a run's recipe names; None where it is missing or not needed."""
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
        state: of the run (`load_state`).

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
        if record and architecture_json(source.architecture) != architecture_json(record["architecture"]):
            raise ValueError(
                f"{wrong}its architecture is {architecture_json(source.architecture)}, that of the model trained on "
                f"{architecture_json(record['architecture'])}"
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
        # In the precision that training computed in, whose bits it has summed.
        return int(tensor_checksum(source.parameter(ours).to(dtype), key))

    names = [name for name in source.names() if name.split(".")[0] == part]
    return sum(in_threads(checksum, names, workers=workers).values()) % MODULUS
