"""The filtered prompt pool: the Selective Sample Buffer run over rollouts that were generated beforehand."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PoolPrompt:
    """A prompt that has both right and wrong responses."""

    prompt_key: str
    pass_rate: float
    """Right responses over all responses to it."""
    num_responses: int
    weight: float
    """In (0, 1], the buffer's priority of this prompt's responses, see `filtered_prompt_pool`."""


def filtered_prompt_pool(
    prompt_keys: Sequence[str], rule_correct: Sequence[bool], priority_exponent: float = 1.0
) -> list[PoolPrompt]:
    """Return the prompts whose offline rollouts are not uniform in rule correctness, the most informative first.

    The R1V2 report (arXiv 2504.16656, section on the SSB) runs the buffer over offline rollouts and trains on the
    prompts that survive; it gives no order. Ours follows the buffer's own priority: the mean |advantage| of a group of
    0/1 rewards with pass rate p is 2 sqrt(p (1 - p)), largest at p = 1/2. The weight is that to the power alpha.

    Args:
        prompt_keys: prompt of each rollout; the rollouts of one prompt need not be neighbours.
        priority_exponent: alpha; 0 weighs all effective prompts alike.

    Returns:
        The effective prompts by falling weight, then by key, so that the order of the rollouts does not matter.

    Raises:
        ValueError: When the two sequences are not equally long.
    """
    if len(prompt_keys) != len(rule_correct):
        raise ValueError(f"got {len(prompt_keys)} prompt keys but {len(rule_correct)} results: one of each per rollout")
    groups: dict[str, list[bool]] = defaultdict(list)
    for key, correct in zip(prompt_keys, rule_correct, strict=True):
        groups[key].append(bool(correct))
    pool = []
    for key, results in groups.items():
        pass_rate = sum(results) / len(results)
        # A group that is all right or all wrong has no advantage, whatever the policy learns meanwhile.
        if 0.0 < pass_rate < 1.0:
            weight = (2.0 * math.sqrt(pass_rate * (1.0 - pass_rate))) ** priority_exponent
            pool.append(PoolPrompt(key, pass_rate, len(results), weight))
    return sorted(pool, key=lambda prompt: (-prompt.weight, prompt.prompt_key))
