"""The parts of the reward, each in [0, 1], and their weighted sum.

To add a part: a row in `PARTS`, and its weight `NAME_weight` in `RewardConfig`. Everything else goes by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_r1v2.config.schema import RewardConfig
from megatron_r1v2.rewards.claims import Claim, consistency_score
from megatron_r1v2.rewards.format import format_score
from megatron_r1v2.rewards.model import squash
from megatron_r1v2.rewards.reasoning import overlong_score
from megatron_r1v2.rewards.verifiers import Call, VerifierPool, answer_call, repetition_call, steps_call
from megatron_r1v2.types import Prompt, Rollout


@dataclass(frozen=True)
class Response:
    """What the parts of the reward are computed from."""

    prompt: Prompt
    rollout: Rollout
    text: str
    """Without its stop token."""
    claims: tuple[Claim, ...]
    max_response_tokens: int
    """Where responses are cut."""
    model_score: float | None
    """Raw score of the reward model; None where there is no model."""


Part = Callable[[Response, RewardConfig], float | Call | None]
"""Gives a score; or the call that computes it from hostile text in a verifier worker, where a hang or crash is a 0; or
None where the part does not apply to the prompt."""


def _answer(response: Response, settings: RewardConfig) -> Call:
    prompt = response.prompt
    if prompt.answer is None or prompt.answer_type is None:
        raise ValueError(f"prompt {prompt.key!r} has no answer to compare with; give it one, with answer_type")
    return answer_call(response.text, prompt.answer, prompt.answer_type, settings.numeric_tolerance)


def _format(response: Response, settings: RewardConfig) -> float:
    return format_score(response.text)


def _consistency(response: Response, settings: RewardConfig) -> float | None:
    return consistency_score(response.claims, response.prompt.facts) if response.prompt.facts else None


def _steps(response: Response, settings: RewardConfig) -> Call:
    return steps_call(response.text, wanted=settings.steps_wanted, conclusion=settings.steps_conclusion)


def _repetition(response: Response, settings: RewardConfig) -> Call:
    return repetition_call(response.rollout.token_ids, tokens=settings.repetition_tokens)


def _overlong(response: Response, settings: RewardConfig) -> float:
    return overlong_score(
        len(response.rollout.token_ids),
        response.rollout.finish_reason,
        longest=response.max_response_tokens,
        buffer=settings.overlong_buffer_tokens,
    )


def _model(response: Response, settings: RewardConfig) -> float | None:
    if response.model_score is None:
        return None
    return squash(response.model_score, centre=settings.model_centre, scale=settings.model_scale)


PARTS: Mapping[str, Part] = {
    "answer": _answer,
    "format": _format,
    "consistency": _consistency,
    "steps": _steps,
    "repetition": _repetition,
    "overlong": _overlong,
    "model": _model,
}
# What is effective depends on the answer, evaluations show the format, and scores of a model were paid for.
_WEIGHT_OR_NOT = ("answer", "format", "model")


def score_parts(
    responses: Sequence[Response], *, settings: RewardConfig, pool: VerifierPool
) -> tuple[list[dict[str, float]], list[bool]]:
    """Compute the parts that have a weight, and those that are wanted without one.

    Args:
        responses: what is known of each.
        settings: the `reward` section.
        pool: where the calls run; one that hangs or crashes gives 0.

    Returns:
        For each response its parts by name (one that does not apply is not there), and whether every check ended.
    """
    weights = settings.weights
    names = [name for name in PARTS if name in _WEIGHT_OR_NOT or weights[name] > 0]
    found = [(row, name, PARTS[name](response, settings)) for row, response in enumerate(responses) for name in names]
    results = iter(pool.run([value for _, _, value in found if isinstance(value, Call)], failed=None))
    rewards: list[dict[str, float]] = [{} for _ in responses]
    checked = [True] * len(responses)
    for row, name, value in found:
        if value is None:
            continue
        score = next(results) if isinstance(value, Call) else value
        checked[row] &= score is not None
        rewards[row][name] = float(score or 0.0)
    return rewards, checked


def weighted_total(rewards: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Return the sum of weight x part; the weight of parts that do not apply goes to the others in proportion.

    With W the sum of all weights, total = W x sum(weight x part) / sum(weight), both sums over the parts that apply:
    every prompt has the same range [0, W], so a prompt without facts is neither punished nor favoured beside one with
    facts. Within a group of responses to one prompt the same parts apply, and the factor is in none of GRPO's
    advantages, which divide by the group's standard deviation.

    Args:
        rewards: the parts that apply, by name.
        weights: of all parts, by name.
    """
    total = sum((weight * rewards[name] for name, weight in weights.items() if name in rewards), 0.0)
    if all(name in rewards for name, weight in weights.items() if weight > 0):
        return total
    applied = sum(weight for name, weight in weights.items() if name in rewards)
    return total * sum(weights.values()) / applied if applied > 0 else 0.0
