"""Files without bytes: what was described is given back, nothing else; weights have the shapes of the headers."""

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch._subclasses.fake_tensor import FakeTensor

from megatron_r1v2.checkpoint.hf import config
from megatron_r1v2.checkpoint.hf.folders import SafetensorsFolder
from megatron_r1v2.checkpoint.megatron import tensor_checksum
from megatron_r1v2.rehearsal.fake_tensors import FakeTensors
from megatron_r1v2.rehearsal.hollow_files import HollowCheckpoints, install_hollow_weights
from tests.rehearsal.tiny_rehearsal import tiny_model

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


@pytest.fixture
def hollow(undone, tmp_path):
    undone.setattr(tensor_checksum, "type", type, raising=False)
    folder = tiny_model(tmp_path / "model")
    with SafetensorsFolder(folder) as real:
        infos = {name: real.info(name) for name in real.names()}
        values = {name: real.tensor(name) for name in real.names()}
    mode = FakeTensors("cpu")
    install_hollow_weights(mode)
    with SafetensorsFolder(folder) as made:
        yield mode, made, infos, values


def test_tensors_have_the_shapes_and_dtypes_of_the_headers_and_no_bytes(hollow):
    mode, folder, infos, values = hollow
    with mode:
        for name, value in values.items():
            tensor = folder.tensor(name)
            assert isinstance(tensor, FakeTensor)
            assert (tensor.shape, tensor.dtype, tensor.device.type) == (value.shape, value.dtype, "cpu")
            assert folder.info(name) == infos[name]
    assert mode.ledger.held == 0, "a mapped file takes no memory"


def test_whether_embeddings_are_tied_is_seen_in_the_bytes(hollow):
    mode, folder, _, values = hollow
    embedding = next(name for name in values if name.endswith("embed_tokens.weight"))
    head = next(name for name in values if name.endswith("lm_head.weight"))
    with mode:
        assert not config.are_tied(folder, {config.HF_EMBEDDING: embedding, config.HF_OUTPUT: head})
        assert config.are_tied(folder, {config.HF_EMBEDDING: embedding, config.HF_OUTPUT: embedding})
        assert isinstance(folder.tensor(embedding), FakeTensor), "and fakes are given again"


def test_a_checksum_takes_a_fake_for_a_plain_tensor(hollow):
    mode, folder, infos, _ = hollow
    with mode:
        assert tensor_checksum.type(folder.tensor(next(iter(infos)))) is torch.Tensor
    assert tensor_checksum.type(3) is int
