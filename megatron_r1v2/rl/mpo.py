"""The MPO loss: a preference, a quality and a generation term (R1V2 report, equations 2 to 5; arXiv 2411.10442).

Rows come in pairs: row 2i is the chosen response of pair i, row 2i + 1 the rejected one. The reward of a response is
r = beta (log p(y) - log p_reference(y)), with log-probs summed over the response.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid

from megatron_r1v2.rl.aggregation import check_loss_inputs, sum_and_count, token_weights
from megatron_r1v2.rl.supervised import supervised_loss
from megatron_r1v2.types import Prompt


class TermWeights(NamedTuple):
    """The weights of the three terms; DPO is (1, 0, 0), supervised training on the chosen responses (0, 0, 1)."""

    preference: float
    quality: float
    generation: float


@dataclass(frozen=True)
class MpoSettings:
    """The choices of the loss that hold for a whole run."""

    weights: TermWeights
    beta: float
    """Scale of the rewards."""
    generation_aggregation: str
    """Aggregation of `generation_loss`, "sequence" or "token"."""


@dataclass(frozen=True)
class MpoInputs:
    """One microbatch: B/2 pairs, whose chosen and rejected responses are rows in turn, of at most S tokens."""

    log_probs_BS: torch.Tensor
    """float32, of the policy in training, with gradient. Values outside the response mask do not matter."""
    reference_sums_B: torch.Tensor
    """float64, log-probs of the whole responses under the reference."""
    response_mask_BS: torch.Tensor
    """1 at response tokens."""
    weights_B: torch.Tensor | None = None
    """0 for rows that only fill the microbatch, the same for both rows of a pair; None: all 1."""


@dataclass(frozen=True)
class RewardShift:
    """delta of the quality term: a moving average of past rewards, the same on every rank."""

    value: float = 0.0
    count: float = 0.0
    """Rewards averaged so far."""

    def update(self, mean: float, count: float, *, momentum: float) -> RewardShift:
        """Return the shift for the next step, after the rewards of one optimizer step.

        momentum 0: the mean of all rewards so far, each counting the same (TRL's RunningMoments); else
        delta <- momentum delta + (1 - momentum) mean, from 0 (NeMo-RL).

        Args:
            mean: over the step's rewards, chosen and rejected, of all ranks.
            count: number of these rewards; 0 leaves the shift as it is.
            momentum: 0, or the part of the old value that stays.
        """
        if not count:
            return self
        # With momentum 0 each reward weighs the same, so the part that stays grows with the rewards seen.
        total = self.count + count
        kept = momentum if momentum else self.count / total
        return RewardShift(kept * self.value + (1.0 - kept) * mean, total)

    def rescaled(self, factor: float) -> RewardShift:
        """Return the shift of rewards of another beta, which are so many times as large."""
        return RewardShift(factor * self.value, self.count)


def split_by_margin(prompts: Iterable[Prompt], min_margin: float) -> tuple[list[Prompt], list[Prompt]]:
    """Split pairs into those whose margin is at least tau and those below it.

    Args:
        min_margin: tau, the calibrated threshold.
    """
    kept: list[Prompt] = []
    below: list[Prompt] = []
    for prompt in prompts:
        assert prompt.preference is not None, f"{prompt.key} has no preference"
        # A pair without a score passes as long as tau asks for nothing.
        (kept if (prompt.preference.margin or 0.0) >= min_margin else below).append(prompt)
    return kept, below


def response_log_probs(log_probs_BS: torch.Tensor, response_mask_BS: torch.Tensor) -> torch.Tensor:
    """Sum log-probs over each response, in float64 [B]; they may be anything outside the mask."""
    # Selecting before any arithmetic keeps NaN and infinity of padding out of the loss and of its gradient. In float32
    # the sum over thousands of tokens would round away the change that one step makes.
    return torch.where(response_mask_BS.bool(), log_probs_BS, 0.0).double().sum(dim=1)


def preference_loss(chosen_rewards_P: torch.Tensor, rejected_rewards_P: torch.Tensor) -> torch.Tensor:
    """Compute DPO's loss of each pair: -log sigmoid(r_c - r_r) (equation 3; arXiv 2305.18290)."""
    # logsigmoid stays finite where the log of a sigmoid would be -inf: at margins below -90 in float32.
    return -logsigmoid(chosen_rewards_P - rejected_rewards_P)


def quality_loss(chosen_rewards_P: torch.Tensor, rejected_rewards_P: torch.Tensor, delta: float) -> torch.Tensor:
    """Compute BCO's loss of each pair: -log sigmoid(r_c - delta) - log sigmoid(-(r_r - delta)).

    Equation 4 of the report; arXiv 2404.04656. `delta` (see `RewardShift`) is a constant: no gradient flows through it.
    """
    return -logsigmoid(chosen_rewards_P - delta) - logsigmoid(-(rejected_rewards_P - delta))


def generation_loss(
    chosen_log_probs_PS: torch.Tensor,
    chosen_mask_PS: torch.Tensor,
    *,
    denominator: float,
    aggregation: str,
    weights_P: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Compute this microbatch's part of the negative log-likelihood of the chosen responses.

    "sequence": the mean over pairs of -log p(y_c) / |y_c| (equation 5, and what InternVL's trainer computes with one
    pair a microbatch); "token": one mean over all chosen tokens, as TRL's "sft" loss.

    Args:
        chosen_log_probs_PS: float32.
        chosen_mask_PS: 1 at response tokens.
        denominator: pairs ("sequence") or chosen tokens ("token") of the global batch.
        weights_P: 0 for a pair that only fills a microbatch; None: all 1.

    Returns:
        The loss, a scalar with gradient; and the metrics "mpo/generation_loss" and "actor/nll" (always the mean over
        tokens), each a float64 [2] pair (sum, count).
    """
    loss, metrics = supervised_loss(
        chosen_log_probs_PS, chosen_mask_PS, denominator=denominator, weights_B=weights_P, aggregation=aggregation
    )
    weights_PS = token_weights(chosen_mask_PS, aggregation, weights_P)
    return loss, {"mpo/generation_loss": sum_and_count(-chosen_log_probs_PS, weights_PS), **metrics}


def mpo_loss(
    inputs: MpoInputs, settings: MpoSettings, *, delta: float, num_pairs: float, generation_denominator: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Compute this microbatch's part of the MPO loss.

    L = w_p mean L_pref + w_q mean L_qual + w_g L_gen (equation 2), means over the pairs of the global batch. Where the
    policy is the reference and delta is 0, it is w_p log 2 + w_q 2 log 2 + w_g NLL: 0.8318 + NLL for 0.8, 0.2 and 1. A
    sum, as `grpo.grpo_loss`: parts of one batch, on any rank, add up.

    Args:
        delta: shift of the quality term, see `RewardShift`.
        num_pairs: pairs of the global batch.
        generation_denominator: denominator of `generation_loss`.

    Returns:
        The loss, a scalar with gradient; and the metrics by name, each a float64 [2] pair (sum, count). Those under
        "rewards/" and "logps/" are TRL's.

    Raises:
        ValueError: On shapes that do not fit, an odd number of rows, or 16-bit log-probs.
    """
    log_probs_BS, mask_BS, weights = inputs.log_probs_BS, inputs.response_mask_BS, settings.weights
    check_loss_inputs(num_pairs, log_probs_BS.shape, **vars(inputs))
    if log_probs_BS.shape[0] % 2:
        raise ValueError(f"log_probs_BS has {log_probs_BS.shape[0]} rows, which are no pairs of chosen and rejected")
    sums_B = response_log_probs(log_probs_BS, mask_BS)
    # In float64 until the sum over pairs: the two sums are large and nearly equal.
    rewards_B = settings.beta * (sums_B - inputs.reference_sums_B.double())
    chosen_P, rejected_P = rewards_B[::2], rewards_B[1::2]
    weights_P = torch.ones_like(chosen_P) if inputs.weights_B is None else inputs.weights_B[::2].double()
    preference_P = preference_loss(chosen_P, rejected_P)
    quality_P = quality_loss(chosen_P, rejected_P, delta)
    generation, metrics = generation_loss(
        log_probs_BS[::2],
        mask_BS[::2],
        denominator=generation_denominator,
        aggregation=settings.generation_aggregation,
        weights_P=weights_P,
    )
    pairs_P = weights.preference * preference_P + weights.quality * quality_P
    loss = (pairs_P * weights_P).sum().float() / num_pairs + weights.generation * generation
    for name, values_P in (
        ("mpo/preference_loss", preference_P),
        ("mpo/quality_loss", quality_P),
        ("rewards/chosen", chosen_P),
        ("rewards/rejected", rejected_P),
        ("rewards/margins", chosen_P - rejected_P),
        ("rewards/accuracies", (chosen_P > rejected_P).double()),
        ("logps/chosen", sums_B[::2]),
        ("logps/rejected", sums_B[1::2]),
    ):
        metrics[name] = sum_and_count(values_P, weights_P)
    return loss, metrics
