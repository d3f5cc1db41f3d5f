"""The content of a checkpoint: parts, shapes, dtypes, bytes, layout, step. Reads headers only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_r1v2.checkpoint.hf.config import CHAT_TYPES, read_hf_architecture
from megatron_r1v2.checkpoint.hf.folders import SafetensorsFolder, read_json
from megatron_r1v2.checkpoint.hf.refusals import check_folder
from megatron_r1v2.checkpoint.manifest import Manifest
from megatron_r1v2.checkpoint.megatron.run_folder import (
    HF_IN_CHECKPOINT,
    STATE_FILE,
    TENSORS,
    load_state,
    resolve_checkpoint,
)
from megatron_r1v2.checkpoint.megatron.torch_dist import TorchDist
from megatron_r1v2.checkpoint.tensor_files import TensorInfo
from megatron_r1v2.checkpoint.trained_parts import PARTS_FILE, read_parts
from megatron_r1v2.models.architecture import R1V2Architecture

_PREFIXES = {
    "vision_tower": "vision",
    "vision_model": "vision",
    "multi_modal_projector": "adapter",
    "mlp1": "adapter",
    "language_model": "language",
}


@dataclass
class PartSize:
    """The size of one part."""

    tensors: int = 0
    numbers: int = 0
    bytes: int = 0
    dtypes: set[str] = field(default_factory=set)

    def add(self, info: TensorInfo) -> None:
        """Count a tensor."""
        self.tensors += 1
        self.numbers += info.num_bytes // info.dtype.itemsize
        self.bytes += info.num_bytes
        self.dtypes.add(info.dtype_name)


@dataclass(frozen=True)
class Inspection:
    """The content of a checkpoint."""

    facts: Mapping[str, object]
    """Path, kind, layout and so on, by name."""
    tensors: Mapping[str, TensorInfo]
    parts: Mapping[str, str]
    """The part of each tensor."""
    architecture: R1V2Architecture | None = None

    def sizes(self) -> dict[str, PartSize]:
        """Return the size of each part, by name."""
        sizes: dict[str, PartSize] = defaultdict(PartSize)
        for name, info in self.tensors.items():
            sizes[self.parts[name]].add(info)
        return dict(sorted(sizes.items()))

    def as_json(self, *, tensors: bool) -> dict[str, object]:
        """Return the content for --json, with every tensor or without."""
        listed = {n: {"dtype": info.dtype_name, "shape": list(info.shape)} for n, info in self.tensors.items()}
        sizes = self.sizes()
        return {
            **self.facts,
            **({"architecture": asdict(self.architecture)} if self.architecture else {}),
            "bytes": sum(size.bytes for size in sizes.values()),
            "parts": {name: {**vars(size), "dtypes": sorted(size.dtypes)} for name, size in sizes.items()},
            **({"tensors": listed} if tensors else {}),
        }

    def show(self, *, tensors: bool) -> None:
        """Print the content for people, with every tensor or without."""
        console = Console(soft_wrap=True, markup=False)  # names may have brackets
        for key, value in self.facts.items():
            console.print(f"{key.replace('_', ' '):12} {value}", highlight=False)
        for part, sizes in (asdict(self.architecture) if self.architecture else {}).items():
            text = ", ".join(f"{key} {value}" for key, value in sizes.items()) if isinstance(sizes, dict) else sizes
            console.print(f"{part:12} {text}", highlight=False)
        table = Table("part", "tensors", "numbers", "GB", "dtype")
        for name, size in self.sizes().items():
            gigabytes, dtypes = f"{size.bytes / 1e9:.3f}", ", ".join(sorted(size.dtypes))
            table.add_row(Text(name), str(size.tensors), f"{size.numbers:,}", gigabytes, dtypes)
        console.print(table)
        for name, info in self.tensors.items() if tensors else ():
            console.print(f"{info.dtype_name:9} {list(info.shape)!s:24} {name}", highlight=False)


def inspect_checkpoint(path: Path) -> Inspection:
    """Return the content of a folder, file, run or checkpoint.

    Raises:
        ValueError: the path holds no checkpoint, or its headers are damaged.
    """
    check_folder(path)
    if path.is_file() or any(path.glob("*.safetensors")):
        return _inspect_hf(path)
    return _inspect_checkpoint(resolve_checkpoint(path))


def _inspect_hf(path: Path) -> Inspection:
    with SafetensorsFolder(path) as folder:
        infos = {name: folder.info(name) for name in folder.names()}
        num_files = len(folder.paths())
    facts: dict[str, object] = {"path": str(path), "kind": "safetensors", "files": num_files}
    architecture = None
    if (path / PARTS_FILE).is_file():
        facts |= {"kind": "exported parts", **vars(read_parts(path))}
    elif (path / "config.json").is_file():
        model_type = read_json(path / "config.json").get("model_type")
        facts |= {"kind": f"component ({model_type})"}
        if model_type in ("internvl", *CHAT_TYPES):
            architecture, layout = read_hf_architecture(path)
            facts |= {"kind": "whole model", "layout": layout}
    facts["checksums"] = path.is_dir() and Manifest.of(path) is not None
    return Inspection(facts, infos, _parts_of(infos), architecture)


def _inspect_checkpoint(path: Path) -> Inspection:
    dist = TorchDist(path / TENSORS)
    infos = {key: dist.array(key) for key in dist.array_names()}
    facts: dict[str, object] = {"path": str(path), "kind": "checkpoint", "layout": "torch_dist"}
    architecture = None
    if (path / STATE_FILE).is_file():
        state = load_state(path)
        facts |= {key: state[key] for key in ("step", "version", "trained") if key in state}
        facts["stored"] = state["parts"]
    if (path / HF_IN_CHECKPOINT / "config.json").is_file():
        architecture = read_hf_architecture(path / HF_IN_CHECKPOINT)[0]
    facts["files"] = len(list((path / TENSORS).glob("*.distcp")))
    facts["checksums"] = Manifest.of(path) is not None
    facts["most_pieces_of_an_array"] = max((dist.num_chunks(key) for key in infos), default=0)
    return Inspection(facts, infos, {key: key.split(".")[0] for key in infos}, architecture)


def _parts_of(names: Iterable[str]) -> dict[str, str]:
    first = {name: name.removeprefix("model.").split(".")[0] for name in names}
    return {name: _PREFIXES.get(prefix, prefix) for name, prefix in first.items()}
