"""Llama and Qwen3 as the language model: transformers' numbers, bit-exact round trips, layouts, splicing, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_r1v2.checkpoint.hf.architecture import language_architecture, r1v2_architecture
from megatron_r1v2.checkpoint.hf.companions import Components
from megatron_r1v2.checkpoint.hf.folders import read_json
from megatron_r1v2.checkpoint.hf.mapping import hf_leftovers, parameter_map
from megatron_r1v2.checkpoint.splicing import reassemble
from megatron_r1v2.config.schema import ParallelConfig
from tests.checkpoint.hf.test_mapping import hf_from_shards, shards_from_hf
from tests.distributed.steps import Material, Outcome, make_material, run_step
from tests.distributed.test_step import TOGETHER, check_gradients
from tests.models.parity import MEAN, STD, difference, gradient_differences, model_pair, random_tiles
from tests.ranks import run_ranks
from tests.tiny_hf import (
    InternVLForConditionalGeneration,
    randomise,
    tiny_byte_tokenizer,
    tiny_hf_model,
    tiny_hf_vision,
)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"original_max_position_embeddings": 64}
SIZES = {
    "vocab_size": 301,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
}


def llama(**changes: Any) -> LlamaConfig:
    """Return a tiny Llama: grouped queries, no bias anywhere."""
    return LlamaConfig(**SIZES, rms_norm_eps=1e-5, **changes)


def qwen3(**changes: Any) -> Qwen3Config:
    """Return a tiny Qwen3: a norm over each head, whose size is not the quotient."""
    return Qwen3Config(**SIZES, head_dim=24, **changes)


VARIANTS = {
    "llama": {"text": llama()},
    "llama, tied": {"text": llama(tie_word_embeddings=True)},
    "llama 3": {"text": llama(rope_parameters=LLAMA3), "family": "6b"},
    "yarn": {"text": llama(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, **YARN})},
    "linear": {"text": llama(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0})},
    "dynamic": {"text": llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})},
    "a base that is no whole number": {"text": llama(rope_parameters={"rope_type": "default", "rope_theta": 9999.5})},
    "qwen3": {"text": qwen3()},
    "qwen3, tied": {"text": qwen3(tie_word_embeddings=True)},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_are_those_of_transformers(variant, tmp_path, context):
    """Through the whole model, at a length where the stretched rotations of Llama 3 count."""
    ours, theirs = model_pair(tmp_path, context, **VARIANTS[variant])
    token_ids_BS = torch.randint(0, 250, (2, 500), generator=torch.Generator().manual_seed(0))
    token_ids_BS[0, 3:35] = token_ids_BS[1, 5:21] = theirs.config.image_token_id
    token_ids_BS[1, 21:37] = theirs.config.image_token_id
    tiles_TCHW = random_tiles(4)
    got_BSV = ours(token_ids_BS, torch.arange(500).expand(2, -1), tiles_TCHW=tiles_TCHW)
    expected_BSV = theirs(input_ids=token_ids_BS, pixel_values=(tiles_TCHW / 255 - MEAN) / STD).logits
    assert difference(got_BSV, expected_BSV) < 1e-4
    direction_BSV = torch.randn(got_BSV.shape, generator=torch.Generator().manual_seed(1))
    (got_BSV * direction_BSV).sum().backward()
    (expected_BSV * direction_BSV).sum().backward()
    differences = gradient_differences(ours, theirs, ["vision", "adapter", "language"])
    assert max(differences.values()) < 1e-4, differences


def test_the_stretched_rotations_are_seen_at_that_length(tmp_path, context):
    ours, theirs = model_pair(tmp_path, context, **VARIANTS["llama 3"])
    plain = LlamaRotaryEmbedding(llama(rope_parameters={"rope_type": "default", "rope_theta": 1e4})).inv_freq
    token_ids_BS = torch.randint(0, 250, (1, 500), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected_BSV = theirs(input_ids=token_ids_BS).logits
        ours.language.rotary_pos_emb.inv_freq = torch.Tensor(plain)
        got_BSV = ours(token_ids_BS, torch.arange(500)[None])
    assert difference(got_BSV, expected_BSV) > 1e-3


@pytest.mark.parametrize(("theta", "factor"), [(5e5, 8.0), (5e5, 32.0), (1e4, 2.0)])
def test_rotations_of_llama_3_are_those_of_transformers(theta, factor, tmp_path, context):
    """Every frequency at the true head size, the interpolated ones included."""
    rope = {**LLAMA3, "rope_theta": theta, "factor": factor}
    ours, _ = model_pair(tmp_path, context, text=llama(rope_parameters=rope, head_dim=128))
    expected = LlamaRotaryEmbedding(llama(rope_parameters=rope, head_dim=128)).inv_freq
    got = ours.language.rotary_pos_emb.inv_freq
    assert got.shape == expected.shape == (64,)
    assert ((got - expected) / expected).abs().max() < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tensor_size", [1, 2, 4])
def test_round_trip_is_bit_exact(variant, tensor_size, tmp_path):
    tiny_hf_model(tmp_path, **VARIANTS[variant])
    architecture = r1v2_architecture(read_json(tmp_path / "config.json"))
    tensors = load_file(tmp_path / "model.safetensors")
    assert hf_leftovers(architecture, tensors) == ([], [])
    rows = parameter_map(architecture)
    shards = [shards_from_hf(rows, tensors, tensor_rank=rank, tensor_size=tensor_size) for rank in range(tensor_size)]
    again = hf_from_shards(rows, shards)
    assert again.keys() == tensors.keys()
    assert [name for name in tensors if not torch.equal(again[name], tensors[name])] == []


STEPS = [
    # Without sequence parallelism nothing but their own rule sums the gradients of Qwen3's norms over the ranks.
    ("qwen3", ParallelConfig(tensor=2)),
    ("qwen3", ParallelConfig(tensor=2, sequence=True)),
    ("llama, tied", ParallelConfig(tensor=2, sequence=True)),
    ("llama, tied", ParallelConfig(pipeline=2)),
]


def take_steps(inputs: dict[str, tuple[str, Material]]) -> list[Outcome]:
    return [run_step(*inputs[variant], parallel, TOGETHER) for variant, parallel in STEPS]


def test_a_step_on_two_ranks_gives_the_gradients_of_transformers(tmp_path):
    names = {variant for variant, _ in STEPS}
    inputs = {
        name: (str(tmp_path / name), make_material(tiny_hf_model(tmp_path / name, **VARIANTS[name]))) for name in names
    }
    first, second = run_ranks(2, take_steps, inputs)
    for (variant, _), main, other in zip(STEPS, first, second, strict=True):
        check_gradients(main.gradients, inputs[variant][1].gradients)
        assert main.out_of_step == other.out_of_step == []


def write_llama(folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """Write a causal Llama with its tokenizer and, as old files have, its rotations; return what it computes with."""
    tokenizer = tiny_byte_tokenizer(image_tokens=False)
    model = LlamaForCausalLM(llama(**changes))
    randomise(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    rotations = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(6) for n in range(2)}
    save_file({**stored, **rotations}, folder / "model.safetensors", {"format": "pt"})
    return model.state_dict()


@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_is_spliced_into_a_model_that_transformers_loads(tmp_path, tied):
    tiny_hf_vision(tmp_path / "vision")
    language = write_llama(tmp_path / "language", tie_word_embeddings=tied, rope_parameters=LLAMA3)
    components = Components(vision=tmp_path / "vision", language=tmp_path / "language")
    architecture = reassemble(components, tmp_path / "out")
    assert (architecture.language.model_type, architecture.language.rope_type) == ("llama", "llama3")
    whole, info = InternVLForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    results = whole.state_dict()
    for name, value in language.items():
        inside = name if name.startswith("lm_head") else name.replace("model.", "model.language_model.", 1)
        assert torch.equal(results[inside], value), name


def test_rope_of_older_files_is_read():
    """transformers 4 wrote `rope_scaling` beside `rope_theta`, as Llama 3.1's config.json has it."""
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    hf = {**llama().to_dict(), "rope_parameters": None, "rope_scaling": scaling, "rope_theta": 5e5}
    results = language_architecture(hf)
    assert (results.rope_theta, results.rope_type, results.qkv_bias, results.qk_norm) == (5e5, "llama3", False, False)
    assert dict(results.rope_parameters)["factor"] == 8.0


@pytest.mark.parametrize(
    ("config", "changes", "named"),
    [
        (llama(), {"attention_bias": True}, "attention_bias=True of a llama is not supported"),
        (llama(), {"mlp_bias": True}, "mlp_bias=True"),
        (qwen3(), {"attention_bias": True}, "attention_bias=True of a qwen3"),
        (llama(), {"rope_parameters": {"rope_type": "proportional"}}, "'proportional'.*accepted: 'default'"),
        (llama(), {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(config, changes, named):
    with pytest.raises(ValueError, match=named):
        language_architecture({**config.to_dict(), **changes})
