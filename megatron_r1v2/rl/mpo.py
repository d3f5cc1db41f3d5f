"""The MPO loss: a preference, a quality and a generation term (R1V2 report, equations 2 to 5; arXiv 2411.10442).

Rows come in pairs: row 2i is the chosen response of pair i, row 2i + 1 the rejected one. What a response is worth to
the loss is its reward r = beta (log p(y) - log p_reference(y)), with log-probs summed over the response.
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
    """How much each term counts; DPO is (1, 0, 0), supervised training on the chosen responses (0, 0, 1)."""

    preference: float
    quality: float
    generation: float


@dataclass(frozen=True)
class RewardShift:
    """delta of the quality term: a moving average of past rewards, the same on every rank."""

    value: float = 0.0
    count: float = 0.0
    """Rewards averaged so far."""

    def fold(self, mean: float, count: float, *, momentum: float) -> RewardShift:
        """Take in the rewards of one optimizer step, chosen and rejected, of all ranks.

        momentum 0: the mean of all rewards so far, each counting the same (TRL's RunningMoments); else
        delta <- momentum delta + (1 - momentum) mean, from 0 (NeMo-RL).

        Args:
            mean: Of the step's rewards.
            count: How many they are.
            momentum: 0, or the part of the old value that stays.

        Returns:
            The shift for the next step; this one when there were no rewards.
        """
        if not count:
            return self
        total = self.count + count
        kept = momentum if momentum else self.count / total
        return RewardShift(kept * self.value + (1.0 - kept) * mean, total)


def split_by_margin(prompts: Iterable[Prompt], min_margin: float) -> tuple[list[Prompt], list[Prompt]]:
    """Decide which pairs are clear enough to learn from: those whose margin is at least tau.

    Args:
        prompts: Each with a preference. A pair that nobody scored counts as one of margin 0: it passes where tau does
            not ask for more.
        min_margin: tau.

    Returns:
        Pairs to train on, and pairs below tau.
    """
    kept: list[Prompt] = []
    below: list[Prompt] = []
    for prompt in prompts:
        assert prompt.preference is not None, f"{prompt.key} has no preference"
        (kept if (prompt.preference.margin or 0.0) >= min_margin else below).append(prompt)
    return kept, below


def response_log_probs(log_probs_BS: torch.Tensor, response_mask_BS: torch.Tensor) -> torch.Tensor:
    """Sum log-probs over responses.

    Args:
        log_probs_BS: float32 [B, S]: of the labels.
        response_mask_BS: [B, S]: 1 at response tokens; elsewhere the log-probs do not matter.

    Returns:
        float64 [B]: over thousands of tokens a float32 sum would lose what a step changes.
    """
    # Selecting before any arithmetic keeps NaN and infinity of padding out of the loss and of its gradient.
    return torch.where(response_mask_BS.bool(), log_probs_BS, 0.0).double().sum(dim=1)


def preference_loss(chosen_rewards_P: torch.Tensor, rejected_rewards_P: torch.Tensor) -> torch.Tensor:
    """Return DPO's loss of each pair: -log sigmoid(r_c - r_r) (equation 3; arXiv 2305.18290).

    Args:
        chosen_rewards_P: [P].
        rejected_rewards_P: [P].

    Returns:
        [P].
    """
    return -logsigmoid(chosen_rewards_P - rejected_rewards_P)


def quality_loss(chosen_rewards_P: torch.Tensor, rejected_rewards_P: torch.Tensor, delta: float) -> torch.Tensor:
    """Return BCO's loss of each pair: -log sigmoid(r_c - delta) - log sigmoid(-(r_r - delta)).

    Equation 4 of the report; arXiv 2404.04656.

    Args:
        chosen_rewards_P: [P].
        rejected_rewards_P: [P].
        delta: What a response must be worth to count as good; a constant.

    Returns:
        [P].
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
    """Return this microbatch's part of the negative log-likelihood of the chosen responses.

    "sequence": the mean over pairs of -log p(y_c) / |y_c| (equation 5, and what InternVL's trainer computes with one
    pair a microbatch); "token": one mean over all chosen tokens, as TRL's "sft" loss.

    Args:
        chosen_log_probs_PS: float32 [P, S].
        chosen_mask_PS: [P, S]: 1 at response tokens.
        denominator: Pairs ("sequence") or chosen tokens ("token") of the global batch.
        aggregation: "sequence" or "token".
        weights_P: float32 [P]: 0 for a pair that only fills a microbatch; None: all 1.

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
    log_probs_BS: torch.Tensor,
    reference_sums_B: torch.Tensor,
    response_mask_BS: torch.Tensor,
    *,
    weights: TermWeights,
    beta: float,
    delta: float,
    num_pairs: float,
    generation_denominator: float,
    generation_aggregation: str,
    weights_B: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return this microbatch's part of the MPO loss.

    L = w_p mean L_pref + w_q mean L_qual + w_g L_gen (equation 2), means over the pairs of the global batch. Where the
    policy is the reference and delta is 0, it is w_p log 2 + w_q 2 log 2 + w_g NLL: 0.8318 + NLL for 0.8, 0.2 and 1. A
    sum, as `grpo.grpo_loss`: parts of one batch, on any rank, add up.

    Args:
        log_probs_BS: float32 [B, S]: of the policy in training; chosen and rejected rows in turn.
        reference_sums_B: float64 [B]: log-probs of the whole responses under the reference.
        response_mask_BS: [B, S]: 1 at response tokens; elsewhere the log-probs do not matter.
        weights: Of the three terms.
        beta: Scale of the rewards.
        delta: Shift of the quality term.
        num_pairs: Pairs of the global batch.
        generation_denominator: Of `generation_loss`.
        generation_aggregation: Of `generation_loss`.
        weights_B: float32 [B]: 0 for rows that only fill a microbatch, the two of a pair alike; None: all 1.

    Returns:
        The loss, a scalar with gradient; and the metrics by name, each a float64 [2] pair (sum, count). Those under
        "rewards/" and "logps/" are TRL's.

    Raises:
        ValueError: On shapes that do not fit, an odd number of rows, or 16-bit log-probs.
    """
    check_loss_inputs(
        num_pairs,
        log_probs_BS.shape,
        log_probs_BS=log_probs_BS,
        reference_sums_B=reference_sums_B,
        response_mask_BS=response_mask_BS,
        weights_B=weights_B,
    )
    if log_probs_BS.shape[0] % 2:
        raise ValueError(f"log_probs_BS has {log_probs_BS.shape[0]} rows, which are no pairs of chosen and rejected")
    sums_B = response_log_probs(log_probs_BS, response_mask_BS)
    rewards_B = beta * (sums_B - reference_sums_B.double())
    chosen_P, rejected_P = rewards_B[::2], rewards_B[1::2]
    weights_P = torch.ones_like(chosen_P) if weights_B is None else weights_B[::2].double()
    preference_P = preference_loss(chosen_P, rejected_P)
    quality_P = quality_loss(chosen_P, rejected_P, delta)
    generation, metrics = generation_loss(
        log_probs_BS[::2],
        response_mask_BS[::2],
        denominator=generation_denominator,
        aggregation=generation_aggregation,
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
