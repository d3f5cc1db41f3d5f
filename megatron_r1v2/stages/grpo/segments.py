"""Groups of responses that go on in the next step, so that no step waits for its longest response.

A response generates at most `generation.segment_tokens` tokens in a step. Who goes on depends on lengths alone: a run
is the same for every number of replicas, and after an interruption. A group stays with the replica that began it. Its
prompt is not drawn anew meanwhile, its responses keep the name (and so the draws) of the step in which they began, and
it is scored and trained when all of them have ended.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_r1v2.config.recipes import GrpoRecipe
from megatron_r1v2.data.samples import DataError
from megatron_r1v2.parallel import objects
from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.stages.grpo.selection import sample_id
from megatron_r1v2.training.batches import response_sample
from megatron_r1v2.training.replay import plain_prompt
from megatron_r1v2.types import Prompt, RLTargets, Rollout, Sample


@dataclass(frozen=True)
class Group:
    """The responses to a prompt of which some go on."""

    prompt: Prompt
    place: int
    """Number of the prompt in the step in which it began."""
    responses: tuple[Rollout, ...]

    @property
    def step(self) -> int:
        """Return the number of steps that were done when it began."""
        return self.responses[0].step

    @property
    def order(self) -> tuple[int, int]:
        """Return what groups are ordered by, whichever replica holds them."""
        return self.step, self.place


class GroupsInFlight:
    """The groups of this replica that go on, and the keys of those of all replicas.

    Args:
        max_age: groups that began more than so many steps ago are dropped, as the buffer's entries are.
        shards: the state of each data-parallel rank of the saved run; none in a run that starts.
    """

    def __init__(self, context: ParallelContext, *, max_age: int, shards: Sequence[Mapping[str, Any]] = ()) -> None:
        self.context = context
        self.max_age = max_age
        saved = [_restored(group) for shard in shards for group in shard.get("groups", ())]
        self.steps: dict[str, int] = {group.prompt.key: group.step for group in saved}
        """The step in which each group of any replica began, by prompt key."""
        if len(shards) == context.data_size:
            saved = [_restored(group) for group in shards[context.data_rank].get("groups", ())]
        else:
            saved = sorted(saved, key=lambda group: group.order)[context.data_rank :: context.data_size]
        self.groups: dict[str, Group] = {group.prompt.key: group for group in sorted(saved, key=lambda g: g.order)}

    @property
    def prompts(self) -> list[Prompt]:
        """Return the prompts of this replica's groups."""
        return [group.prompt for group in self.groups.values()]

    @property
    def responses(self) -> dict[str, tuple[Rollout, ...]]:
        """Return the responses of this replica's groups so far, by prompt key."""
        return {key: group.responses for key, group in self.groups.items()}

    def drop_old(self, step: int) -> int:
        """Drop the groups that are too old, of all replicas; return how many."""
        old = {key for key, began in self.steps.items() if step - began > self.max_age}
        self._drop(old)
        return len(old)

    def settle(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> tuple[list[Prompt], list[Rollout]]:
        """Collective over the data-parallel ranks: keep the groups that go on, and give out those that are complete.

        Args:
            prompts: those that began in this step, the same on every rank.
            rollouts: of this replica, of these prompts and of the groups that it held.

        Returns:
            The prompts of all complete groups, in the same order on every rank, and this replica's responses to them.
            A prompt of another replica's group has no more than one tile: enough to tell its modality.
        """
        known = {prompt.key: Group(prompt, place, ()) for place, prompt in enumerate(prompts)} | self.groups
        responses: dict[str, list[Rollout]] = {}
        for rollout in rollouts:
            responses.setdefault(rollout.prompt_key, []).append(rollout)
        current = [
            replace(known[key], responses=tuple(sorted(each, key=lambda rollout: rollout.sample_index)))
            for key, each in responses.items()
        ]
        going_on = {group.prompt.key: group for group in current if _goes_on(group)}
        complete = {group.prompt.key: group for group in current if not _goes_on(group)}
        told = (
            [(group.order, _light(group.prompt)) for group in complete.values()],
            {key: group.step for key, group in going_on.items()},
        )
        self.groups = dict(sorted(going_on.items(), key=lambda item: item[1].order))
        self.steps = {}
        everywhere: list[tuple[tuple[int, int], Prompt]] = []
        for finished, steps in objects.all_gather(told, self.context.groups.dp):
            everywhere += finished
            self.steps |= steps
        everywhere.sort(key=lambda item: item[0])
        ordered = [complete[prompt.key].prompt if prompt.key in complete else prompt for _, prompt in everywhere]
        return ordered, [
            rollout for prompt in ordered if prompt.key in complete for rollout in complete[prompt.key].responses
        ]

    def new_segments(self) -> tuple[dict[str, Sample], dict[str, Prompt]]:
        """Return, by id, the responses whose last segment has no old log-probs yet, and their prompts."""
        samples = {
            sample_id(rollout): _sample(group.prompt, rollout)
            for group in self.groups.values()
            for rollout in group.responses
            if len(rollout.old_log_probs) < len(rollout.token_ids)
        }
        return samples, {prompt.key: prompt for prompt in self.prompts}

    def add_old_log_probs(self, samples: Mapping[str, Sample] | None) -> int:
        """Add the old log-probs of samples to their responses; None, where some are not finite, drops all groups.

        Returns:
            The number of groups dropped, of all replicas.
        """
        if samples is None:
            dropped = len(self.steps)
            self._drop(set(self.steps))
            return dropped
        self.groups = {
            key: replace(group, responses=tuple(_with_log_probs(each, samples) for each in group.responses))
            for key, group in self.groups.items()
        }
        return 0

    def state_dict(self) -> dict[str, Any]:
        """Return this replica's groups as tensors, numbers, texts, and lists and dictionaries of them."""
        return {"groups": [_plain(group) for group in self.groups.values()]}

    def _drop(self, keys: set[str]) -> None:
        self.groups = {key: group for key, group in self.groups.items() if key not in keys}
        self.steps = {key: step for key, step in self.steps.items() if key not in keys}


def check_enough_prompts(num_prompts: int, recipe: GrpoRecipe) -> None:
    """Raise DataError where the prompts in flight may be all that there are."""
    generation, wanted = recipe.generation, recipe.train.prompts_per_step
    steps = math.ceil(generation.max_response_tokens / (generation.segment_tokens or generation.max_response_tokens))
    if num_prompts < steps * wanted:
        shares = " in the shares of its sets" if len(recipe.data.sources) > 1 else ""
        raise DataError(
            f"data.train has {num_prompts} prompts{shares}. With generation.segment_tokens="
            f"{generation.segment_tokens} and generation.max_response_tokens={generation.max_response_tokens} "
            f"those of {steps} steps can be in flight, {steps} x train.prompts_per_step={wanted}; "
            "raise the first, lower one of the others or give more data"
        )


def _goes_on(group: Group) -> bool:
    return any(rollout.finish_reason == "segment" for rollout in group.responses)


def _light(prompt: Prompt) -> Prompt:
    return replace(prompt, tiles_TCHW=prompt.tiles_TCHW[:1].clone(), images=())


def _sample(prompt: Prompt, rollout: Rollout) -> Sample:
    # Only log-probs are computed: what the loss would weigh them by is not known before the group is complete.
    targets = RLTargets(
        rollout_log_probs=rollout.rollout_log_probs,
        advantage=0.0,
        reward=0.0,
        policy_version=rollout.policy_version,
        group_effective=False,
        old_log_probs=rollout.old_log_probs,
    )
    return response_sample(prompt, rollout.token_ids, index=rollout.sample_index, rl=targets)


def _with_log_probs(rollout: Rollout, samples: Mapping[str, Sample]) -> Rollout:
    sample = samples.get(sample_id(rollout))
    if sample is None or sample.rl is None:
        return rollout
    return replace(rollout, old_log_probs=sample.rl.old_log_probs)


def _plain(group: Group) -> dict[str, Any]:
    # Unlike what is replayed, it is still to be scored: a served reward model wants the images.
    prompt = plain_prompt(group.prompt) | {"images": group.prompt.images}
    return {"prompt": prompt, "place": group.place, "responses": [vars(rollout) for rollout in group.responses]}


def _restored(saved: Mapping[str, Any]) -> Group:
    return Group(Prompt(**saved["prompt"]), saved["place"], tuple(Rollout(**fields) for fields in saved["responses"]))
