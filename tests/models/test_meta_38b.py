"""The real 38B model, built without memory at the layouts of the recipes: what each rank holds, number by number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_r1v2.checkpoint.hf.architecture import r1v2_architecture
from megatron_r1v2.checkpoint.hf.mapping import MappedParameter, parameter_map
from megatron_r1v2.checkpoint.hf.operations import Replicated
from megatron_r1v2.config.load import load_recipe
from megatron_r1v2.config.schema import ParallelConfig, Part
from megatron_r1v2.models.architecture import R1V2Architecture
from megatron_r1v2.models.r1v2 import R1V2Model, build_r1v2, freeze_all_but
from megatron_r1v2.models.settings import ComputeSettings
from megatron_r1v2.parallel import cpu, groups
from megatron_r1v2.parallel.groups import ParallelContext

RECIPES = sorted((Path(__file__).parents[2] / "examples" / "r1v2_38b").glob("*.yaml"))
FACTORIES = {"empty", "zeros", "ones", "full", "rand", "randn", "arange", "tensor", "empty_strided"}
# facts/r1v2.md 1: without padding
WHOLE = {"vision": 5_536_496_000, "adapter": 91_786_240, "language": 32_763_876_352}

# InternViT-6B-448px-V2_5 and QwQ-32B as their configurations have them, in transformers' InternVL layout.
HF: dict[str, Any] = {
    "model_type": "internvl",
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "downsample_ratio": 0.5,
    "image_token_id": 151671,
    "tie_word_embeddings": False,
    "vision_config": {
        "model_type": "internvl_vision",
        "hidden_act": "gelu",
        "hidden_size": 3200,
        "num_hidden_layers": 45,
        "num_attention_heads": 25,
        "intermediate_size": 12800,
        "image_size": [448, 448],
        "patch_size": [14, 14],
        "norm_type": "rms_norm",
        "layer_norm_eps": 1e-6,
        "attention_bias": False,
        "use_qk_norm": True,
    },
    "text_config": {
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": 5120,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "intermediate_size": 27648,
        "vocab_size": 152064,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-5,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
    },
}


class _OnMeta(TorchFunctionMode):
    """Make every new tensor one without memory, those included that ask for the device of the rank."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(function, "__name__", "") in FACTORIES:
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


@contextmanager
def rank_of(world_size: int, rank: int, parallel: ParallelConfig) -> Iterator[ParallelContext]:
    """Stand for one rank of many: torch's fake process groups answer every collective at once."""
    cpu.install_if_needed()
    groups.check_world_size(parallel, world_size)
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(parallel.tensor, parallel.pipeline, create_gloo_process_groups=False)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        yield groups.current_context(torch.device("meta"))
    finally:
        groups.shut_down()


def build(parallel: ParallelConfig, *, world_size: int, rank: int) -> R1V2Model:
    """Build what one rank of the 38B model holds, once for all tests: there is nothing in it to change."""
    return _build(parallel.tensor, parallel.pipeline, parallel.sequence, parallel.first_stage_layers, world_size, rank)


@cache
def _build(tensor: int, pipeline: int, sequence: bool, first: int, world_size: int, rank: int) -> R1V2Model:
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, sequence=sequence, first_stage_layers=first)
    settings = ComputeSettings(
        tensor=tensor, pipeline=pipeline, sequence=sequence, first_stage_layers=first, dtype=torch.bfloat16
    )
    with rank_of(world_size, rank, parallel) as context, _OnMeta():
        return build_r1v2(architecture(), settings, groups=context.groups, device=context.device)


def architecture() -> R1V2Architecture:
    return r1v2_architecture(HF)


@cache
def _rows() -> tuple[MappedParameter, ...]:
    return parameter_map(architecture())


def counts(model: R1V2Model) -> dict[str, int]:
    results: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        assert parameter.is_meta
        results[name.split(".")[0]] += parameter.numel()
    return dict(results)


def language_layers(model: R1V2Model) -> list[int]:
    """Return the numbers of this stage's language layers, counted from 0 over all stages."""
    return [m.layer_number - 1 for m in model.language.modules() if isinstance(m, TransformerLayer)]


def test_one_rank_holds_the_parameters_of_the_paper():
    model = build(ParallelConfig(), world_size=1, rank=0)
    assert counts(model) == WHOLE
    assert sum(WHOLE.values()) == 38_392_158_592
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    mapped = {row.ours for row in _rows()}
    assert {name for name, _ in model.named_parameters()} == mapped


def padded_attention(tensor: int) -> int:
    """Return the vision parameters that zero heads add over all ranks: q, k, v, the projection, both norms."""
    heads = -25 % tensor
    return 45 * heads * 128 * (4 * 3200 + 2)


def replicated(part: str) -> int:
    """Return the parameters of a part that every tensor-parallel rank holds whole, from the name table's operations."""
    model = build(ParallelConfig(), world_size=1, rank=0)
    whole = {row.ours for row in _rows() if isinstance(row.operation, Replicated)}
    results = {name: weight.numel() for name, weight in model.named_parameters() if name in whole}
    return sum(size for name, size in results.items() if name.startswith(f"{part}."))


@pytest.mark.parametrize(("tensor", "heads"), [(2, 26), (4, 28), (8, 32)])
def test_tensor_parallel_ranks_hold_equal_shares_and_the_padding(tensor, heads):
    model = build(ParallelConfig(tensor=tensor, sequence=True), world_size=tensor, rank=0)
    spread = {part: WHOLE[part] - replicated(part) for part in WHOLE}
    spread["vision"] += padded_attention(tensor)
    expected = {part: spread[part] // tensor + replicated(part) for part in WHOLE}
    assert all(spread[part] % tensor == 0 for part in WHOLE)
    assert counts(model) == expected
    norm = model.vision.decoder.layers[0].self_attention.query_norm.weight
    assert norm.shape == (heads // tensor * 128,)


def test_a_rank_of_tensor_8_in_numbers():
    """By hand: 45 vision layers of 16,815,424, 64 language layers of 60,959,616, 2 x 19,008 rows of 5,120."""
    model = build(ParallelConfig(tensor=8, sequence=True), world_size=8, rank=0)
    assert counts(model) == {"vision": 761_862_080, "adapter": 11_500_160, "language": 4_096_062_464}
    attention, mlp = model.language.decoder.layers[0].self_attention, model.language.decoder.layers[0].mlp
    assert attention.linear_qkv.weight.shape == ((5 + 1 + 1) * 128, 5120)
    assert attention.linear_proj.weight.shape == (5120, 5 * 128)
    assert mlp.linear_fc1.weight.shape == (2 * 3456, 5120)
    assert model.language.embedding.word_embeddings.weight.shape == (19008, 5120)
    assert model.vision.decoder.layers[44].self_attention.linear_qkv.weight.shape == (3 * 4 * 128, 3200)
    assert model.vision.decoder.layers[44].mlp.linear_fc1.weight.shape == (1600, 3200)
    assert model.adapter.linear_fc1.weight.shape == (640, 12800)


@pytest.mark.parametrize(("first", "layers"), [(18, [18, 46]), (30, [30, 34])])
def test_stages_hold_their_layers_and_the_first_one_vision_and_adapter(first, layers):
    parallel = ParallelConfig(tensor=8, pipeline=2, sequence=True, first_stage_layers=first)
    alone = counts(build(ParallelConfig(tensor=8, sequence=True), world_size=8, rank=0))
    stages = [build(parallel, world_size=16, rank=rank) for rank in (0, 8)]
    numbers = [language_layers(stage) for stage in stages]
    assert [len(results) for results in numbers] == layers
    assert numbers[0] + numbers[1] == list(range(64))
    held = [counts(stage) for stage in stages]
    assert held[1].keys() == {"language"}
    assert {part: held[0][part] for part in ("vision", "adapter")} == {k: alone[k] for k in ("vision", "adapter")}
    assert held[0]["language"] + held[1]["language"] == alone["language"]
    names = [{name.split(".")[1] for name, _ in stage.language.named_parameters()} for stage in stages]
    assert "word_embeddings" in names[0] - names[1]
    assert "final_layernorm" in names[1] - names[0]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_each_recipe_is_built_at_its_layout(path):
    """With the local layers: TransformerEngine's hold the same parameters, and only clusters have it."""
    recipe = load_recipe(path)
    parallel, parts = recipe.parallel, [part for part in recipe.train.parts if part is not Part.score]
    world_size = parallel.tensor * parallel.pipeline
    total, trained, stages = 0, 0, []
    for rank in range(0, world_size, parallel.tensor):
        model = build(parallel, world_size=world_size, rank=rank)
        stages.append(set(counts(model)))
        total += parallel.tensor * sum(counts(model).values())
        names = set(freeze_all_but(model, parts))
        trained += sum(weight.numel() for name, weight in model.named_parameters() if name in names)
        assert all(weight.requires_grad == (name in names) for name, weight in model.named_parameters())
    copies = (parallel.tensor - 1) * sum(replicated(part) for part in WHOLE)
    assert total == sum(WHOLE.values()) + padded_attention(parallel.tensor) + copies
    assert "adapter" in stages[0]
    assert all(stage == {"language"} for stage in stages[1:])
    expected = sum(
        (WHOLE[part.value] - replicated(part.value)) // parallel.tensor + replicated(part.value) for part in parts
    )
    assert Part.vision not in parts
    assert trained == expected
