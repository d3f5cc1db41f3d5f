"""The reward model's head: scores by hand, one weight in every layout, the sequence split over ranks."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_r1v2.config.schema import ParallelConfig
from megatron_r1v2.models.score_head import ScoreHead
from megatron_r1v2.parallel import groups
from megatron_r1v2.parallel.groups import ParallelContext
from tests.ranks import run_ranks

HIDDEN = 8


def make_head(context: ParallelContext, *, seed: int = 3, hidden_size: int = HIDDEN) -> ScoreHead:
    size = context.tensor_size
    config = TransformerConfig(
        num_layers=1,
        hidden_size=hidden_size,
        num_attention_heads=2,
        tensor_model_parallel_size=size,
        sequence_parallel=size > 1,
    )
    return ScoreHead(config, hidden_size, groups=context.groups, seed=seed)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Return hidden states [S, B, H] and the direction [B, S] that gradients are taken in."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 2, HIDDEN, generator=generator), torch.randn(2, 6, generator=generator)


def test_scores_are_products_with_the_weight(context):
    head = make_head(context)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, -2.0, 0, 0, 0, 0, 0, 0.5]]))
    hidden_SBH = torch.zeros(2, 1, HIDDEN, dtype=torch.bfloat16)
    hidden_SBH[0, 0] = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8])
    scores_BS = head(hidden_SBH)
    assert scores_BS.tolist() == [[1.0, 0.0]], "1 - 4 + 4, and no bias"
    assert scores_BS.dtype == torch.float32


def test_fresh_scores_are_about_one_and_the_seed_decides_them(context):
    hidden_SBH = torch.randn(500, 1, 512)
    first, again, other = (make_head(context, seed=seed, hidden_size=512) for seed in (3, 3, 4))
    assert 0.8 < first(hidden_SBH).std() < 1.2
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)


def score_a_part() -> dict[str, torch.Tensor]:
    # Another seed than that of `context`: the weight must not depend on megatron-core's trackers.
    context = groups.initialize(ParallelConfig(tensor=2, sequence=True), seed=99)
    head = make_head(context)
    hidden_SBH, direction_BS = inputs()
    part_SBH = hidden_SBH.chunk(2)[context.tensor_rank].clone().requires_grad_()
    scores_BS = head(part_SBH)
    (scores_BS * direction_BS).sum().backward()
    return {
        "scores": scores_BS.detach(),
        "weight": head.weight.detach(),
        "input gradient": part_SBH.grad,
        "weight gradient": head.weight.grad,
        "is summed": torch.tensor(head.weight.sequence_parallel),
    }


def test_a_split_sequence_has_the_scores_and_gradients_of_a_whole_one(context):
    head = make_head(context)
    hidden_SBH, direction_BS = inputs()
    hidden_SBH.requires_grad_()
    expected_BS = head(hidden_SBH)
    (expected_BS * direction_BS).sum().backward()
    ranks = run_ranks(2, score_a_part)
    for rank in ranks:
        assert torch.equal(rank["weight"], head.weight)
        assert rank["is summed"]
        torch.testing.assert_close(rank["scores"], expected_BS)
    torch.testing.assert_close(torch.cat([rank["input gradient"] for rank in ranks]), hidden_SBH.grad)
    # megatron-core adds the gradients of marked parameters over the ranks.
    torch.testing.assert_close(sum(rank["weight gradient"] for rank in ranks), head.weight.grad)
