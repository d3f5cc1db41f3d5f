"""Deliberate faults in the product, in a process that rehearses a rank: `-m tests.rehearsal.faults NAMES SPEC OUT`."""

from __future__ import annotations

import sys

import torch

from megatron_r1v2.rehearsal import rank


def cpu_index() -> None:
    """Look tiles up by an index that was left on the CPU."""
    from megatron_r1v2.models.r1v2 import R1V2Model

    adapt = R1V2Model.adapt

    def broken(self, features_TFK, tile_index=None):
        return adapt(self, features_TFK.index_select(0, torch.arange(features_TFK.shape[0])), tile_index)

    R1V2Model.adapt = broken


def raises_on_cuda() -> None:
    """Raise in a branch that a CPU never takes."""
    from megatron_r1v2.models.r1v2 import R1V2Model

    encode = R1V2Model.encode_tiles

    def broken(self, tiles_TCHW):
        if tiles_TCHW.is_cuda:
            raise RuntimeError("a branch for GPUs alone")
        return encode(self, tiles_TCHW)

    R1V2Model.encode_tiles = broken


def skips_collective() -> None:
    """Leave the sum over the replica's checksums out."""
    from megatron_r1v2.training import weight_checksums

    class Silent:
        all_reduce = staticmethod(lambda *_, **__: None)

    weight_checksums.dist = Silent


def large_cache() -> None:
    """Allocate 10 GiB more of the key-value cache than the recipe says."""
    from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext

    begin = DynamicInferenceContext.__init__

    def broken(self, *args, buffer_size_gb, **kwargs):
        begin(self, *args, buffer_size_gb=buffer_size_gb + 10, **kwargs)

    DynamicInferenceContext.__init__ = broken


FAULTS = {each.__name__: each for each in (cpu_index, raises_on_cuda, skips_collective, large_cache)}


def main() -> None:
    """Apply faults when the product has been imported, and rehearse."""
    names, *paths = sys.argv[1:]
    find = rank._stage_function

    def with_fault(stage):
        run = find(stage)
        for name in names.split(","):
            FAULTS[name]()
        return run

    rank._stage_function = with_fault
    rank.main(paths)


if __name__ == "__main__":
    main()
