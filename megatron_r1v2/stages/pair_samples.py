"""Pairs of a chosen and a rejected response as samples."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_r1v2.stages.session import Session
from megatron_r1v2.stages.supervised_data import given_sample
from megatron_r1v2.types import Preference, Prompt, Sample

SIDES = ("chosen", "rejected")


def sample_name(key: str, side: str) -> str:
    """Return the id of a sample of a pair."""
    return f"{key}/{side}"


def pair_samples(
    session: Session, prompts: Sequence[Prompt], *, sides: Sequence[str] = SIDES
) -> tuple[dict[str, Sample], dict[str, tuple[str, ...]]]:
    """Turn pairs into samples.

    Args:
        session: gives tokenizer and end token.
        prompts: from a preference data set.
        sides: which of the two are wanted.

    Returns:
        Samples by id, and the ids of each pair by the prompt's key.

    Raises:
        ValueError: a prompt has no pair.
    """
    samples, units = {}, {}
    for prompt in prompts:
        preference = preference_of(session, prompt)
        for side in sides:
            text = preference.chosen if side == "chosen" else preference.rejected
            samples[sample_name(prompt.key, side)] = given_sample(session, prompt, text, index=SIDES.index(side))
        units[prompt.key] = tuple(sample_name(prompt.key, side) for side in sides)
    return samples, units


def preference_of(session: Session, prompt: Prompt) -> Preference:
    """Return a prompt's pair.

    Raises:
        ValueError: it has none.
    """
    if prompt.preference is None:
        raise ValueError(
            f"sample {prompt.key!r} of data.train={session.recipe.data.train!r} has no pair of responses; the mpo "
            'stage trains on pairs: add "chosen" and "rejected" to the JSONL rows and run data.prepare again'
        )
    return prompt.preference
