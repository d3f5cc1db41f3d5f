"""A conversion into many small files, in a process of its own that a test kills.

python -m tests.checkpoint.interrupted WAY SOURCE OUTPUT
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_r1v2.checkpoint.conversion import RunOptions
from megatron_r1v2.checkpoint.destinations import (
    HfConversion,
    HfFormat,
    TorchDistConversion,
    write_checkpoint,
    write_hf,
)
from megatron_r1v2.checkpoint.megatron.run_folder import HF_IN_CHECKPOINT
from megatron_r1v2.checkpoint.sources import CheckpointSpec, HfSpec

FILE_BYTES = 3000
OPTIONS = RunOptions(workers=2, quiet=True)


def convert(way: str, source: Path, output: Path) -> None:
    """Convert in one direction."""
    if way == "in":
        dist = TorchDistConversion(HfSpec(source), (source,), max_file_bytes=FILE_BYTES)
        write_checkpoint(dist, output, companions=source, options=OPTIONS)
    else:
        hf = HfConversion(CheckpointSpec(source), (source,), HfFormat("transformers", max_shard_bytes=FILE_BYTES))
        write_hf(hf, output, companions=source / HF_IN_CHECKPOINT, options=OPTIONS)


if __name__ == "__main__":
    convert(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
