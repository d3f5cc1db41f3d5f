"""Checksums kept beside what our tools write, so that damage on the way is found and not trained on.

`checkpoint_manifest.json` holds a digest of every tensor's bytes (XXH3-128; SHA-256 in manifests of version 1), the
SHA-256 of every small file, and the size of the large ones. What has no manifest (folders that others made) is checked
as far as the format allows: safetensors holds no checksum, so a flipped bit in a weight cannot be seen there;
torch_dist has a CRC-32 in every record, which is checked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from megatron_r1v2.checkpoint.hf.folders import read_json, write_json
from megatron_r1v2.checkpoint.hf.safetensors_files import TensorInfo, tensor_info
from megatron_r1v2.checkpoint.tensor_files import DIGEST, digest_of, tensor_bytes

MANIFEST = "checkpoint_manifest.json"
PROGRESS = ".progress"
"""Folder of an unfinished output, which the manifest leaves out."""
_SMALL_BYTES = 64 * 1000**2


class Manifest:
    """What a folder must hold."""

    def __init__(self, folder: Path) -> None:
        """Read the manifest of a folder.

        Raises:
            ValueError: it is damaged.
        """
        self.path = folder / MANIFEST
        content = read_json(self.path)
        if content.get("version") not in (1, 2):
            raise ValueError(
                f"{self.path} has version {content.get('version')!r}; accepted: 1, 2. Update checkpoint_tools"
            )
        self.layout = str(content.get("layout"))
        self.tensors: dict[str, dict[str, Any]] = self._entries(content, "tensors")
        self.files: dict[str, dict[str, Any]] = self._entries(content, "files")

    def _entries(self, content: Mapping[str, Any], kind: str) -> dict[str, dict[str, Any]]:
        entries = content.get(kind)
        if not isinstance(entries, dict) or not entries or not all(isinstance(e, dict) for e in entries.values()):
            raise ValueError(f"{self.path} is damaged: it lists no {kind}; copy it again, or delete it to go without")
        return entries

    @classmethod
    def of(cls, folder: Path) -> Manifest | None:
        """Return the manifest of a folder; None: it has none."""
        return cls(folder) if (folder / MANIFEST).is_file() else None

    def check_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Compare a tensor with the manifest.

        Raises:
            ValueError: it is another.
        """
        if name not in self.tensors:
            raise ValueError(f"{self.path} has no {name!r}: the folder's weights were changed after it was written")
        if "sha256" in self.tensors[name]:
            found = tensor_entry(tensor_info(tensor), sha256(tensor))
        else:
            found = tensor_entry(tensor_info(tensor), digest_of(tensor), DIGEST)
        if found != self.tensors[name]:
            raise ValueError(
                f"{self.path.parent}: {name} is not what it was when it was written ({found}, the manifest has "
                f"{self.tensors[name]}): the file is damaged, copy it again"
            )

    def check_files(self) -> None:
        """Compare all files with the manifest, by size and, the small ones, by checksum.

        Raises:
            ValueError: one is missing or another.
        """
        folder = self.path.parent
        for name, expected in self.files.items():
            if file_entry(folder / name) != expected:
                raise ValueError(
                    f"{folder / name} is not what it was when the checkpoint was written; if it was changed on "
                    f"purpose, delete {MANIFEST}, else copy the folder again"
                )


def write_manifest(folder: Path, layout: str, tensors: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the manifest of a folder that is otherwise finished."""
    files = {
        str(path.relative_to(folder)): file_entry(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST and PROGRESS not in path.parts
    }
    write_json(folder / MANIFEST, {"version": 2, "layout": layout, "tensors": dict(tensors), "files": files})


def tensor_entry(info: TensorInfo, digest: str, kind: str = "sha256") -> dict[str, Any]:
    """Return what is to be said of a tensor.

    Args:
        info: shape and dtype.
        digest: of its bytes.
        kind: of the digest.
    """
    return {"dtype": str(info.dtype).removeprefix("torch."), "shape": list(info.shape), kind: digest}


def file_entry(path: Path) -> dict[str, Any]:
    """Return what the manifest says of a file; large ones are known by their tensors."""
    if not path.is_file():
        return {"bytes": -1}
    size = path.stat().st_size
    large = size > _SMALL_BYTES or path.suffix in (".safetensors", ".distcp")
    return {"bytes": size} if large else {"bytes": size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def sha256(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of a CPU tensor's bytes."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def combined(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Return one SHA-256 for many tensors: of a line for each, in order of name."""
    lines = (f"{name} {entry['dtype']} {entry['shape']} {entry['sha256']}\n" for name, entry in sorted(entries.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def in_threads(function: Callable[[str], Any], names: Iterable[str], *, workers: int) -> dict[str, Any]:
    """Call a function with every name in a few threads (reading and hashing let go of the interpreter)."""
    names = list(names)
    with ThreadPoolExecutor(max_workers=workers) as pool:
        return dict(zip(names, pool.map(function, names), strict=True))
