"""Rollouts to scored rollouts: every part of the reward, their weighted sum, and the claims about images."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence

from megatron_r1v2.config.schema import RewardConfig
from megatron_r1v2.rewards.claims import HallucinationCounts, compile_claim_pattern, hallucination_counts
from megatron_r1v2.rewards.format import format_score
from megatron_r1v2.rewards.verifiers import VerifierPool, answer_call, claims_call
from megatron_r1v2.types import Prompt, Rollout, ScoredRollout


def score_rollouts(
    prompts: Mapping[str, Prompt],
    rollouts: Sequence[Rollout],
    texts: Sequence[str],
    *,
    settings: RewardConfig,
    pool: VerifierPool,
) -> tuple[list[ScoredRollout], dict[str, float]]:
    """Score responses: total = answer_weight x answer + format_weight x format, each part in [0, 1].

    Args:
        prompts: by key; holds the prompt of every rollout.
        rollouts: the responses.
        texts: each response as text, without its stop token.
        settings: the `reward` section.
        pool: where answers are checked and claims are found.

    Returns:
        The scored rollouts in the order of `rollouts`, and sums that can be added over ranks and steps:
        `reward_metrics` turns them into metrics.

    Raises:
        ValueError: `reward.claim_pattern` is wrong, there are not as many texts as rollouts, or a prompt is missing.
    """
    if len(texts) != len(rollouts):
        raise ValueError(f"{len(rollouts)} rollouts came with {len(texts)} texts; each needs its own")
    if missing := sorted({rollout.prompt_key for rollout in rollouts} - prompts.keys()):
        raise ValueError(f"no prompt for rollouts of {missing[:3]}; pass every prompt that was generated from")
    of_rollout = [prompts[rollout.prompt_key] for rollout in rollouts]
    timeouts, crashes = pool.timeouts, pool.crashes
    correct, claims = _verify(of_rollout, texts, settings.claim_pattern, pool)

    scored = []
    for rollout, text, is_correct, found in zip(rollouts, texts, correct, claims, strict=True):
        rewards = {"answer": float(is_correct), "format": format_score(text)}
        total = settings.answer_weight * rewards["answer"] + settings.format_weight * rewards["format"]
        scored.append(ScoredRollout(rollout, text, rewards, total, rule_correct=is_correct, claims=found))

    counts = reward_counts(scored, prompts)
    counts["verifier_timeouts"] = float(pool.timeouts - timeouts)
    counts["verifier_crashes"] = float(pool.crashes - crashes)
    return scored, counts


def reward_counts(scored: Sequence[ScoredRollout], prompts: Mapping[str, Prompt]) -> dict[str, float]:
    """Return what the reward metrics are made of, as sums over the responses.

    Args:
        scored: the responses.
        prompts: by key, for their facts.
    """
    hallucination = count_hallucinations(scored, prompts)
    return {
        "responses": float(len(scored)),
        "reward_total": sum(response.total for response in scored),
        "reward_answer": sum(response.rewards["answer"] for response in scored),
        "reward_format": sum(response.rewards["format"] for response in scored),
    } | {f"claims_{name}": float(count) for name, count in dataclasses.asdict(hallucination).items()}


def count_hallucinations(scored: Sequence[ScoredRollout], prompts: Mapping[str, Prompt]) -> HallucinationCounts:
    """Count the claims of scored responses against the facts of their prompts.

    Args:
        scored: the responses.
        prompts: by key.
    """
    facts = [prompts[response.rollout.prompt_key].facts for response in scored]
    return hallucination_counts([response.claims for response in scored], facts)


def reward_metrics(counts: Mapping[str, float]) -> dict[str, float]:
    """Turn the sums of `score_rollouts`, added over ranks, into metrics.

    Args:
        counts: the sums.

    Returns:
        Metrics by name. A rate without a denominator (no response, no claim) is left out: 0 would be a lie.
    """
    metrics = {"verifier/timeouts": counts["verifier_timeouts"], "verifier/crashes": counts["verifier_crashes"]}
    if counts["responses"]:
        metrics["critic/rewards/mean"] = counts["reward_total"] / counts["responses"]
        metrics["reward/answer/mean"] = counts["reward_answer"] / counts["responses"]
        metrics["reward/format/mean"] = counts["reward_format"] / counts["responses"]
    hallucination = HallucinationCounts(
        **{field.name: int(counts[f"claims_{field.name}"]) for field in dataclasses.fields(HallucinationCounts)}
    )
    if hallucination.rate is not None:
        metrics["hallucination/rate"] = hallucination.rate
    if hallucination.coverage is not None:
        metrics["hallucination/coverage"] = hallucination.coverage
    return metrics


def shuffle_rewards(scored: Sequence[ScoredRollout], *, seed: int) -> list[ScoredRollout]:
    """Deal the rewards to wrong responses, for the control experiment `reward.shuffle`.

    Rewards, total and rule correctness move together along one random cycle through the whole batch (Sattolo's
    algorithm), so no response keeps its own; text and claims stay. Over seeds a response gets the mean reward of the
    others: what is left of a signal is -1 / (R - 1) of the true one, for R responses.

    Args:
        scored: all responses of a step, over all ranks, in an order that does not depend on the layout.
        seed: decides the deal, together with the number of responses.
    """
    source = list(range(len(scored)))
    generator = random.Random(seed)
    for last in range(len(source) - 1, 0, -1):
        chosen = generator.randrange(last)
        source[last], source[chosen] = source[chosen], source[last]
    return [
        dataclasses.replace(
            response,
            rewards=scored[other].rewards,
            total=scored[other].total,
            rule_correct=scored[other].rule_correct,
        )
        for response, other in zip(scored, source, strict=True)
    ]


def _verify(
    prompts: Sequence[Prompt], texts: Sequence[str], claim_pattern: str, pool: VerifierPool
) -> tuple[list[bool], list[tuple[tuple[str, str], ...]]]:
    """Return correctness and claims of each response; a check that hangs or crashes gives False or no claims."""
    calls = [answer_call(text, prompt.answer, prompt.answer_type) for prompt, text in zip(prompts, texts, strict=True)]
    if compile_claim_pattern(claim_pattern) is None:
        return pool.run(calls, failed=False), [()] * len(texts)
    results = pool.run(calls + [claims_call(text, claim_pattern) for text in texts], failed=None)
    correct = [result is True for result in results[: len(texts)]]
    claims = [tuple((name, value) for name, value in result or ()) for result in results[len(texts) :]]
    return correct, claims
