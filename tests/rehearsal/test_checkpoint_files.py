"""Checkpoints without bytes: what was described is given back, and nothing else is."""

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_r1v2.rehearsal.checkpoint_files import HollowCheckpoints

FOLDER = "run/checkpoints/step-00000001/tensors"
PARTIAL = "run/checkpoints/.step-00000001.partial/tensors"


def state(*shape):
    return {"model": {"weight": ShardedTensor.from_rank_offsets("weight", torch.ones(shape), (0, 1, 2))}, "step": 3}


def test_a_saved_state_is_loaded_under_its_final_name():
    checkpoints = HollowCheckpoints()
    checkpoints.save(state(4, 2), PARTIAL)
    loaded = checkpoints.load(state(4, 2), FOLDER)
    assert loaded["model"]["weight"].shape == (4, 2)
    assert loaded["step"] == 3
    assert checkpoints.num_bytes == 4 * 2 * 4
    assert checkpoints.load_tensors_metadata(FOLDER)["weight"].global_shape == (8, 2)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"model": {"weight": ShardedTensor.from_rank_offsets("weight", torch.ones(5, 2), (0, 1, 2))}}, r"\[8, 2\]"),
        ({"model": {"other": ShardedTensor.from_rank_offsets("other", torch.ones(4, 2), (0, 1, 2))}}, "missing"),
    ],
)
def test_what_was_not_saved_is_not_loaded(asked, words):
    checkpoints = HollowCheckpoints()
    checkpoints.save(state(4, 2), PARTIAL)
    with pytest.raises(ValueError, match=words):
        checkpoints.load(asked, FOLDER)
