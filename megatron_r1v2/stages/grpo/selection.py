"""The selection of a step's samples: advantages over all replicas, the buffer's draw, and the rank that trains each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from megatron_r1v2.config.choices import EffectiveBy, LossAggregation
from megatron_r1v2.config.recipes import GrpoRecipe
from megatron_r1v2.config.schema import RewardConfig
from megatron_r1v2.data.samples import DataError
from megatron_r1v2.parallel import objects
from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.rewards.score import shuffle_rewards
from megatron_r1v2.rl.advantages import ADVANTAGE_EPSILON, REWARD_TOLERANCE, effective_mask, group_advantages
from megatron_r1v2.rl.sample_buffer import BatchPlan, BufferEntry, SampleBuffer, compose_batch
from megatron_r1v2.training.batches import response_sample
from megatron_r1v2.training.replay import assign
from megatron_r1v2.types import Prompt, RLTargets, Rollout, Sample, ScoredRollout


@dataclass(frozen=True)
class SampleRecord:
    """A response without its tokens, which stay on the rank that generated them."""

    sample_id: str
    advantage: float
    reward: float
    correct: bool
    entry: BufferEntry


@dataclass(frozen=True)
class Selection:
    """The samples that a step trains on; the same on every rank."""

    records: Mapping[str, SampleRecord]
    """All responses of the step by sample id."""
    plan: BatchPlan
    updates: tuple[tuple[str, ...], ...]
    """Sample ids of each optimizer step."""
    trainer: Mapping[str, int]
    """Data-parallel rank that trains each sample; the samples of one prompt in an update have the same."""
    denominator: float
    """Of the loss of one optimizer step: sequences or response tokens, samples of zero advantage included."""
    metrics: Mapping[str, float]

    @property
    def fresh_entries(self) -> list[BufferEntry]:
        """Return the entries of this step that the buffer may keep."""
        return [self.records[sample_id].entry for sample_id in self.plan.fresh]


def sample_id(rollout: Rollout) -> str:
    """Name a response by the step in which it began: unique over the run, since prompts of one step are distinct."""
    return f"{rollout.prompt_key}/{rollout.step}/{rollout.sample_index}"


def select(
    recipe: GrpoRecipe,
    buffer: SampleBuffer | None,
    prompts: Sequence[Prompt],
    scored: Sequence[ScoredRollout],
    *,
    step: int,
    trains_text: bool,
    context: ParallelContext,
) -> Selection:
    """Collective over the data-parallel ranks: decide what the step trains on, from what every replica generated.

    Args:
        buffer: drawn from; None: no replay.
        prompts: of the step, the same on every rank.
        scored: this replica's responses.
        step: steps done before this one.
        trains_text: whether a text-only prompt has a gradient; if not, its responses are left out and counted.

    Returns:
        The selection, the same on every rank and for every number of data-parallel ranks.
    """
    everything = _gather_responses(prompts, scored, context)
    if recipe.reward.shuffle:
        rewarded = shuffle_rewards([response for response, _ in everything], seed=recipe.run.seed + step)
        everything = [(response, length) for response, (_, length) in zip(rewarded, everything, strict=True)]
    records = _make_records(everything, prompts, recipe)
    trainable = [item.entry for item in records.values() if trains_text or item.entry.modality == "image"]
    # Dynamic sampling may have found more effective groups than the step trains on.
    eligible = trainable
    if recipe.algorithm.dynamic_sampling_rounds > 1:
        eligible = first_effective_groups(trainable, recipe.train.prompts_per_step)
    plan = compose_batch(
        eligible,
        buffer,
        step=step,
        seed=recipe.run.seed,
        batch_size=len(eligible),
        target_effective_fraction=recipe.buffer.target_effective_fraction,
    )
    # A KL term pulls at every response, so with one those without advantage need compute too.
    computed = plan.compute + (plan.fresh_zero_advantage if recipe.algorithm.kl_coefficient > 0 else ())
    entries = {name: records[name].entry for name in computed if name in records}
    if buffer is not None:
        entries |= {name: buffer.entry(name) for name in plan.replayed}
    updates = _split_updates([entries[name] for name in computed], recipe.train.updates_per_step)
    # Each update by itself, so that every rank has about the same work in every one of them.
    trainer: dict[str, int] = {}
    for update in updates:
        trainer |= _assign_prompts([entries[name] for name in update], context.data_size)
    by_tokens = recipe.loss.aggregation is LossAggregation.token
    total = plan.num_tokens if by_tokens else plan.num_sequences
    return Selection(
        records=records,
        plan=plan,
        updates=updates,
        trainer=trainer,
        denominator=total / max(1, len(updates)),
        metrics={
            **plan.metrics,
            **_response_metrics(everything, records),
            **_effective_by_data_set(prompts, records),
            "data/text_only_left_out": len(records) - len(trainable),
            "rollout/responses_filtered": len(trainable) - len(eligible),
        },
    )


def telling_responses(records: Sequence[SampleRecord], count: int) -> list[int]:
    """Choose responses to show: of each prompt a right and a wrong one, the largest advantages first.

    Args:
        records: of one replica's responses.

    Returns:
        At most `count` places in `records`.
    """
    largest: dict[str, float] = {}
    for record in records:
        key = record.entry.prompt_key
        largest[key] = max(largest.get(key, 0.0), abs(record.advantage))
    seen: Counter[tuple[str, bool]] = Counter()
    order = []
    for place in sorted(range(len(records)), key=lambda place: -abs(records[place].advantage)):
        key, correct = records[place].entry.prompt_key, records[place].correct
        order.append((seen[key, correct], -largest[key], key, place))
        seen[key, correct] += 1
    # Stable: within a prompt the larger advantage stays in front.
    return [place for *_, place in sorted(order, key=lambda item: item[:3])[:count]]


def check_answers(unanswered: Sequence[str], reward: RewardConfig, effective_by: EffectiveBy) -> None:
    """Raise DataError where answers decide what a prompt can teach, and some have none.

    Args:
        unanswered: the keys of prompts without an answer.
    """
    if not unanswered:
        return
    those = f"prompt {unanswered[0]!r} has no answer"
    others = f" ({len(unanswered)} prompts have none)" if len(unanswered) > 1 else ""
    if effective_by is EffectiveBy.answer:
        raise DataError(
            f"{those}, and buffer.effective_by=answer compares answers to find the groups "
            f"that can teach something; set buffer.effective_by=reward{others}"
        )
    if not any(function.weight for function in reward.functions) and not reward.model_weight:
        functions = "no function of reward.functions has weight" if reward.functions else "reward.functions is empty"
        raise DataError(
            f"{those}, and nothing judges its responses: {functions} and reward.model_weight is 0; give "
            f"it an answer, with answer_type, or set one of them{others}"
        )


def effective_responses(scored: Sequence[ScoredRollout], effective_by: EffectiveBy, group_size: int) -> list[bool]:
    """Return for each response whether something can be learned from its group: its answers or rewards differ.

    Args:
        scored: whole groups; the responses to one prompt are neighbours.
    """
    if effective_by is EffectiveBy.reward:
        rewards_R = torch.tensor([response.total for response in scored], dtype=torch.float64)
        effective_R = effective_mask(rewards_R, group_size, REWARD_TOLERANCE)
    else:
        effective_R = effective_mask(torch.tensor([response.rule_correct for response in scored]), group_size)
    effective: list[bool] = effective_R.tolist()
    return effective


def count_effective_groups(
    scored: Sequence[ScoredRollout],
    prompts: Sequence[Prompt],
    *,
    effective_by: EffectiveBy,
    group_size: int,
    trains_text: bool,
) -> int:
    """Count the prompts of this replica that something can be learned from.

    Args:
        scored: this replica's responses, as `effective_responses` takes them.
        trains_text: whether a text-only prompt has a gradient; if not, it counts for nothing.
    """
    effective = effective_responses(scored, effective_by, group_size)
    keys = {response.rollout.prompt_key for response, counts in zip(scored, effective, strict=True) if counts}
    return sum(prompt.key in keys for prompt in prompts if trains_text or prompt.modality == "image")


def first_effective_groups(entries: Sequence[BufferEntry], count: int) -> list[BufferEntry]:
    """Return the responses of the first `count` effective groups: what dynamic sampling trains on.

    Args:
        entries: responses in the order of their prompts.
    """
    keys = dict.fromkeys(entry.prompt_key for entry in entries if entry.effective)
    kept = set(list(keys)[:count])
    return [entry for entry in entries if entry.prompt_key in kept]


def fresh_samples(
    selection: Selection, scored: Sequence[ScoredRollout], prompts: Sequence[Prompt]
) -> dict[str, Sample]:
    """Make samples, by id, of this replica's responses that are trained somewhere, yet without old log-probs."""
    by_key = {prompt.key: prompt for prompt in prompts}
    samples = {}
    for response in scored:
        name = sample_id(response.rollout)
        if name in selection.trainer:
            samples[name] = fresh_sample(response, by_key[response.rollout.prompt_key], selection.records[name])
    return samples


def fresh_sample(response: ScoredRollout, prompt: Prompt, record: SampleRecord) -> Sample:
    """Put a fresh response into the form that is trained."""
    rollout = response.rollout
    targets = RLTargets(
        rollout_log_probs=rollout.rollout_log_probs,
        old_log_probs=rollout.old_log_probs,
        advantage=record.advantage,
        reward=record.reward,
        policy_version=rollout.policy_version,
        group_effective=record.entry.effective,
    )
    return response_sample(prompt, rollout.token_ids, index=rollout.sample_index, rl=targets)


def _gather_responses(
    prompts: Sequence[Prompt], scored: Sequence[ScoredRollout], context: ParallelContext
) -> list[tuple[ScoredRollout, int]]:
    """Collective over the data-parallel ranks: gather all responses with their lengths, in the order of the prompts.

    Without their tokens: those stay where they are until it is known who trains them.
    """
    light = [
        (
            replace(
                response,
                rollout=replace(response.rollout, token_ids=(), rollout_log_probs=(), old_log_probs=()),
                text="",
            ),
            len(response.rollout.token_ids),
        )
        for response in scored
    ]
    order = {prompt.key: index for index, prompt in enumerate(prompts)}
    everything = [item for part in objects.all_gather(light, context.groups.dp) for item in part]
    # Which replica generated what is a matter of time; from here on nothing may depend on it.
    everything.sort(key=lambda item: (order[item[0].rollout.prompt_key], item[0].rollout.sample_index))
    return everything


def _make_records(
    everything: Sequence[tuple[ScoredRollout, int]],
    prompts: Sequence[Prompt],
    recipe: GrpoRecipe,
) -> dict[str, SampleRecord]:
    # In float64, as the rewards are: the buffer draws by these advantages.
    rewards_R = torch.tensor([response.total for response, _ in everything], dtype=torch.float64)
    group_size = recipe.generation.responses_per_prompt
    advantages = group_advantages(rewards_R, group_size, ADVANTAGE_EPSILON).tolist()
    effective = effective_responses([response for response, _ in everything], recipe.buffer.effective_by, group_size)
    by_key = {prompt.key: prompt for prompt in prompts}
    records = {}
    for (response, length), advantage, is_effective in zip(everything, advantages, effective, strict=True):
        name = sample_id(response.rollout)
        entry = BufferEntry(
            sample_id=name,
            prompt_key=response.rollout.prompt_key,
            priority=abs(advantage),
            modality=by_key[response.rollout.prompt_key].modality,
            step=response.rollout.step,
            response_length=length,
            effective=is_effective,
            prompt_length=len(by_key[response.rollout.prompt_key].token_ids),
        )
        records[name] = SampleRecord(name, advantage, response.total, response.rule_correct, entry)
    return records


def _split_updates(entries: Sequence[BufferEntry], updates_per_step: int) -> tuple[tuple[str, ...], ...]:
    """Deal prompts, each with its responses, to optimizer steps like cards; with few prompts there are fewer steps."""
    groups = list(_group_by_prompt(entries).values())
    dealt = (groups[start::updates_per_step] for start in range(updates_per_step))
    return tuple(tuple(entry.sample_id for group in part for entry in group) for part in dealt if part)


def _assign_prompts(entries: Sequence[BufferEntry], data_size: int) -> dict[str, int]:
    """Decide which data-parallel rank trains which sample: those of one prompt together, which share its tokens."""
    groups = _group_by_prompt(entries)
    tokens = {
        key: group[0].prompt_length + sum(entry.response_length for entry in group) for key, group in groups.items()
    }
    owner = assign(tokens, data_size)
    return {entry.sample_id: owner[entry.prompt_key] for entry in entries}


def _group_by_prompt(entries: Sequence[BufferEntry]) -> dict[str, list[BufferEntry]]:
    groups: dict[str, list[BufferEntry]] = {}
    for entry in entries:
        groups.setdefault(entry.prompt_key, []).append(entry)
    return groups


def _effective_by_data_set(prompts: Sequence[Prompt], records: Mapping[str, SampleRecord]) -> dict[str, float]:
    """Return the part of the responses to each data set's prompts that is effective; empty where there is one set."""
    data_set = {prompt.key: prompt.data_set for prompt in prompts if prompt.data_set}
    by_set: dict[str, list[bool]] = {}
    for record in records.values():
        if name := data_set.get(record.entry.prompt_key):
            by_set.setdefault(name, []).append(record.entry.effective)
    return {f"data/effective_fraction/{name}": sum(found) / len(found) for name, found in sorted(by_set.items())}


def _response_metrics(
    everything: Sequence[tuple[ScoredRollout, int]], records: Mapping[str, SampleRecord]
) -> dict[str, float]:
    """Describe all that was generated, text-only prompts that are left out included."""
    lengths = [length for _, length in everything]
    if not lengths:  # all groups go on in the next step
        return {"rollout/responses": 0, "rollout/tokens": 0}
    cut = sum(response.rollout.finish_reason == "length" for response, _ in everything)
    effective = sum(record.entry.effective for record in records.values())
    return {
        "ssb/fresh_effective_fraction": effective / len(records),
        "rollout/responses": len(records),
        "rollout/tokens": sum(lengths),
        "response_length/mean": sum(lengths) / len(lengths),
        "response_length/max": max(lengths),
        "response_length/clip_ratio": cut / len(lengths),
    }
