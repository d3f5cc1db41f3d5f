"""Managers of CUDA graphs live in a generation phase only, and layouts that cannot be captured are refused.

That graphs replay the right numbers needs a GPU (tests/gpu). Here megatron-core's manager, which needs one too, is
replaced; the random-number tracker and the model are the real ones.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_r1v2.generation import cuda_graphs
from megatron_r1v2.generation.cuda_graphs import check_cuda_graphs, graphed_layers


def test_layouts_that_cannot_be_captured_are_refused(one_rank):
    _, context = one_rank
    with pytest.raises(ValueError, match="generation.cuda_graphs=true needs a CUDA device and there is none"):
        check_cuda_graphs(context)
    on_gpu = replace(context, device=torch.device("cuda"), tensor_size=2)
    with pytest.raises(ValueError, match=r"parallel.tensor=2 needs NCCL.*the ranks talk over gloo"):
        check_cuda_graphs(on_gpu)
    check_cuda_graphs(replace(on_gpu, tensor_size=1))


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
        with graphed_layers(model):
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
    with pytest.raises(RuntimeError, match="out of memory"), graphed_layers(model):
        pass
    assert managers(model) == [None, None]
    assert model.config.cuda_graph_impl == "none"
    assert "delete" in calls
