"""Names of TransformerEngine's layers beside ours: the one table and one checkpoint format serve both.

TransformerEngine cannot be imported here, so a local model whose norms are moved to where its fused layers keep them
stands for it: everything that loads, exports or checkpoints goes by the names of parameters.
"""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.identity_op import IdentityOp
from safetensors.torch import load_file

from megatron_r1v2.checkpoint.hf.config import read_hf_architecture
from megatron_r1v2.checkpoint.hf.weights import load_hf_weights
from megatron_r1v2.config.schema import Part
from megatron_r1v2.models.r1v2 import R1V2Model, build_r1v2
from megatron_r1v2.models.settings import ComputeSettings
from megatron_r1v2.training.part_state import part_state
from tests.models.test_llama import qwen3
from tests.tiny_hf import tiny_hf_model
from tests.whole_weights import gather_hf_weights


def with_names_of_transformer_engine(model: R1V2Model) -> R1V2Model:
    """Move the norms to where TELayerNormColumnParallelLinear has them: `layer_norm_weight` beside its own weight."""
    for layer in model.language.decoder.layers:
        layer.self_attention.linear_qkv.layer_norm_weight = layer.input_layernorm.weight
        layer.mlp.linear_fc1.layer_norm_weight = layer.pre_mlp_layernorm.weight
        layer.input_layernorm, layer.pre_mlp_layernorm = IdentityOp(), IdentityOp()
    return model


@pytest.fixture(params=[{"family": "6b"}, {"text": qwen3()}], ids=["qwen2", "qwen3"])
def models(request, tmp_path, context):
    tiny_hf_model(tmp_path, **request.param)
    architecture = read_hf_architecture(tmp_path)[0]

    def build() -> R1V2Model:
        return build_r1v2(architecture, ComputeSettings(), groups=context.groups, device=context.device)

    return tmp_path, build(), with_names_of_transformer_engine(build())


def test_both_load_and_export_the_same_hf_weights(models, context):
    folder, local, fused = models
    names = [{name for name, _ in model.named_parameters()} for model in (local, fused)]
    assert len(names[0] - names[1]) == 4
    assert "language.decoder.layers.1.mlp.linear_fc1.layer_norm_weight" in names[1] - names[0]
    stored = load_file(folder / "model.safetensors")
    for model in (local, fused):
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
        load_hf_weights(model, folder, context)
        exported = gather_hf_weights(model, context)
        assert exported.keys() == stored.keys()
        assert [name for name in stored if not torch.equal(stored[name], exported[name])] == []


def test_both_write_the_same_checkpoint_entries(models):
    _, local, fused = models
    entries = [
        {(tensor.key, tensor.data.shape) for tensor in part_state(model, list(Part)).values()}
        for model in (local, fused)
    ]
    assert entries[0] == entries[1]
    assert any(key.endswith("self_attention.linear_qkv.layer_norm_weight") for key, *_ in entries[0])
