"""The interface of reward models, and the squash of their raw scores into [0, 1] beside the rules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from megatron_r1v2.types import Prompt


class RewardModel(Protocol):
    """A source of raw scores: any finite number for each response to a prompt, higher is better."""

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        """Score responses. Collective over the model replica, with the same arguments on every rank.

        A model on all ranks of the replica computes on all of them. A client of a served model asks on the leader and
        broadcasts the scores. Either way all ranks return the same scores, or all raise: a missing score is an error,
        never a 0.

        Args:
            prompts: the prompt of each response, with its image tiles.
            texts: the responses, special tokens included, the stop token left out; at least one.

        Raises:
            RuntimeError: the model gives no scores, even after its retries.
        """
        ...


def check_scores(scores: Sequence[float], count: int) -> None:
    """Raise RuntimeError unless a reward model gave `count` responses one finite score each."""
    if len(scores) != count:
        raise RuntimeError(f"the reward model gave {len(scores)} scores for {count} responses; look at its log")
    wrong = [index for index, score in enumerate(scores) if not math.isfinite(score)]
    if wrong:
        raise RuntimeError(
            f"the reward model gave {len(wrong)} of {count} responses no finite score (response {wrong[0]}: "
            f"{scores[wrong[0]]}); look at its log, and at its precision: fp16 overflows"
        )


def squash(score: float, *, centre: float, scale: float) -> float:
    """Return the logistic 1 / (1 + exp(-(score - centre) / scale)), in [0, 1]."""
    # The same function by way of tanh, which does not overflow.
    return 0.5 * (1.0 + math.tanh(0.5 * (score - centre) / scale))
