"""Prompts, rollouts and samples without a model: numbers that depend on nothing but names and steps."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from megatron_r1v2.types import Prompt, RLTargets, Rollout, Sample, ScoredRollout

IMAGE_TOKEN = 90
GROUP = 4


def make_prompt(key: str, *, tiles: int, tokens_per_tile: int = 2) -> Prompt:
    """Return a prompt whose tokens and tiles are its own."""
    draw = random.Random(key)
    words = [draw.randrange(80) for _ in range(draw.randint(3, 9))]
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    return Prompt(
        key=key,
        messages=({"role": "user", "content": "<image>" * bool(tiles) + key},),
        token_ids=(*words[:2], *[IMAGE_TOKEN] * (tiles * tokens_per_tile), *words[2:]),
        tiles_TCHW=torch.randint(0, 256, (tiles, 3, 4, 4), generator=generator, dtype=torch.uint8),
        answer="8",
        answer_type="numeric",
        facts={"left": "3"} if tiles else {},
    )


def make_sample(prompt: Prompt, index: int = 0, *, length: int = 5, old: bool = True) -> Sample:
    """Return a sample of a prompt, log-probs that say which token they belong to."""
    draw = random.Random(f"{prompt.key}/{index}")
    return Sample(
        prompt_key=prompt.key,
        sample_index=index,
        token_ids=(*prompt.token_ids, *(draw.randrange(100) for _ in range(length))),
        prompt_length=len(prompt.token_ids),
        modality=prompt.modality,
        rl=RLTargets(
            old_log_probs=tuple(-1.0 - position for position in range(length)) if old else (),
            rollout_log_probs=tuple(-1.5 - position for position in range(length)),
            advantage=draw.uniform(-2, 2),
            reward=draw.random(),
            policy_version=3,
            group_effective=True,
        ),
    )


def step_prompts(step: int, count: int = 6) -> list[Prompt]:
    """Return the prompts of a step, every third one without image."""
    return [make_prompt(f"p{step}-{index}", tiles=(index + 1) % 3) for index in range(count)]


def step_responses(prompts: Sequence[Prompt], step: int) -> list[ScoredRollout]:
    """Return GROUP responses to each prompt: some groups all right, some all wrong, some mixed."""
    responses = []
    for prompt in prompts:
        draw = random.Random(f"{prompt.key}@{step}")
        kind = draw.choice(("right", "wrong", "mixed", "mixed"))
        for index in range(GROUP):
            correct = {"right": True, "wrong": False, "mixed": index % 2 == 0}[kind]
            rollout = Rollout(
                prompt_key=prompt.key,
                sample_index=index,
                token_ids=(token_ids := tuple(draw.randrange(100) for _ in range(draw.randint(1, 9)))),
                rollout_log_probs=tuple(-draw.random() for _ in token_ids),
                policy_version=step,
                finish_reason="length" if len(token_ids) == 9 else "stop",
                step=step,
            )
            rewards = {"answer": float(correct), "format": float(draw.random() < 0.8)}
            total = rewards["answer"] + 0.2 * rewards["format"]
            responses.append(ScoredRollout(rollout, "text", rewards, total, rule_correct=correct))
    return responses


def same_prompt(one: Prompt, other: Prompt) -> bool:
    """Compare prompts with their tiles, which `==` cannot."""
    fields = vars(one) | {"tiles_TCHW": None}, vars(other) | {"tiles_TCHW": None}
    return fields[0] == fields[1] and torch.equal(one.tiles_TCHW, other.tiles_TCHW)
