"""Checksums kept beside a checkpoint, so that damage on the way is found and not trained on.

`checkpoint_manifest.json` is written last, by runs and conversions alike: the size and the XXH3-128 of every file. What
a conversion writes has the XXH3-128 of every tensor instead where a file holds weights, so that a tensor is checked as
it is read, without going over the whole file first.

Three checksums, for three purposes: XXH3-128 finds damage and costs a tenth of the others; the SHA-256 of identity.py
says which model it is and withstands forgery; tensor_checksum.py is the same for every sharding of a tensor.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NotRequired, TypedDict

import torch
import xxhash

from megatron_r1v2.checkpoint.hf.folders import JsonObject, read_json
from megatron_r1v2.checkpoint.stored_tensors import Checksum
from megatron_r1v2.checkpoint.tensor_files import TensorInfo, digest_of, file_digest, tensor_info
from megatron_r1v2.resilience.files import write_file

MANIFEST = "checkpoint_manifest.json"
PROGRESS = ".progress"
"""Folder of an unfinished output, which the manifest leaves out."""
FORMAT = 3
ALL_PARTS = ("adapter", "language", "vision")
"""Parts of a model that has a Hugging Face folder: all but the score head."""
# Files up to here are read and compared before every use: it costs milliseconds.
_SMALL_BYTES = 64 * 1000**2
_WEIGHTS = (".safetensors", ".distcp")


class TensorEntry(TypedDict):
    """A tensor in the manifest."""

    dtype: str
    shape: list[int]
    xxh3_128: str


class FileEntry(TypedDict):
    """A file in the manifest."""

    bytes: int
    xxh3_128: NotRequired[str]
    """Absent where the file is known by its tensors."""


class Manifest:
    """The manifest of a folder, which its files and tensors are compared with."""

    def __init__(self, folder: Path) -> None:
        """Read the manifest of a folder.

        Raises:
            ValueError: it is damaged, or of another format.
        """
        self.path = folder / MANIFEST
        content = read_json(self.path)
        version = content.get("version")
        if version in (1, 2):
            raise ValueError(
                f"{self.path} was written by an earlier development version of this program, whose checkpoints are "
                "not read any more; convert or train again"
            )
        if version != FORMAT:
            raise ValueError(f"{self.path} has version {version!r}; accepted: {FORMAT}. Update megatron_r1v2")
        # An unknown key may be "tensors" with a flipped bit: no tensor would be compared then.
        if not set(content) <= {"version", "files", "tensors", "random_parts"}:
            raise self._damaged(f"it has the keys {sorted(content)}")
        self.files: dict[str, FileEntry] = self._entries(content, "files", FileEntry)
        self.tensors: dict[str, TensorEntry] = (
            self._entries(content, "tensors", TensorEntry) if "tensors" in content else {}
        )

        random_parts = content.get("random_parts", [])
        if not isinstance(random_parts, list) or not all(part in ALL_PARTS for part in random_parts):
            raise self._damaged(f"it says {str(random_parts)[:80]!r} of random parts")
        self.random_parts = frozenset(map(str, random_parts))
        """Parts of the model whose weights were drawn and never trained."""

    def _entries(self, content: JsonObject, kind: str, entry: type) -> JsonObject:
        entries = content.get(kind)
        if not isinstance(entries, dict) or not entries:
            raise self._damaged(f"it lists no {kind}")
        for name, stated in entries.items():
            # A key that is not known may be a checksum whose name has a flipped bit.
            if not isinstance(stated, dict) or not set(stated) <= set(entry.__annotations__):
                raise self._damaged(f"it says {str(stated)[:80]!r} of {name}")
        return entries

    def _damaged(self, how: str) -> ValueError:
        return ValueError(f"{self.path} is damaged: {how}; copy it again, or delete it to go without")

    @classmethod
    def of(cls, folder: Path) -> Manifest | None:
        """Return the manifest of a folder, or None where there is no such file."""
        return cls(folder) if (folder / MANIFEST).is_file() else None

    def check_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Compare a tensor with the manifest.

        Raises:
            ValueError: they differ.
        """
        self._check_entry(name, tensor_entry(tensor_info(tensor), digest_of(tensor)))

    def checksum(self, name: str, info: TensorInfo) -> Checksum:
        """Return the checksum of a tensor that is read piece by piece."""
        return Checksum(xxhash.xxh3_128, lambda digest: self._check_entry(name, tensor_entry(info, digest)))

    def _check_entry(self, name: str, found: TensorEntry) -> None:
        if name not in self.tensors:
            raise ValueError(f"{self.path} has no {name!r}: the folder's weights were changed after it was written")
        if found != self.tensors[name]:
            raise ValueError(
                f"{self.path.parent}: {name} is not what it was when it was written ({found}, the manifest has "
                f"{self.tensors[name]}): the file is damaged, copy it again"
            )

    def check_files(self, *, weights: bool = False) -> None:
        """Compare all files with the manifest by size, and the small ones by checksum.

        Args:
            weights: also read the large ones.

        Raises:
            ValueError: a file is missing, or differs.
        """
        for name in self.files:
            if self.find_damage(name, read=weights or not _is_large(self.path.parent / name)):
                raise ValueError(
                    f"{self.path.parent / name} is not what it was when the checkpoint was written; if it was changed "
                    f"on purpose, delete {MANIFEST}, else copy the folder again"
                )

    def find_damage(self, name: str, *, read: bool = True) -> str | None:
        """Return how a file differs from the manifest; None: it does not.

        Args:
            read: compare its checksum, not only its size.
        """
        path, entry = self.path.parent / name, self.files[name]
        try:
            if not path.is_file():
                return f"{name} is missing"
            # The size first: it finds a truncated file without reading it.
            if path.stat().st_size != entry.get("bytes"):
                return f"{name} has {path.stat().st_size} bytes instead of {entry.get('bytes')}"
            if read and "xxh3_128" in entry and file_digest(path) != entry["xxh3_128"]:
                return f"{name} has other content than when it was written"
        except OSError as error:
            return f"{name} cannot be read ({error})"
        return None


def write_manifest(
    folder: Path,
    files: Mapping[str, FileEntry],
    tensors: Mapping[str, TensorEntry] | None = None,
    *,
    random_parts: Collection[str] = (),
) -> None:
    """Write the manifest of a folder that is otherwise finished.

    Args:
        random_parts: parts of the model whose weights were drawn and never trained.
    """
    content: dict[str, object] = {"version": FORMAT, **({"tensors": tensors} if tensors else {}), "files": files}
    if random_parts:
        content["random_parts"] = sorted(random_parts)
    write_file(folder / MANIFEST, json.dumps(content, indent=1) + "\n")


def listed_files(folder: Path) -> list[Path]:
    """Return the files of a folder that its manifest lists."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return [path for path in found if PROGRESS not in path.relative_to(folder).parts]


def file_entry(path: Path, *, digest: bool = True) -> FileEntry:
    """Return the size and the digest of a file."""
    size = path.stat().st_size
    return {"bytes": size, "xxh3_128": file_digest(path)} if digest else {"bytes": size}


def file_entries(folder: Path) -> dict[str, FileEntry]:
    """Return the entries of a folder whose weights are known by their tensors."""
    return {
        str(path.relative_to(folder)): file_entry(path, digest=not _is_large(path)) for path in listed_files(folder)
    }


def tensor_entry(info: TensorInfo, digest: str) -> TensorEntry:
    """Return the entry of a tensor."""
    return {"dtype": info.dtype_name, "shape": list(info.shape), "xxh3_128": digest}


def entry_info(entry: TensorEntry) -> TensorInfo:
    """Return dtype and shape of an entry."""
    return TensorInfo(getattr(torch, entry["dtype"]), tuple(entry["shape"]))


def _is_large(path: Path) -> bool:
    return path.suffix in _WEIGHTS or (path.is_file() and path.stat().st_size > _SMALL_BYTES)
