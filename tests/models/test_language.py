"""The language model against transformers' Qwen2, and the layouts that it refuses."""

import dataclasses

import pytest
import torch

from megatron_r1v2.models.architecture import LanguageArchitecture
from megatron_r1v2.models.language import language_transformer_config, padded_vocab_size
from megatron_r1v2.models.settings import ComputeSettings
from megatron_r1v2.models.shared_attention import SharedGroup, SharedRowParams
from tests.models.parity import difference, gradient_differences, model_pair
from tests.tiny_hf import tiny_text_config


def text_with_rope(theta: float):
    config = tiny_text_config(vocab_size=301, heads=8, kv_heads=2, layers=3)
    config.rope_parameters = {"rope_type": "default", "rope_theta": theta}
    config.rms_norm_eps = 1e-5
    return config


VARIANTS = {
    "grouped queries": {},
    "tied": {"tied": True},
    "no groups": {"text": tiny_text_config(kv_heads=4)},
    "QwQ's rope": {"text": text_with_rope(1e6)},
}
ARCHITECTURE = LanguageArchitecture(
    model_type="qwen2",
    hidden_size=64,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_size=16,
    ffn_size=128,
    vocab_size=301,
    max_positions=128,
    rope_theta=1e4,
    norm_epsilon=1e-6,
    qkv_bias=True,
    qk_norm=False,
    tied_embeddings=False,
)


def run(ours, token_ids_BS: torch.Tensor) -> torch.Tensor:
    positions_BS = torch.arange(token_ids_BS.shape[1]).expand_as(token_ids_BS)
    return ours.language(input_ids=token_ids_BS, position_ids=positions_BS, attention_mask=None)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_are_those_of_transformers(variant, tmp_path, context):
    ours, theirs = model_pair(tmp_path, context, **VARIANTS[variant])
    token_ids_BS = torch.randint(0, 250, (3, 40), generator=torch.Generator().manual_seed(0))
    got_BSV = run(ours, token_ids_BS)
    hidden_BSH = theirs.model.language_model(input_ids=token_ids_BS).last_hidden_state
    expected_BSV = theirs.lm_head(hidden_BSH)
    assert difference(got_BSV, expected_BSV) < 1e-5
    direction_BSV = torch.randn(got_BSV.shape, generator=torch.Generator().manual_seed(1))
    (got_BSV * direction_BSV).sum().backward()
    (expected_BSV * direction_BSV).sum().backward()
    differences = gradient_differences(ours, theirs, ["language"])
    assert any("k_proj.bias" in name for name in differences)
    assert max(differences.values()) < 1e-4, differences


@pytest.mark.parametrize("training", [True, False])
def test_fused_layers_compute_the_same(training, tmp_path, context):
    ours, _ = model_pair(tmp_path, context)
    ours.train(training)
    token_ids_BS = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(0))
    results = []
    for fused in (False, True):
        settings = ComputeSettings(fused=fused)
        config = language_transformer_config(ARCHITECTURE, settings)
        for name in ("bias_activation_fusion", "bias_dropout_fusion"):
            assert getattr(config, name) is fused
            setattr(ours.language.config, name, fused)
        ours.zero_grad()
        # The functions that a GPU compiles, as they are written.
        with torch.compiler.set_stance("force_eager"):
            logits_BSV = run(ours, token_ids_BS)
            logits_BSV.square().mean().backward()
        gradients = [parameter.grad.clone() for parameter in ours.language.parameters()]
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            results.append([logits_BSV.detach(), run(ours, token_ids_BS), *gradients])
    for fused, unfused in zip(*results, strict=True):
        assert difference(fused, unfused) < 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_only_response_tokens_of_a_shared_row_get_logits(tied, tmp_path, context):
    ours, _ = model_pair(tmp_path, context, tied=tied)
    token_ids_1S = torch.randint(0, 250, (1, 24), generator=torch.Generator().manual_seed(0))
    places = torch.tensor([3, 4, 20])
    params = SharedRowParams(
        qkv_format="sbhd",
        max_seqlen_q=24,
        max_seqlen_kv=24,
        groups=(SharedGroup(0, 24),),
        positions_S=torch.arange(24),
        responses=places,
    )
    positions_1S = torch.arange(24)[None]
    got = ours.language(
        input_ids=token_ids_1S, position_ids=positions_1S, attention_mask=None, packed_seq_params=params
    )
    assert got.shape == (1, 3, run(ours, token_ids_1S).shape[-1])
    assert difference(got, run(ours, token_ids_1S)[:, places]) < 1e-5


def test_padding_on_the_right_changes_nothing(tmp_path, context):
    ours, _ = model_pair(tmp_path, context)
    token_ids_BS = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(0))
    padded_BS = torch.nn.functional.pad(token_ids_BS, (0, 8), value=7)
    with torch.no_grad():
        assert difference(run(ours, padded_BS)[:, :24], run(ours, token_ids_BS)) < 1e-5


@pytest.mark.parametrize(("tensor_size", "rows"), [(1, 301), (2, 302), (4, 304), (8, 304)])
def test_vocabulary_is_padded_to_a_multiple_of_the_ranks(tensor_size, rows):
    assert padded_vocab_size(ARCHITECTURE, tensor_size) == rows


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (ComputeSettings(tensor=3), "parallel.tensor"),
        (ComputeSettings(pipeline=3), "parallel.pipeline"),
        (ComputeSettings(language_overrides={"no_such_setting": 1}), "no_such_setting"),
        (ComputeSettings(language_overrides={"recompute_granularity": "some"}), "model.transformer_config"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(settings, named):
    with pytest.raises(ValueError, match=named):
        language_transformer_config(ARCHITECTURE, settings)


def test_overrides_reach_megatron_core():
    settings = ComputeSettings(language_overrides={"layernorm_epsilon": 0.25})
    assert language_transformer_config(ARCHITECTURE, settings).layernorm_epsilon == 0.25
    assert language_transformer_config(ARCHITECTURE, ComputeSettings()).layernorm_epsilon == 1e-6


def test_sizes_are_those_of_the_architecture():
    other = dataclasses.replace(ARCHITECTURE, head_size=32, qkv_bias=False)
    config = language_transformer_config(other, ComputeSettings())
    assert (config.kv_channels, config.num_query_groups, config.ffn_hidden_size) == (32, 2, 128)
    assert (config.add_qkv_bias, config.add_bias_linear, config.gated_linear_unit) == (False, False, True)
