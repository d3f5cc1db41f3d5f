"""The parts of the reward, each in [0, 1], and their weighted sum.

To add a part: a row in `PARTS`, and its weight `NAME_weight` in `RewardConfig`. Everything else goes by name. The
functions of `reward.functions` are parts too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_r1v2.config.schema import RewardConfig
from megatron_r1v2.rewards.claims import Claim, consistency_score
from megatron_r1v2.rewards.format import format_score
from megatron_r1v2.rewards.functions import score_by_functions
from megatron_r1v2.rewards.model import squash
from megatron_r1v2.rewards.reasoning import overlong_score
from megatron_r1v2.rewards.verifiers import Call, VerifierPool, answer_calls, repetition_call, steps_call
from megatron_r1v2.types import Prompt, Rollout

WANTED_STEPS = 3
"""Distinct steps (lines, sentences, clauses) of a complete reasoning; fewer get their share."""
CONCLUSION_STEPS = 2
"""The boxed answer must stand in one of the last so many steps."""
REPEATED_TOKENS = 8
"""So many tokens in a row that occurred before are a repetition."""
OVERLONG_SHARE = 1 / 8
"""The overlong part falls from 1 to 0 over this last part of the longest response."""


@dataclass(frozen=True)
class Response:
    """The inputs of the parts of the reward."""

    prompt: Prompt
    rollout: Rollout
    text: str
    """Without its stop token."""
    claims: tuple[Claim, ...]
    max_response_tokens: int
    """The length at which responses are cut."""
    model_score: float | None
    """Raw score of the reward model; None where there is no model."""


Calls = Sequence[Call[bool]] | Sequence[Call[float]]
Part = Callable[[Response, RewardConfig], float | Calls | None]
"""Return a score; or the calls that compute it from hostile text in the verifier workers, of which the best counts and
a hang or crash is a 0; or None where the part does not apply to the prompt."""


def _answer(response: Response, settings: RewardConfig) -> Calls | None:
    prompt = response.prompt
    if not prompt.answer or prompt.answer_type is None:
        if settings.functions or response.model_score is not None:
            return None
        raise ValueError(
            f"prompt {prompt.key!r} has no answer to compare with; give it one, with answer_type, or reward.functions "
            "that judge without"
        )
    return answer_calls(
        response.text, prompt.answer, prompt.answer_type, alternatives=prompt.alternatives, tolerances=prompt.tolerances
    )


def _format(response: Response, settings: RewardConfig) -> float:  # noqa: ARG001
    return format_score(response.text)


def _consistency(response: Response, settings: RewardConfig) -> float | None:  # noqa: ARG001
    return consistency_score(response.claims, response.prompt.facts) if response.prompt.facts else None


def _steps(response: Response, settings: RewardConfig) -> Calls:  # noqa: ARG001
    return [steps_call(response.text, wanted=WANTED_STEPS, conclusion=CONCLUSION_STEPS)]


def _repetition(response: Response, settings: RewardConfig) -> Calls:  # noqa: ARG001
    return [repetition_call(response.rollout.token_ids, tokens=REPEATED_TOKENS)]


def _overlong(response: Response, settings: RewardConfig) -> float:  # noqa: ARG001
    return overlong_score(
        len(response.rollout.token_ids),
        response.rollout.finish_reason,
        longest=response.max_response_tokens,
        buffer=int(response.max_response_tokens * OVERLONG_SHARE),
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
# Computed at weight 0 too: the answer decides which groups are effective, evaluations show the format, and the model's
# scores have been paid for already.
_ALWAYS_COMPUTED = ("answer", "format", "model")


def score_parts(
    responses: Sequence[Response], *, settings: RewardConfig, pool: VerifierPool
) -> tuple[list[dict[str, float]], list[bool]]:
    """Compute the parts of each response that have a weight, and those that are always computed.

    Args:
        pool: the workers that run the calls; one that hangs or crashes gives 0.

    Returns:
        For each response its parts by name, without those that do not apply, and whether every check of it ended.
    """
    weights = settings.weights
    names = [name for name in PARTS if name in _ALWAYS_COMPUTED or weights[name] > 0]
    parts = [(row, name, PARTS[name](response, settings)) for row, response in enumerate(responses) for name in names]
    # All calls in one run, so that no worker idles while a part of another kind is being checked.
    calls: list[Call[float]] = [call for _, _, value in parts if isinstance(value, Sequence) for call in value]
    results = iter(pool.run(calls, failed=None))
    rewards: list[dict[str, float]] = [{} for _ in responses]
    checked = [True] * len(responses)
    for row, name, value in parts:
        if value is None:
            continue
        scores = [next(results) for _ in value] if isinstance(value, Sequence) else [value]
        best = max(float(score or 0.0) for score in scores)
        # A check that did not end leaves no doubt where another one found the response right.
        checked[row] &= best == 1.0 or None not in scores
        rewards[row][name] = best
    if settings.functions:
        prompts, texts = [response.prompt for response in responses], [response.text for response in responses]
        own_rewards, ended = score_by_functions(settings.functions, prompts, texts, pool)
        rewards = [ours | own for ours, own in zip(rewards, own_rewards, strict=True)]
        checked = [ours and own for ours, own in zip(checked, ended, strict=True)]
    return rewards, checked


def weighted_total(rewards: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Return the sum of weight x part; the weight of parts that do not apply goes to the others in proportion.

    With W the sum of all weights, total = W x sum(weight x part) / sum(weight), both sums over the parts that apply:
    every prompt has the same range [0, W], so a prompt without facts is neither punished nor favoured beside one with
    facts. Within a group of responses to one prompt the same parts apply, and GRPO's advantages, which divide by the
    group's standard deviation, do not see the factor.

    Args:
        rewards: the parts that apply, by name.
        weights: of all parts, by name.
    """
    # Without the factor where all parts apply: multiplying and dividing by W would change the last bit.
    total = sum((weight * rewards[name] for name, weight in weights.items() if name in rewards), 0.0)
    if all(name in rewards for name, weight in weights.items() if weight > 0):
        return total
    applied = sum(weight for name, weight in weights.items() if name in rewards)
    return total * sum(weights.values()) / applied if applied > 0 else 0.0
