"""The two-way table by arithmetic alone: every tensor-parallel size, no process group."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest
import torch

from megatron_r1v2.checkpoint.hf.architecture import r1v2_architecture
from megatron_r1v2.checkpoint.hf.folders import SafetensorsFolder, read_json
from megatron_r1v2.checkpoint.hf.mapping import MappedParameter, canonical_hf_name, hf_leftovers, parameter_map
from megatron_r1v2.models.architecture import R1V2Architecture
from tests.tiny_hf import tiny_hf_model, tiny_text_config, tiny_vision_config

VARIANTS = {
    "300m": {"family": "300m"},
    "6b": {"family": "6b"},
    "300m-tied": {"family": "300m", "tied": True},
    # 5 heads divide by no layout, 301 ids pad by another count for each, 8 query heads share 2 key-value heads.
    "6b-odd": {
        "family": "6b",
        "vision": tiny_vision_config("6b", heads=5),
        "text": tiny_text_config(vocab_size=301, heads=8, kv_heads=2),
    },
    "300m-odd": {"family": "300m", "vision": tiny_vision_config("300m", heads=5)},
}


def shards_from_hf(
    parameters: Iterable[MappedParameter], tensors: Mapping[str, torch.Tensor], *, tensor_rank: int, tensor_size: int
) -> dict[str, torch.Tensor]:
    """Return all that one tensor-parallel rank holds, by our names."""
    return {
        parameter.ours: parameter.to_shard(tensors, tensor_rank=tensor_rank, tensor_size=tensor_size)
        for parameter in parameters
    }


def hf_from_shards(
    parameters: Iterable[MappedParameter], shards: Sequence[Mapping[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Return all Hugging Face tensors from what the tensor-parallel ranks hold, in rank order."""
    tensors: dict[str, torch.Tensor] = {}
    for parameter in parameters:
        if parameter.exported:
            tensors |= parameter.to_hf([shard[parameter.ours] for shard in shards])
    return tensors


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def checkpoint(request, tmp_path_factory) -> tuple[R1V2Architecture, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp(request.param)
    tiny_hf_model(folder, **VARIANTS[request.param])
    return read_checkpoint(folder)


def read_checkpoint(folder: Path) -> tuple[R1V2Architecture, dict[str, torch.Tensor]]:
    with SafetensorsFolder(folder) as opened:
        tensors = {name: opened.tensor(name) for name in opened.names()}
    return r1v2_architecture(read_json(folder / "config.json")), tensors


@pytest.mark.parametrize("tensor_size", [1, 2, 4, 8])
def test_round_trip_is_bit_exact_at_every_tensor_parallel_size_and_in_both_layouts(checkpoint, tensor_size):
    architecture, tensors = checkpoint
    parameters = parameter_map(architecture)
    chat = parameter_map(architecture, "chat")
    # The table's second column: by way of it, at another size, and back.
    whole = hf_from_shards(chat, [shards_from_hf(parameters, tensors, tensor_rank=0, tensor_size=1)])
    assert hf_leftovers(architecture, whole, "chat") == ([], [])
    in_chat = [shards_from_hf(chat, whole, tensor_rank=rank, tensor_size=tensor_size) for rank in range(tensor_size)]
    again = hf_from_shards(parameters, in_chat)
    assert [name for name in tensors if not torch.equal(again[name], tensors[name])] == []
    shards = [
        shards_from_hf(parameters, tensors, tensor_rank=rank, tensor_size=tensor_size) for rank in range(tensor_size)
    ]
    again = hf_from_shards(parameters, shards)
    assert sorted(again) == sorted(tensors)
    assert [name for name in tensors if not torch.equal(again[name], tensors[name])] == []


def test_every_tensor_of_the_checkpoint_has_one_row(checkpoint):
    architecture, tensors = checkpoint
    assert hf_leftovers(architecture, tensors) == ([], [])
    written = [name for parameter in parameter_map(architecture) if parameter.exported for name in parameter.hf]
    assert sorted(written) == sorted(tensors)


def test_no_two_tensors_of_the_checkpoint_are_equal(checkpoint):
    """Otherwise a swap would pass the round trip."""
    _, tensors = checkpoint
    prints = {(tuple(tensor.shape), tensor.flatten()[:8].numpy().tobytes()) for tensor in tensors.values()}
    assert len(prints) == len(tensors)


def test_shards_are_what_megatron_core_expects(tmp_path):
    tiny_hf_model(tmp_path, **VARIANTS["6b-odd"])
    architecture, tensors = read_checkpoint(tmp_path)
    rank_1 = shards_from_hf(parameter_map(architecture), tensors, tensor_rank=1, tensor_size=2)

    hf = "language_model.model.layers.1.self_attn."
    query, key, value = (tensors[f"{hf}{letter}_proj.weight"] for letter in "qkv")
    expected = torch.cat([query[48:], key[12:], value[12:]])
    assert torch.equal(rank_1["language.decoder.layers.1.self_attention.linear_qkv.weight"], expected)

    hf = "language_model.model.layers.0.mlp."
    expected = torch.cat([tensors[f"{hf}gate_proj.weight"][96:], tensors[f"{hf}up_proj.weight"][96:]])
    assert torch.equal(rank_1["language.decoder.layers.0.mlp.linear_fc1.weight"], expected)

    embedding = rank_1["language.embedding.word_embeddings.weight"]
    assert torch.equal(embedding[:-1], tensors["language_model.model.embed_tokens.weight"][151:])
    assert embedding.shape[0] == 151
    assert not embedding[-1].any()

    hf = "vision_tower.encoder.layer.0.attention."
    heads = [torch.cat([tensors[f"{hf}{letter}_proj.weight"][16 * head :][:16] for letter in "qkv"]) for head in (3, 4)]
    expected = torch.cat([*heads, torch.zeros(48, 80)])
    assert torch.equal(rank_1["vision.decoder.layers.0.self_attention.linear_qkv.weight"], expected)
    projection = rank_1["vision.decoder.layers.0.self_attention.linear_proj.weight"]
    assert torch.equal(projection[:, :32], tensors[f"{hf}projection_layer.weight"][:, 48:])
    assert not projection[:, 32:].any()
    norm = rank_1["vision.decoder.layers.0.self_attention.query_norm.weight"]
    assert torch.equal(norm, torch.cat([tensors[f"{hf}q_norm.weight"][48:], torch.zeros(16)]))


def test_tied_embeddings_fill_the_copy_of_the_last_stage_but_are_written_once(tmp_path):
    tiny_hf_model(tmp_path, tied=True)
    architecture, tensors = read_checkpoint(tmp_path)
    shard = shards_from_hf(parameter_map(architecture), tensors, tensor_rank=0, tensor_size=2)
    assert torch.equal(shard["language.output_layer.weight"], shard["language.embedding.word_embeddings.weight"])
    assert "language_model.lm_head.weight" not in tensors
    assert hf_leftovers(architecture, [*tensors, "language_model.lm_head.weight"]) == ([], [])


def test_names_inside_the_model_and_in_files_are_read_alike(tmp_path):
    model = tiny_hf_model(tmp_path)
    inside = {canonical_hf_name(name) for name in model.state_dict()}
    _, tensors = read_checkpoint(tmp_path)
    assert inside == set(tensors)
    assert {canonical_hf_name(name) for name in tensors} == set(tensors)


def test_first_pixel_shuffle_is_refused_because_transformers_has_only_the_second(tmp_path):
    tiny_hf_model(tmp_path)
    architecture, _ = read_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="pixel_shuffle='v1'"):
        parameter_map(dataclasses.replace(architecture, pixel_shuffle="v1"))
    assert parameter_map(dataclasses.replace(architecture, pixel_shuffle="v1"), "chat")
    with pytest.raises(ValueError, match="layout='skywork'"):
        parameter_map(architecture, "skywork")


def test_wrong_sizes_name_the_tensor(tmp_path):
    tiny_hf_model(tmp_path)
    architecture, tensors = read_checkpoint(tmp_path)
    name = "language_model.model.embed_tokens.weight"
    tensors[name] = tensors[name][:-1]
    with pytest.raises(ValueError, match=rf"{name} \[299, 96\].*implies 300"):
        shards_from_hf(parameter_map(architecture), tensors, tensor_rank=0, tensor_size=1)


def test_rows_for_qk_norm_exist_where_the_language_model_has_it(tmp_path):
    tiny_hf_model(tmp_path)
    architecture, _ = read_checkpoint(tmp_path)
    with_norm = dataclasses.replace(architecture, language=dataclasses.replace(architecture.language, qk_norm=True))
    added = {row.ours for row in parameter_map(with_norm)} - {row.ours for row in parameter_map(architecture)}
    assert len(added) == 4
