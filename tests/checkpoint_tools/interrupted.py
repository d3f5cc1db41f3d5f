"""A conversion into many small files, in a process of its own that a test kills.

python -m tests.checkpoint_tools.interrupted WAY SOURCE OUTPUT
"""

from __future__ import annotations

import sys
from pathlib import Path

from checkpoint_tools.conversions import DistJob, HfJob, write_checkpoint, write_hf
from checkpoint_tools.jobs import RunOptions
from checkpoint_tools.sources import HF_IN_CHECKPOINT, CheckpointSpec, HfSpec

FILE_BYTES = 3000
OPTIONS = RunOptions(workers=2, quiet=True)


def convert(way: str, source: Path, output: Path) -> None:
    """Convert in one direction."""
    if way == "in":
        dist = DistJob(HfSpec(source), (source,), max_file_bytes=FILE_BYTES)
        write_checkpoint(dist, output, companions=source, options=OPTIONS)
    else:
        hf = HfJob(CheckpointSpec(source), "transformers", (source,), max_shard_bytes=FILE_BYTES)
        write_hf(hf, output, companions=source / HF_IN_CHECKPOINT, options=OPTIONS)


if __name__ == "__main__":
    convert(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
