"""Rollouts on the GPU: greedy is the full forward's choice, log-probs are the training's, graphs change nothing."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.on_device import generate_and_score, rollouts_as_the_device_allows, rollouts_with_graphs, tokens_of
from tests.gpu.test_training import BF16, FP8, TE, needs_te
from tests.ranks import run_ranks


@pytest.mark.parametrize(
    ("compute", "bound"),
    [
        pytest.param({}, 1e-4, id="fp32"),
        # bf16 keeps 8 bits: log-probs of about -5 are good to some hundredths.
        pytest.param(BF16, 0.1, id="bf16"),
        pytest.param(TE, 0.1, id="TE", marks=needs_te),
        pytest.param(FP8, 0.5, id="FP8", marks=needs_te),
    ],
)
def test_the_engine_agrees_with_the_training_forward(compute, bound, inputs):
    (found,) = run_ranks(1, generate_and_score, inputs[0], compute, timeout=600)
    assert found["largest"] < bound
    assert found["mean"] < bound / 4
    # The engine's own rounding decides between tokens that are equal up to it.
    assert found["greedy is below the best by"] < bound
    assert found["different responses"] > 4


@pytest.mark.parametrize("compute", [pytest.param({}, id="fp32"), pytest.param(BF16, id="bf16")])
def test_graphs_replay_what_the_eager_engine_does_also_after_an_update(compute, needs_cuda, inputs):
    (found,) = run_ranks(1, rollouts_with_graphs, inputs[0], compute, timeout=600)
    for when in ("before", "after"):
        # Graphs pad to another number of rows, for which cuBLAS may choose another order of summation.
        eager, graphs = tokens_of(found[f"eager {when}"]), tokens_of(found[f"graphs {when}"])
        same = sum(one == other for one, other in zip(eager, graphs, strict=True))
        assert same == len(eager) if not compute else same >= len(eager) / 2
        first = [[rollout.rollout_log_probs[0] for rollout in found[f"{how} {when}"]] for how in ("eager", "graphs")]
        torch.testing.assert_close(
            torch.tensor(first[0]), torch.tensor(first[1]), atol=0.05 if compute else 1e-4, rtol=0
        )
        assert found[f"managers {when}"] == 0
        assert found[f"impl {when}"] == "none"
    assert tokens_of(found["graphs before"]) != tokens_of(found["graphs after"]), "the weights were the old ones"


@pytest.mark.parametrize("compute", [pytest.param({}, id="fp32"), pytest.param(BF16, id="bf16")])
def test_auto_takes_what_is_free_and_graphs_where_they_hold(compute, needs_cuda, inputs):
    (found,) = run_ranks(1, rollouts_as_the_device_allows, inputs[0], compute, timeout=600)
    assert (found["auto, without graphs"] == "") is found["flash"], found["auto, without graphs"]
    assert found["given, without graphs"] == "generation.cuda_graphs=false"
    assert found["auto, cache"] == found["given, cache"], "all that the requests need fits in both"
    assert 0.9 * found["free"] < found["room"] + 0.03 * found["total"] <= found["free"] + 2**26
    assert found["room"] - found["with a GiB held"] == pytest.approx(2**30, rel=0.1)
    same = sum(one == other for one, other in zip(tokens_of(found["auto"]), tokens_of(found["given"]), strict=True))
    assert same >= len(found["auto"]) / 2
