"""Managers of CUDA graphs live in a generation phase only, and layouts that cannot be captured are refused.

That a GPU replays the right numbers needs one (tests/gpu). Here megatron-core's own manager captures and replays with
graphs that are functions: a replay calls the layer again on the captured inputs.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer import cuda_graphs as megatron_graphs
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_r1v2.generation import cuda_graphs
from megatron_r1v2.generation.cuda_graphs import check_cuda_graphs, decide_cuda_graphs, graphed_layers
from megatron_r1v2.generation.features import FeatureCache
from megatron_r1v2.models import paged_attention
from megatron_r1v2.parallel import groups
from tests.generation.worlds import assert_same_rollouts, generate, make_engine, make_prompts


def test_layouts_that_cannot_be_captured_are_refused(one_rank):
    _, context = one_rank
    with pytest.raises(ValueError, match="generation.cuda_graphs=true needs a CUDA device and there is none"):
        check_cuda_graphs(context)
    on_gpu = replace(context, device=torch.device("cuda"), tensor_size=2)
    with pytest.raises(ValueError, match=r"parallel.tensor=2 needs NCCL.*the ranks talk over gloo"):
        check_cuda_graphs(on_gpu)
    check_cuda_graphs(replace(on_gpu, tensor_size=1))


def test_auto_takes_graphs_where_they_hold_and_says_why_not(one_rank, monkeypatch):
    model, context = one_rank
    on_gpu = replace(context, device=torch.device("cuda"))
    bf16 = SimpleNamespace(fp8=None, fp8_recipe=None, params_dtype=torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(cuda_graphs, "is_flash_attention_usable", lambda dtype: dtype is torch.bfloat16)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "NCCL_GRAPH_REGISTER"):
        monkeypatch.delenv(name, raising=False)
    assert decide_cuda_graphs("auto", bf16, on_gpu) == ""
    assert decide_cuda_graphs(False, bf16, on_gpu) == "generation.cuda_graphs=false"
    assert "no CUDA device" in decide_cuda_graphs("auto", model.config, context)
    assert "over gloo" in decide_cuda_graphs("auto", bf16, replace(on_gpu, tensor_size=2))
    assert "flash-attn" in decide_cuda_graphs(
        "auto", SimpleNamespace(**vars(bf16) | {"params_dtype": torch.float32}), on_gpu
    )
    for recipe, holds in (("tensorwise", True), ("blockwise", False)):
        fp8 = SimpleNamespace(**vars(bf16) | {"fp8": "hybrid", "fp8_recipe": recipe})
        assert (decide_cuda_graphs("auto", fp8, on_gpu) == "") is holds
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        with monkeypatch.context() as environment:
            environment.setenv(name, "max_split_size_mb:512,expandable_segments:True")
            reason = f"{name}=expandable_segments:True without NCCL_GRAPH_REGISTER=0"
            assert decide_cuda_graphs("auto", bf16, on_gpu) == reason
            with pytest.raises(ValueError, match=f"{name}=expandable_segments:True: set NCCL_GRAPH_REGISTER=0 too"):
                decide_cuda_graphs(True, bf16, on_gpu)
            environment.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
            assert decide_cuda_graphs("auto", bf16, on_gpu) == ""
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("NCCL_GRAPH_REGISTER", "0")
    assert decide_cuda_graphs("auto", bf16, on_gpu) == decide_cuda_graphs(True, bf16, on_gpu) == ""


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Replace everything that needs a GPU, and record the order of the calls."""
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the stream of before")
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: calls.append(f"back to {stream}"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    monkeypatch.setattr(cuda_graphs, "delete_cuda_graphs", lambda: calls.append("delete"))
    monkeypatch.setattr(cuda_graphs, "CudaGraphManager", lambda config: f"manager for {config.cuda_graph_impl}")
    return calls


def managers(model) -> list[object]:
    return [getattr(layer, "cudagraph_manager", None) for layer in model.language.decoder.layers]


@pytest.mark.parametrize("fails", [False, True])
def test_managers_and_random_states_last_as_long_as_the_block(one_rank, calls, fails):
    model, _ = one_rank
    states = {name: state.clone() for name, state in get_cuda_rng_tracker().get_states().items()}
    assert states

    def use() -> None:
        with graphed_layers(model, 64):
            assert managers(model) == ["manager for local"] * 2
            assert get_cuda_rng_tracker().get_states().keys() != states.keys()
            calls.append("use")
            if fails:
                raise RuntimeError("capture failed")

    if fails:
        with pytest.raises(RuntimeError, match="capture failed"):
            use()
    else:
        use()
    assert managers(model) == [None, None]
    assert model.config.cuda_graph_impl == "none"
    after = get_cuda_rng_tracker().get_states()
    assert after.keys() == states.keys()
    assert all(torch.equal(after[name], state) for name, state in states.items())
    assert calls == ["synchronize", "use", "synchronize", "delete", "back to the stream of before"]


def test_a_manager_that_cannot_be_made_leaves_nothing_behind(one_rank, calls, monkeypatch):
    model, _ = one_rank
    made: list[int] = []

    def fail_at_the_second(config):
        made.append(1)
        if len(made) == 2:
            raise RuntimeError("out of memory")
        return "a manager"

    monkeypatch.setattr(cuda_graphs, "CudaGraphManager", fail_at_the_second)
    with pytest.raises(RuntimeError, match="out of memory"), graphed_layers(model, 64):
        pass
    assert managers(model) == [None, None]
    assert model.config.cuda_graph_impl == "none"
    assert "delete" in calls


class _NoReads(TorchDispatchMode):
    """Refuses what a capture refuses: the host that waits for a number, or for a shape that depends on numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"):
            raise AssertionError(f"{name} in a capture")
        return func(*args, **(kwargs or {}))


class _Graph:
    """A CUDA graph on a CPU."""

    def register_generator_state(self, generator) -> None: ...

    def replay(self) -> None:
        self.run()


@pytest.fixture
def counts(monkeypatch) -> Counter[str]:
    """Let megatron-core capture on a CPU, and count captures and replays."""
    counts: Counter[str] = Counter()
    capturing = [False]

    @contextmanager
    def capture(graph, pool, capture_error_mode):
        counts["captures"] += 1
        capturing[0] = True
        try:
            with _NoReads():
                yield
        finally:
            capturing[0] = False

    create = megatron_graphs._CudaGraphRunner.create_fwd_graph

    def create_and_keep(self, *args, **kwargs) -> None:
        create(self, *args, **kwargs)

        def run() -> None:
            counts["replays"] += 1
            capturing[0] = True  # the branch that was captured
            out = self.func(*self.fwd_graph_input_args, **self.fwd_graph_input_kwargs)
            capturing[0] = False
            for static, new in zip(self.fwd_graph_output_surface, self.get_tensors(out), strict=True):
                static.copy_(new)

        self.fwd_graph.run = run

    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "Stream", lambda: "a stream")
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the stream of before")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_stats", Counter)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(megatron_graphs._CudaGraphRunner, "create_fwd_graph", create_and_keep)
    monkeypatch.setattr(paged_attention, "is_capturing", lambda tensor: capturing[0])
    return counts


@pytest.mark.parametrize("settings", [{}, {"max_tokens_per_step": 128, "kv_cache_gib": 0.0006}], ids=["roomy", "tight"])
def test_megatron_core_captures_once_a_phase_and_replays_every_decode_step(
    one_rank, counts, monkeypatch, capsys, settings
):
    """Shared prompts, evictions and images included; the engine, its context and the manager are the real ones."""
    model, context = one_rank
    prompts = make_prompts(model, 7)
    settings = settings | {"max_requests": 128}
    # Responses that grow over a block want another one, which others have.
    how = {"num_responses": 3, "max_response_tokens": 60}
    eager_engine, engine = (make_engine(model, context, **settings) for _ in range(2))
    eager_engine.stop_ids = engine.stop_ids = frozenset()
    eager = generate(eager_engine, prompts, FeatureCache(0), **how)
    steps: Counter[bool] = Counter()
    update = DynamicInferenceContext.update_requests

    def count(self, *args):
        steps[self.is_decode_only()] += 1
        assert type(self) is DynamicInferenceContext, "megatron-core's graphs take no subclass"
        assert self.using_cuda_graph_this_step() == self.is_decode_only()
        return update(self, *args)

    monkeypatch.setattr(DynamicInferenceContext, "update_requests", count)
    engine.without_graphs = ""  # as on a GPU
    for _ in range(2):
        steps.clear()
        counts.clear()
        graphed = generate(engine, prompts, FeatureCache(0), **how)
        assert_same_rollouts(graphed, eager)
        assert counts["captures"] == 2 * 2, "two layers, for up to 64 and up to 128 requests"
        assert steps[True] > 20
        # A capture is followed by its first replay.
        assert counts["replays"] == 2 * steps[True] + counts["captures"]
        assert managers(model) == [None, None]
        assert capsys.readouterr().err == "", "megatron-core's progress bar, on each rank and in each phase"
    assert bool(engine.num_evictions) is ("kv_cache_gib" in settings)


def test_the_buffer_of_gathered_tokens_stays_in_place_while_graphs_live(one_rank, calls, monkeypatch):
    """Longer steps than the captured ones would replace it."""
    model, _ = one_rank
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(cuda_graphs, "reserve_gather_buffer", lambda shape, dtype: asked.append(shape))
    with graphed_layers(model, 512):
        assert asked == [], "nothing is gathered without sequence parallelism"
    monkeypatch.setattr(model.config, "sequence_parallel", True)
    with graphed_layers(model, 512):
        assert asked == [(512, 1, model.config.hidden_size)]
    monkeypatch.undo()
    groups.reserve_gather_buffer((512, 1, 8), torch.float32)
    buffer = groups.parallel_state.get_global_memory_buffer()
    before = buffer.get_tensor((512, 1, 8), torch.float32, "mpu").data_ptr()
    assert buffer.get_tensor((3, 1, 8), torch.float32, "mpu").data_ptr() == before
