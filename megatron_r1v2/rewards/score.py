"""Scored rollouts: the parts of the reward, their weighted sum, the claims about images, and metrics that add up."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence

from megatron_r1v2.config.schema import RewardConfig
from megatron_r1v2.rewards.claims import Claim, HallucinationCounts, compile_claim_pattern, hallucination_counts
from megatron_r1v2.rewards.model import check_scores
from megatron_r1v2.rewards.parts import PARTS, Response, score_parts, weighted_total
from megatron_r1v2.rewards.verifiers import VerifierPool, claims_call
from megatron_r1v2.types import Prompt, Rollout, ScoredRollout

_PART_SUM, _PART_RESPONSES = "part/", "responses/"


def score_rollouts(
    prompts: Mapping[str, Prompt],
    rollouts: Sequence[Rollout],
    texts: Sequence[str],
    *,
    settings: RewardConfig,
    pool: VerifierPool,
    max_response_tokens: int,
    model_scores: Sequence[float] | None = None,
) -> tuple[list[ScoredRollout], dict[str, float]]:
    """Score responses: total = sum of weight x part, each part in [0, 1] (`rewards/parts.py`).

    Args:
        texts: each response as text, without its stop token.
        model_scores: raw scores of a reward model in the order of `rollouts`; None without a reward model.

    Returns:
        The scored rollouts in the order of `rollouts`, and sums for `reward_metrics` that can be added over ranks and
        steps.

    Raises:
        ValueError: `reward.claim_pattern` is wrong, there are not as many texts as rollouts, a prompt is missing, or
            `reward.model_weight` has no scores to weigh.
        RuntimeError: `model_scores` is not a finite number for each rollout.
    """
    if len(texts) != len(rollouts):
        raise ValueError(f"{len(rollouts)} rollouts came with {len(texts)} texts; each needs its own")
    rollout_prompts = prompts_of(rollouts, prompts)
    check_model_has_scores(settings, has_scores=model_scores is not None)
    if model_scores is not None:
        check_scores(model_scores, len(rollouts))
    # The pool counts since it was made, over all steps and evaluations.
    timeouts, crashes = pool.timeouts, pool.crashes
    claims = _find_claims(texts, settings.claim_pattern, pool)
    scores: Sequence[float | None] = [None] * len(rollouts) if model_scores is None else model_scores
    responses = [
        Response(prompt, rollout, text, claims_of_text, max_response_tokens, score)
        for prompt, rollout, text, claims_of_text, score in zip(
            rollout_prompts, rollouts, texts, claims, scores, strict=True
        )
    ]
    rewards_and_checks = score_parts(responses, settings=settings, pool=pool)
    scored = [
        ScoredRollout(
            response.rollout,
            response.text,
            rewards,
            total=weighted_total(rewards, settings.weights),
            rule_correct=rewards.get("answer") == 1,
            claims=response.claims,
            model_score=response.model_score,
            checked=checked,
        )
        for response, rewards, checked in zip(responses, *rewards_and_checks, strict=True)
    ]
    counts = reward_counts(scored, prompts)
    counts["verifier_timeouts"] = float(pool.timeouts - timeouts)
    counts["verifier_crashes"] = float(pool.crashes - crashes)
    return scored, counts


def prompts_of(rollouts: Sequence[Rollout], prompts: Mapping[str, Prompt]) -> list[Prompt]:
    """Return the prompt of each rollout; raise ValueError where one is missing."""
    if missing := sorted({rollout.prompt_key for rollout in rollouts} - prompts.keys()):
        raise ValueError(f"no prompt for rollouts of {missing[:3]}; pass every prompt that was generated from")
    return [prompts[rollout.prompt_key] for rollout in rollouts]


def check_model_has_scores(settings: RewardConfig, *, has_scores: bool) -> None:
    """Refuse a weight for the scores of a reward model where there are none.

    Raises:
        ValueError: the part "model" has a weight, but nothing to weigh.
    """
    if settings.model_weight > 0 and not has_scores:
        raise ValueError(
            f"reward.model_weight={settings.model_weight} but no reward model scores the responses; "
            "name one, or set reward.model_weight=0"
        )


def reward_counts(scored: Sequence[ScoredRollout], prompts: Mapping[str, Prompt]) -> dict[str, float]:
    """Return the sums over the responses from which the reward metrics are computed.

    Args:
        scored: the responses; only the names of functions' parts depend on them.
        prompts: by key, for their facts.
    """
    counts = {
        "responses": float(len(scored)),
        "reward_total": sum(response.total for response in scored),
        "model_score": sum(response.model_score or 0.0 for response in scored),
    }
    for name in dict.fromkeys([*PARTS, *(name for response in scored for name in response.rewards)]):
        values = [response.rewards[name] for response in scored if name in response.rewards]
        counts |= {f"{_PART_SUM}{name}": sum(values), f"{_PART_RESPONSES}{name}": float(len(values))}
    hallucination = count_hallucinations(scored, prompts)
    return counts | {f"claims_{name}": float(count) for name, count in dataclasses.asdict(hallucination).items()}


def count_hallucinations(scored: Sequence[ScoredRollout], prompts: Mapping[str, Prompt]) -> HallucinationCounts:
    """Count the claims of scored responses against the facts of their prompts, given by key."""
    facts = [prompts[response.rollout.prompt_key].facts for response in scored]
    return hallucination_counts([response.claims for response in scored], facts)


def reward_metrics(counts: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics by name from the sums of `score_rollouts`, added over ranks.

    A metric without a denominator (no response, no claim, a part that never applied) is left out, because a 0 would
    look measured. The mean of a part is over the responses to which it applies.
    """
    metrics = {"verifier/timeouts": counts["verifier_timeouts"], "verifier/crashes": counts["verifier_crashes"]}
    if counts["responses"]:
        metrics["critic/rewards/mean"] = counts["reward_total"] / counts["responses"]
    applied = {
        key.removeprefix(_PART_RESPONSES): count for key, count in counts.items() if key.startswith(_PART_RESPONSES)
    }
    for name, count in applied.items():
        if count:
            metrics[f"reward/{name}/mean"] = counts[f"{_PART_SUM}{name}"] / count
    if applied["model"]:
        metrics["reward_model/score/mean"] = counts["model_score"] / applied["model"]
    hallucination = HallucinationCounts(
        **{field.name: int(counts[f"claims_{field.name}"]) for field in dataclasses.fields(HallucinationCounts)}
    )
    if hallucination.rate is not None:
        metrics["hallucination/rate"] = hallucination.rate
    if hallucination.coverage is not None:
        metrics["hallucination/coverage"] = hallucination.coverage
    return metrics


def shuffle_rewards(scored: Sequence[ScoredRollout], *, seed: int) -> list[ScoredRollout]:
    """Give each response the rewards of another one, for the control experiment `reward.shuffle`.

    Rewards, total, rule correctness and model score move together along one random cycle through the whole batch
    (Sattolo's algorithm), so no response keeps its own; text and claims stay. Over seeds a response gets the mean
    reward of the others: the remaining signal is -1 / (R - 1) of the true one, for R responses.

    Args:
        scored: all responses of a step, over all ranks, in an order that does not depend on the layout.
        seed: decides the cycle, together with the number of responses.
    """
    source = list(range(len(scored)))
    generator = random.Random(seed)
    for last in range(len(source) - 1, 0, -1):
        chosen = generator.randrange(last)  # never `last` itself: that makes it one cycle, without fixed points
        source[last], source[chosen] = source[chosen], source[last]
    return [
        dataclasses.replace(
            response,
            rewards=scored[other].rewards,
            total=scored[other].total,
            rule_correct=scored[other].rule_correct,
            model_score=scored[other].model_score,
        )
        for response, other in zip(scored, source, strict=True)
    ]


def _find_claims(texts: Sequence[str], pattern: str, pool: VerifierPool) -> list[tuple[Claim, ...]]:
    """Return the claims of each response; a search that hangs or crashes finds none."""
    if compile_claim_pattern(pattern) is None:
        return [()] * len(texts)
    results = pool.run([claims_call(text, pattern) for text in texts], failed=())
    return [tuple((name, value) for name, value in claims) for claims in results]
