"""Parameters, gradients and optimizer state: the planner's bytes against those of the real objects, none off."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_r1v2.config.schema import ParallelConfig, Part, TrainConfig
from megatron_r1v2.models.architecture import LanguageArchitecture, R1V2Architecture, VisionArchitecture
from megatron_r1v2.planning.parameters import Layout, stage_parameters
from megatron_r1v2.planning.state import ModelState, largest_state, model_state
from tests.ranks import run_ranks

COMBINATIONS = (("adapter",), ("adapter", "language"), ("adapter", "vision"), ("vision", "adapter", "language"))
PRECISIONS = (torch.float32, torch.bfloat16)


def make_architecture(*, family="6b", tied=False, language="qwen2"):
    """Return sizes that nothing divides: 5 vision heads, 301 words."""
    is_6b = family == "6b"
    return R1V2Architecture(
        vision=VisionArchitecture(
            hidden_size=80,
            num_layers=2,
            num_heads=5,
            ffn_size=160,
            image_size=32,
            patch_size=4,
            norm="rms_norm" if is_6b else "layer_norm",
            norm_epsilon=1e-6,
            qkv_bias=not is_6b,
            qk_norm=is_6b,
        ),
        language=LanguageArchitecture(
            model_type=language,
            hidden_size=96,
            num_layers=3,
            num_heads=4,
            num_kv_heads=2,
            head_size=24,
            ffn_size=200,
            vocab_size=301,
            max_positions=256,
            rope_theta=1e6,
            norm_epsilon=1e-6,
            qkv_bias=language == "qwen2",
            qk_norm=language == "qwen3",
            tied_embeddings=tied,
        ),
        image_token_id=300,
        downsample_ratio=0.5,
    )


def real_states(architecture, parallel):
    """Build model, DDP and optimizer for each combination of parts and precision, and weigh them."""
    from megatron_r1v2.parallel import groups

    context = groups.initialize(parallel, seed=1)
    return [
        (context.data_rank, *real_state(architecture, parallel, context, parts, dtype))
        for parts, dtype in itertools.product(COMBINATIONS, PRECISIONS)
    ]


def real_state(architecture, parallel, context, parts, dtype):
    from megatron_r1v2.models.r1v2 import build_r1v2, freeze_all_but
    from megatron_r1v2.models.settings import ComputeSettings
    from megatron_r1v2.training.optimizer import build_optimizer, wrap_with_ddp

    settings = ComputeSettings(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        first_stage_layers=parallel.first_stage_layers,
        dtype=dtype,
    )
    model = build_r1v2(architecture, settings, groups=context.groups, device=context.device)
    freeze_all_but(model, [Part(part) for part in parts])
    ddp = wrap_with_ddp(model, context)
    optimizer, _ = build_optimizer(ddp, TrainConfig(steps=2))
    weights = storage_bytes(model.parameters())
    names = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    gradients = sum(buffer.grad_data.untyped_storage().nbytes() for buffer in ddp.buffers)
    held = {}
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            held |= storage_bytes(group["params"])
            for parameter in group["params"]:
                held |= storage_bytes(part.optimizer.state[parameter].values())
    state = sum(size for key, size in held.items() if key not in weights)
    return names, sum(weights.values()), gradients, state


def storage_bytes(tensors):
    storages = [tensor.data.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


@pytest.mark.parametrize(
    ("family", "tied", "language", "parallel", "data"),
    [
        ("6b", False, "llama", ParallelConfig(), 1),
        ("300m", True, "qwen2", ParallelConfig(tensor=2), 1),
        ("6b", True, "qwen3", ParallelConfig(pipeline=2, first_stage_layers=1), 1),
        ("6b", False, "qwen2", ParallelConfig(), 3),
    ],
    ids=["one rank, Llama", "TP2, tied", "PP2, tied, Qwen3", "DP3"],
)
def test_bytes_are_those_of_the_real_objects(family, tied, language, parallel, data):
    architecture = make_architecture(family=family, tied=tied, language=language)
    layout = Layout(parallel.tensor, parallel.pipeline, data, parallel.first_stage_layers)
    ranks = run_ranks(layout.ranks, real_states, architecture, parallel)
    for rank, measured in enumerate(ranks):
        stage = rank // (layout.tensor * data)
        for (parts, dtype), (data_rank, names, *weighed) in zip(
            itertools.product(COMBINATIONS, PRECISIONS), measured, strict=True
        ):
            planned = [(parameter.name, parameter.shape) for parameter in stage_parameters(architecture, layout, stage)]
            assert planned == names
            state = model_state(
                architecture,
                layout,
                stage=stage,
                parts=[Part(part) for part in parts],
                element_bytes=dtype.itemsize,
                data_rank=data_rank,
            )
            assert [state.parameters, state.gradients, state.optimizer] == weighed, (rank, parts, dtype)


def test_a_stage_that_trains_nothing_has_no_gradients_and_no_optimizer():
    layout = Layout(pipeline=3)
    state = model_state(make_architecture(), layout, stage=1, parts=[Part.adapter], element_bytes=2)
    assert state == ModelState(state.parameters, 0, 0, 0, largest_parameter=state.largest_parameter)
    assert state.parameters > 0


POLICY = (Part.vision, Part.adapter, Part.language)


def test_shares_of_the_optimizer_add_up_to_what_trains():
    layout = Layout(data=7)
    shares = [
        model_state(make_architecture(), layout, stage=0, parts=POLICY, element_bytes=2, data_rank=rank)
        for rank in range(7)
    ]
    trained = sum(parameter.numel for parameter in stage_parameters(make_architecture(), layout, 0))
    assert sum(share.shard_elements for share in shares) == trained
    largest = largest_state(make_architecture(), layout, stage=0, parts=POLICY, element_bytes=2)
    assert largest.total == pytest.approx(max(share.total for share in shares), rel=1e-3)
