"""The layout that a converter runs in, and the model built in it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_r1v2.config.schema import ParallelConfig
from megatron_r1v2.models.architecture import read_architecture
from megatron_r1v2.models.hf_files import SafetensorsFolder
from megatron_r1v2.models.r1v2 import R1V2Model, build_r1v2
from megatron_r1v2.models.settings import ComputeSettings
from megatron_r1v2.parallel.groups import ParallelContext, initialize, shut_down


def add_layout_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --tensor and --pipeline."""
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks; start as many with torchrun")
    parser.add_argument("--pipeline", type=int, default=1, help="pipeline stages; multiplies the processes")


@contextmanager
def built_model(folder: Path, *, tensor: int, pipeline: int) -> Iterator[tuple[R1V2Model, ParallelContext]]:
    """Start the process groups and build the model of a folder, in the folder's dtype and with random weights.

    Args:
        folder: in the layout of transformers' InternVL.
        tensor: tensor-parallel ranks.
        pipeline: pipeline stages.

    Yields:
        This rank's part of the model, and where this rank stands.
    """
    architecture = read_architecture(folder)
    with SafetensorsFolder(folder) as opened:
        dtype = opened.tensor(opened.names()[0]).dtype
    settings = ComputeSettings(tensor=tensor, pipeline=pipeline, dtype=dtype)
    context = initialize(ParallelConfig(tensor=tensor, pipeline=pipeline), seed=0)
    try:
        yield build_r1v2(architecture, settings, groups=context.groups, device=context.device), context
    finally:
        shut_down()
