"""Log-probs of given tokens, from whole logits and from logits split over ranks."""

import math

import pytest
import torch

from megatron_r1v2.config.schema import ParallelConfig
from megatron_r1v2.models import log_probs
from megatron_r1v2.models.log_probs import token_entropy, token_log_probs
from megatron_r1v2.parallel import groups
from megatron_r1v2.parallel.groups import ParallelContext
from tests.ranks import run_ranks

PADDED = 12
SETTINGS = [(1.0, 12), (1.0, 10), (0.5, 10), (1.7, 7), (1.0, 5)]
"""Temperature and true vocabulary; with 5 or fewer of 12 ids the second of two ranks holds padding only."""


def inputs(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(vocab_size)
    logits_BSV = 4 * torch.randn(3, 5, PADDED, generator=generator)
    logits_BSV[..., vocab_size:] += 20  # padding that was not masked would take all the probability
    labels_BS = torch.randint(0, vocab_size, (3, 5), generator=generator)
    return logits_BSV, labels_BS, torch.randn(3, 5, generator=generator)


def expected(temperature: float, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log softmax(logits / temperature)[label] over the true ids, and its gradient."""
    logits_BSV, labels_BS, direction_BS = inputs(vocab_size)
    logits_BSV.requires_grad_()
    scores = logits_BSV[..., :vocab_size] / temperature
    values_BS = (scores - scores.logsumexp(-1, keepdim=True)).gather(2, labels_BS[..., None])[..., 0]
    (values_BS * direction_BS).sum().backward()
    return values_BS.detach(), logits_BSV.grad


def compute(context: ParallelContext) -> list[tuple[torch.Tensor, torch.Tensor, bool]]:
    """Return, for each setting, values, the gradient of this rank's logits, and whether the logits were let alone."""
    results = []
    for temperature, vocab_size in SETTINGS:
        logits_BSV, labels_BS, direction_BS = inputs(vocab_size)
        mine_BSV = logits_BSV.chunk(context.tensor_size, dim=-1)[context.tensor_rank].clone().requires_grad_()
        before = mine_BSV.detach().clone()
        got_BS = token_log_probs(
            mine_BSV, labels_BS, temperature=temperature, vocab_size=vocab_size, groups=context.groups
        )
        (got_BS * direction_BS).sum().backward()
        results.append((got_BS.detach(), mine_BSV.grad, torch.equal(mine_BSV.detach(), before)))
    return results


def compute_on_two_ranks() -> list[tuple[torch.Tensor, torch.Tensor, bool]]:
    return compute(groups.initialize(ParallelConfig(tensor=2), seed=1))


@pytest.mark.parametrize("tensor_size", [1, 2])
def test_values_and_gradients_are_those_of_log_softmax_over_the_true_vocabulary(tensor_size, context):
    ranks = [compute(context)] if tensor_size == 1 else run_ranks(2, compute_on_two_ranks)
    for index, setting in enumerate(SETTINGS):
        values_BS, gradient_BSV = expected(*setting)
        for rank in ranks:
            got_BS, _, untouched = rank[index]
            torch.testing.assert_close(got_BS, values_BS, atol=1e-5, rtol=1e-5)
            assert untouched, "the logits are the caller's"
        joined_BSV = torch.cat([rank[index][1] for rank in ranks], dim=-1)
        torch.testing.assert_close(joined_BSV, gradient_BSV, atol=1e-5, rtol=1e-5)
        assert not joined_BSV[..., setting[1] :].any(), "padding has no gradient"


def test_log_probs_of_bf16_logits_are_computed_in_fp32(context):
    logits_BSV, labels_BS, _ = inputs(10)
    rounded_BSV = logits_BSV.bfloat16()
    settings = {"temperature": 1.0, "vocab_size": 10, "groups": context.groups}
    got_BS = token_log_probs(rounded_BSV, labels_BS, **settings)
    assert got_BS.dtype == torch.float32
    assert torch.equal(got_BS, token_log_probs(rounded_BSV.float(), labels_BS, **settings))


def entropies(context: ParallelContext) -> list[torch.Tensor]:
    found = []
    for temperature, vocab_size in SETTINGS:
        mine_BSV = inputs(vocab_size)[0].chunk(context.tensor_size, dim=-1)[context.tensor_rank].requires_grad_()
        found.append(token_entropy(mine_BSV, temperature=temperature, vocab_size=vocab_size, groups=context.groups))
    return found


def entropies_on_two_ranks() -> list[torch.Tensor]:
    return entropies(groups.initialize(ParallelConfig(tensor=2), seed=1))


@pytest.mark.parametrize("tensor_size", [1, 2])
def test_the_entropy_is_that_of_the_true_vocabulary(tensor_size, context, monkeypatch):
    monkeypatch.setattr(log_probs, "POSITIONS_AT_ONCE", 2)  # of 5 positions
    ranks = [entropies(context)] if tensor_size == 1 else run_ranks(2, entropies_on_two_ranks)
    for index, (temperature, vocab_size) in enumerate(SETTINGS):
        scores_BSV = inputs(vocab_size)[0][..., :vocab_size] / temperature
        expected_BS = torch.distributions.Categorical(logits=scores_BSV).entropy()
        for rank in ranks:
            torch.testing.assert_close(rank[index], expected_BS, atol=1e-5, rtol=1e-5)
            assert not rank[index].requires_grad


def test_the_entropy_of_a_certain_and_of_a_uniform_distribution(context):
    logits_BSV = torch.zeros(1, 2, 4)
    logits_BSV[0, 1, 2] = 1e6
    got_BS = token_entropy(logits_BSV, temperature=1.0, vocab_size=4, groups=context.groups)
    torch.testing.assert_close(got_BS, torch.tensor([[math.log(4), 0.0]]))
