"""Checksums of the weights: one bit shows in its part alone, and each comparison names what differs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_r1v2.config.schema import ParallelConfig
from megatron_r1v2.stages.loaded_model import open_model
from megatron_r1v2.training.weight_checksums import check_loaded, check_replicas, check_unchanged, compute_checksums
from tests.ranks import run_ranks
from tests.stages.runs import recipe_for


def test_a_bit_of_each_part_shows_and_only_there(root: Path, tmp_path: Path) -> None:
    with open_model(recipe_for(root, tmp_path / "run")) as loaded:
        model, parts = loaded.model, loaded.model.parts
        before = compute_checksums(model, parts, loaded.context)
        for part in parts:
            weight = next(getattr(model, part.value).parameters()).data.view(-1).view(torch.int32)
            weight[0] ^= 1
            after = compute_checksums(model, parts, loaded.context)
            assert [name for name in before if before[name] != after[name]] == [part.value]
            weight[0] ^= 1
        assert compute_checksums(model, parts, loaded.context) == before


def checksums_at(root: str, output: str, overrides: tuple[str, ...]) -> dict[str, int]:
    with open_model(recipe_for(Path(root), Path(output), overrides)) as loaded:
        return compute_checksums(loaded.model, loaded.model.parts, loaded.context)


def test_they_do_not_depend_on_the_layout(root: Path, tmp_path: Path) -> None:
    alone = checksums_at(str(root), str(tmp_path / "run"), ())
    for name in ("tensor", "pipeline"):
        ranks = run_ranks(2, checksums_at, str(root), str(tmp_path / name), (f"parallel.{name}=2",))
        assert ranks == [alone, alone], name


def test_what_was_loaded_is_compared_where_both_name_a_part() -> None:
    check_loaded({"adapter": 5, "vision": 6}, {"adapter": 5}, Path("step-1"))
    with pytest.raises(RuntimeError, match="adapter weights loaded from step-1 have checksum 0{15}5, and had 0{15}7"):
        check_loaded({"adapter": 5}, {"adapter": 7}, Path("step-1"))


def test_what_does_not_train_must_not_change() -> None:
    check_unchanged({"vision": 6}, {"vision": 6, "language": 1})
    with pytest.raises(RuntimeError, match="vision weights do not train, but have changed"):
        check_unchanged({"vision": 6}, {"vision": 5})


def replica_with(output: str) -> str:
    from megatron_r1v2.parallel import groups

    context = groups.initialize(ParallelConfig(), seed=1)
    check_replicas({"adapter": 5}, context)
    try:
        check_replicas({"adapter": 5 + context.data_rank, "vision": 1}, context)
    except RuntimeError as error:
        return str(error)
    return ""


def test_every_replica_is_told_which_part_differs() -> None:
    for message in run_ranks(2, replica_with, ""):
        assert "the adapter weights of the data-parallel replicas differ" in message
        assert f"replica 0: {5:016x}, replica 1: {6:016x}" in message
