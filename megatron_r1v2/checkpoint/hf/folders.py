"""Hugging Face folders on disk: safetensors read lazily, JSON, and the files beside the weights.

Only safetensors and JSON are read: no pickle, and no code that a folder brings along.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_r1v2.checkpoint.hf.refusals import Unsupported
from megatron_r1v2.checkpoint.hf.safetensors_files import map_tensors, read_safetensors_header
from megatron_r1v2.checkpoint.stored_tensors import StoredTensor
from megatron_r1v2.checkpoint.tensor_files import TensorInfo, tensor_info

JsonObject = dict[str, Any]
"""A JSON object of others: its values may be anything until they are checked."""
INDEX_NAME = "model.safetensors.index.json"
# Whatever copies or writes JSON calls itself once a level; published files have up to ten.
_MAX_DEPTH = 64
SINGLE_NAME = "model.safetensors"
DEFAULT_SHARD_BYTES = 5 * 1000**3
# Files besides weights and config.json. Python files are left behind on purpose: nothing we write needs remote code.
_COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "LICENSE*",
)


class SafetensorsFolder:
    """The tensors of a folder by name, each read when it is asked for; use as a context manager."""

    def __init__(self, folder: Path | str):
        """Open every shard and check it against the index.

        Args:
            folder: with model.safetensors, or an index and its shards; a single safetensors file is taken too.

        Raises:
            ValueError: there are no weights, or a shard is missing, truncated, unreadable or not what the index says.
        """
        self.folder = Path(folder)
        self._tensors: dict[str, torch.Tensor] = {}
        self._stored: dict[str, StoredTensor] = {}
        expected = None
        if self.folder.is_file():
            paths = [self.folder]
        elif (self.folder / INDEX_NAME).exists():
            self._check_single()
            expected = _read_index(self.folder / INDEX_NAME)
            paths = [self.folder / name for name in sorted(set(expected.values()))]
        else:
            paths = [self.folder / SINGLE_NAME]
        self._paths = paths
        try:
            for path in paths:
                self._open(path)
            if expected is not None:
                self._check_index(expected)
        except ValueError:
            self.close()
            raise

    def __enter__(self) -> SafetensorsFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the mapped files."""
        self._tensors.clear()

    def names(self) -> list[str]:
        """Return the names of all tensors, sorted."""
        return sorted(self._tensors)

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor.

        Raises:
            ValueError: there is no tensor of this name.
        """
        if name not in self._tensors:
            raise ValueError(f"{self.folder} has no tensor {name!r}")
        return self._tensors[name]

    def stored(self, name: str) -> StoredTensor:
        """Return the place of one tensor, which `tensor` reads."""
        return self._stored[name]

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype of one tensor, without reading it.

        Raises:
            ValueError: there is no tensor of this name.
        """
        return tensor_info(self.tensor(name))

    def dtypes(self) -> dict[str, torch.dtype]:
        """Return the dtype of each tensor, by name."""
        return {name: self._tensors[name].dtype for name in self.names()}

    def paths(self) -> list[Path]:
        """Return the files."""
        return list(self._paths)

    def _check_single(self) -> None:
        """Refuse a single file beside an index of others: programs differ in which they read."""
        if (self.folder / SINGLE_NAME).exists() and SINGLE_NAME not in _read_index(self.folder / INDEX_NAME).values():
            raise Unsupported(
                "two sets of weights",
                f"{self.folder} has both {INDEX_NAME} with its shards and {SINGLE_NAME}; transformers reads the single "
                "file alone, other programs the shards: delete the one that is not the model",
            )

    def _open(self, path: Path) -> None:
        if not path.exists():
            pickles = sorted(item.name for item in path.parent.glob("*.bin"))
            sentence = f"{path} is missing; copy the folder again, with all its safetensors files"
            if not pickles:
                raise ValueError(sentence)
            hint = f"{pickles[0]} is a pickle, which is never read: convert it to safetensors"
            raise Unsupported("pickled weights", f"{sentence}; {hint}")
        stored = read_safetensors_header(path)
        for name in stored:
            if name in self._tensors:
                raise ValueError(f"{path} holds {name!r}, which another file of the folder holds too; remove one")
        self._stored |= stored
        self._tensors |= map_tensors(path, stored)

    def _check_index(self, expected: Mapping[str, str]) -> None:
        missing = sorted(set(expected) - set(self._tensors))
        extra = sorted(set(self._tensors) - set(expected))
        if missing:
            raise ValueError(
                f"{self.folder / expected[missing[0]]} lacks {_some(missing)}, which {INDEX_NAME} promises"
            )
        if extra:
            raise ValueError(
                f"{self.folder} holds {_some(extra)}, which {INDEX_NAME} does not list; the shards are mixed"
            )


def read_json(path: Path | str) -> JsonObject:
    """Read a JSON object.

    Raises:
        ValueError: the file is missing or is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is missing; give the folder of a Hugging Face checkpoint")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a JSON object")
    if _is_too_deep(content):
        raise ValueError(f"{path} is nested more than {_MAX_DEPTH} levels deep, which is damage; copy it again")
    return content


def _is_too_deep(content: JsonObject) -> bool:
    level: list[JsonObject | list[object]] = [content]
    for _ in range(_MAX_DEPTH):
        inside = (item for value in level for item in (value.values() if isinstance(value, dict) else value))
        level = [item for item in inside if isinstance(item, dict | list)]
    return bool(level)


def check_output(output: Path | str, *, sources: Iterable[Path | str], overwrite: bool) -> None:
    """Refuse an output folder that would destroy something; call before any work is done.

    Raises:
        ValueError: `output` is a source, inside one or around one, or exists without `overwrite`.
    """
    target = Path(output).resolve()
    for source in sources:
        origin = Path(source).resolve()
        if target == origin or origin in target.parents or target in origin.parents:
            raise ValueError(
                f"output {output} and source {source} are one folder or one inside the other; choose another"
            )
    if target.exists() and not target.is_dir():
        raise ValueError(f"output {output} is a file; choose a folder")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise ValueError(f"output {output} exists already; choose another folder, or pass --overwrite to replace it")


def companion_files(source: Path | str) -> list[Path]:
    """Return the files of tokenizer, processor, generation settings and chat template of a folder."""
    found = [path for pattern in _COMPANIONS for path in sorted(Path(source).glob(pattern))]
    # `tokenizer*` matches a tokenizer's code too.
    return [path for path in found if path.is_file() and path.suffix != ".py"]


def copy_companions(source: Path | str, folder: Path) -> None:
    """Copy tokenizer, processor, generation settings and chat template from one folder to another."""
    for path in companion_files(source):
        shutil.copyfile(path, folder / path.name)


def with_dtype(config: Mapping[str, object], dtypes: Iterable[torch.dtype]) -> JsonObject:
    """Return a config.json that names the weights' own dtype, in which transformers loads them by default."""
    # The widest: transformers would round the others to a narrower one.
    widest = max(dtypes, key=lambda dtype: dtype.itemsize)
    # With auto_map, transformers would ask for the remote code that is left behind.
    changed = {key: value for key, value in config.items() if key not in ("torch_dtype", "dtype", "auto_map")}
    # The readers of the chat layout (remote code, vLLM) know only the older name.
    key = "torch_dtype" if "llm_config" in config else "dtype"
    changed[key] = str(widest).removeprefix("torch.")
    for part in ("text_config", "vision_config", "llm_config"):
        nested = changed.get(part)
        if isinstance(nested, Mapping):
            changed[part] = {key: value for key, value in nested.items() if key not in ("torch_dtype", "dtype")}
    return changed


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} has no weight_map; copy it again")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{path} names the shard {name!r}; accepted: plain *.safetensors names in the same folder")
    return weight_map


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
