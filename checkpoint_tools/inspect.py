"""Say what is in a checkpoint: parts, shapes, dtypes, bytes, layout, step. Reads headers only."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from checkpoint_tools.command_line import explained_errors, parser_of
from megatron_r1v2.checkpoint.detection import read_parts
from megatron_r1v2.checkpoint.hf.config import layout_of, read_hf_architecture
from megatron_r1v2.checkpoint.hf.folders import SafetensorsFolder, read_json
from megatron_r1v2.checkpoint.hf.safetensors_files import TensorInfo
from megatron_r1v2.checkpoint.manifest import Manifest
from megatron_r1v2.checkpoint.megatron.run_folder import STATE_FILE, TENSORS, load_state, resolve_checkpoint
from megatron_r1v2.checkpoint.megatron.torch_dist import TorchDist
from megatron_r1v2.checkpoint.sources import HF_IN_CHECKPOINT, PARTS_FILE

EXAMPLE = """example:
  python -m checkpoint_tools.inspect runs/r1v2
  python -m checkpoint_tools.inspect r1v2-38b --tensors
  python -m checkpoint_tools.inspect InternViT-6B-448px-V2_5 --json

Takes Hugging Face folders (whole models in either layout, components, exported parts), single safetensors files, runs
and checkpoints. No weight is read and no code of a folder is run; use verify to look for damage."""
_PREFIXES = {
    "vision_tower": "vision",
    "vision_model": "vision",
    "multi_modal_projector": "adapter",
    "mlp1": "adapter",
    "language_model": "language",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = parser_of("inspect", __doc__, EXAMPLE)
    parser.add_argument("path", type=Path, help="folder, file, run or checkpoint")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    with explained_errors(parser):
        found = describe(options.path, tensors=options.tensors)
        if options.json:
            print(json.dumps(found, indent=2))
        else:
            show(found)


def describe(path: Path, *, tensors: bool) -> dict[str, Any]:
    """Return what is in a checkpoint, as JSON takes it.

    Args:
        path: what the user names.
        tensors: list every tensor.

    Raises:
        ValueError: it is no checkpoint, or its headers are damaged.
    """
    if path.is_file() or any(path.glob("*.safetensors")):
        return _describe_hf(path, tensors=tensors)
    return _describe_checkpoint(resolve_checkpoint(path), tensors=tensors)


def _describe_hf(path: Path, *, tensors: bool) -> dict[str, Any]:
    with SafetensorsFolder(path) as folder:
        infos = {name: folder.info(name) for name in folder.names()}
        files = [file.name for file in folder.paths()]
    found: dict[str, Any] = {"path": str(path), "kind": "safetensors", "files": len(files)}
    if (path / PARTS_FILE).is_file():
        found |= {"kind": "exported parts", **read_parts(path)}
    elif (path / "config.json").is_file():
        model_type = read_json(path / "config.json").get("model_type")
        found |= {"kind": f"component ({model_type})"}
        if model_type in ("internvl", "internvl_chat"):
            architecture, layout = read_hf_architecture(path)
            found |= {"kind": "whole model", "layout": layout, "architecture": asdict(architecture)}
            found |= {"layout": layout_of(read_json(path / "config.json"))}
    found["checksums"] = path.is_dir() and Manifest.of(path) is not None
    return found | _summary(infos, {name: _part_of(name) for name in infos}, tensors=tensors)


def _describe_checkpoint(path: Path, *, tensors: bool) -> dict[str, Any]:
    dist = TorchDist(path / TENSORS)
    infos = {key: dist.array(key) for key in dist.array_names()}
    found: dict[str, Any] = {"path": str(path), "kind": "checkpoint", "layout": "torch_dist"}
    if (path / STATE_FILE).is_file():
        state = load_state(path)
        found |= {key: state[key] for key in ("step", "version", "trained") if key in state}
        found["stored"] = state["parts"]
    if (path / HF_IN_CHECKPOINT / "config.json").is_file():
        found["architecture"] = asdict(read_hf_architecture(path / HF_IN_CHECKPOINT)[0])
    found["files"] = len(list((path / TENSORS).glob("*.distcp")))
    found["checksums"] = Manifest.of(path) is not None
    found["most_pieces_of_an_array"] = max((dist.num_chunks(key) for key in infos), default=0)
    return found | _summary(infos, {key: key.split(".")[0] for key in infos}, tensors=tensors)


def _summary(infos: Mapping[str, TensorInfo], parts: Mapping[str, str], *, tensors: bool) -> dict[str, Any]:
    by_part: dict[str, dict[str, Any]] = defaultdict(lambda: {"tensors": 0, "numbers": 0, "bytes": 0, "dtypes": set()})
    for name, info in infos.items():
        part = by_part[parts[name]]
        part["tensors"] += 1
        part["numbers"] += info.num_bytes // info.dtype.itemsize
        part["bytes"] += info.num_bytes
        part["dtypes"].add(str(info.dtype).removeprefix("torch."))
    listed = {
        name: {"dtype": str(info.dtype).removeprefix("torch."), "shape": list(info.shape)}
        for name, info in infos.items()
    }
    return {
        "bytes": sum(info.num_bytes for info in infos.values()),
        "parts": {name: {**part, "dtypes": sorted(part["dtypes"])} for name, part in sorted(by_part.items())},
        **({"tensors": listed} if tensors else {}),
    }


def _part_of(name: str) -> str:
    first = name.removeprefix("model.").split(".")[0]
    return _PREFIXES.get(first, first)


def show(found: Mapping[str, Any]) -> None:
    """Print what was found, for people."""
    console = Console(soft_wrap=True, markup=False)  # names may have brackets
    skipped = ("parts", "tensors", "architecture", "bytes")
    for key, value in found.items():
        if key not in skipped:
            console.print(f"{key.replace('_', ' '):12} {value}", highlight=False)
    for part, sizes in found.get("architecture", {}).items():
        told = ", ".join(f"{key} {value}" for key, value in sizes.items()) if isinstance(sizes, dict) else sizes
        console.print(f"{part:12} {told}", highlight=False)
    table = Table("part", "tensors", "numbers", "GB", "dtype")
    for name, part in found["parts"].items():
        row = (
            Text(name),
            str(part["tensors"]),
            f"{part['numbers']:,}",
            f"{part['bytes'] / 1e9:.3f}",
            ", ".join(part["dtypes"]),
        )
        table.add_row(*row)
    console.print(table)
    for name, tensor in found.get("tensors", {}).items():
        console.print(f"{tensor['dtype']:9} {tensor['shape']!s:24} {name}", highlight=False)


if __name__ == "__main__":
    main()
