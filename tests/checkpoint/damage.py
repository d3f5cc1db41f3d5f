"""Copies of small folders, damaged and converted: what the tests of sources, manifests and conversions share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from checkpoint_tools import hf_to_megatron, megatron_to_hf
from megatron_r1v2.checkpoint.manifest import MANIFEST
from megatron_r1v2.checkpoint.model_card import CARD


def convert(source: Path, output: Path) -> bool:
    """Convert in whichever direction; return whether it ended well. An error must be one in words."""
    if (source / "tensors").is_dir():
        tool, arguments = megatron_to_hf, ["--checkpoint", str(source)]
    else:
        tool, arguments = hf_to_megatron, ["--hf", str(source)]
    try:
        tool.main([*arguments, "--output", str(output), "--quiet"])
    except SystemExit:
        assert not output.exists()
        assert not output.with_name(f".{output.name}.partial").exists()
        return False
    return True


def what_differs(got: Path, expected: Path) -> list[str]:
    """Name the files of a conversion that are not those of the undamaged source; a last line end may be missing."""
    names = [str(path.relative_to(expected)) for path in files_below(expected) if path.name != MANIFEST]
    assert {path.name for path in files_below(got)} == {path.name for path in files_below(expected)}
    return [name for name in names if _content(got / name) != _content(expected / name)]


def _content(path: Path) -> bytes:
    """Return what a file says of the model: a card names its source folder, which is another one for a copy."""
    lines = path.read_bytes().rstrip().splitlines(keepends=True)
    return b"".join(line for line in lines if path.name != CARD or not line.startswith((b"# ", b"Exported: ")))


def weight_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.safetensors"), *folder.glob("tensors/*.distcp"), *folder.glob("tensors/.metadata")])


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def fresh(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def run(tool, *arguments: str, code: int = 0) -> None:
    if code == 0:
        tool.main([str(argument) for argument in arguments])
        return
    with pytest.raises(SystemExit) as stopped:
        tool.main([str(argument) for argument in arguments])
    assert stopped.value.code == code
