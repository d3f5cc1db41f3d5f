"""Given responses as samples, for the stages that do not sample their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_r1v2.data.samples import DataError
from megatron_r1v2.data.tokenizer import ChatTokenizer
from megatron_r1v2.monitoring.recorder import Recorder
from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.training.batches import response_sample
from megatron_r1v2.training.microbatches import Microbatch, Microbatcher
from megatron_r1v2.training.optimizer import current_learning_rate
from megatron_r1v2.training.policy import LossFunction, Policy, UpdateResult
from megatron_r1v2.training.replay import assign
from megatron_r1v2.types import Preference, Prompt, Sample, TrainingBatch

SIDES = ("chosen", "rejected")
Units = dict[str, tuple[str, ...]]
"""The ids of the samples of each pair, the chosen response first, by the key of the prompt."""


@dataclass(frozen=True)
class ResponseEncoder:
    """An encoder of responses that are given as text."""

    tokenizer: ChatTokenizer
    end: str
    """The end-of-turn token, which the texts do not have."""

    def sample(self, prompt: Prompt, response: str, *, index: int = 0) -> Sample:
        """Return a prompt and a response to it as a sample."""
        token_ids = self.tokenizer.encode_response(response, self.end, key=prompt.key)
        return response_sample(prompt, token_ids, index=index)


@dataclass(frozen=True)
class PairSource:
    """The origin of pairs and the stage that needs them, for the error when one is missing."""

    stage: str
    setting: str
    """Such as "data.train='/data/pairs'"."""

    def preference_of(self, prompt: Prompt) -> Preference:
        """Return a prompt's pair.

        Raises:
            DataError: it has none.
        """
        if prompt.preference is None:
            raise DataError(
                f"sample {prompt.key!r} of {self.setting} has no pair of responses; the {self.stage} stage trains on "
                'pairs: add "chosen" and "rejected" to the JSONL rows and run r1v2 prepare again'
            )
        return prompt.preference


def sample_name(key: str, side: str) -> str:
    """Return the id of a sample of a pair."""
    return f"{key}/{side}"


def pair_samples(
    prompts: Sequence[Prompt], source: PairSource, encoder: ResponseEncoder, *, sides: Sequence[str] = SIDES
) -> tuple[dict[str, Sample], Units]:
    """Turn pairs into samples.

    Returns:
        Samples by id, and the pairs.

    Raises:
        ValueError: a prompt has no pair.
    """
    samples: dict[str, Sample] = {}
    units: Units = {}
    for prompt in prompts:
        preference = source.preference_of(prompt)
        for side in sides:
            text = preference.chosen if side == "chosen" else preference.rejected
            samples[sample_name(prompt.key, side)] = encoder.sample(prompt, text, index=SIDES.index(side))
        units[prompt.key] = tuple(sample_name(prompt.key, side) for side in sides)
    return samples, units


def shard_samples(
    samples: Mapping[str, Sample],
    prompts: Sequence[Prompt],
    units: Mapping[str, Sequence[str]] | None = None,
    *,
    microbatcher: Microbatcher,
    context: ParallelContext,
) -> list[Microbatch]:
    """Make the microbatches of this data-parallel rank.

    Args:
        samples: of all ranks, by id.
        units: ids of samples that stay together, by the name of the unit; None: each by itself.
    """
    units = units or {name: (name,) for name in samples}
    # By the tokens of whole units, whose rows are trained on one rank and share their prompt.
    lengths = {
        unit: samples[names[0]].prompt_length + sum(samples[name].response_length for name in names)
        for unit, names in units.items()
    }
    owner = assign(lengths, context.data_size)
    mine = {unit: names for unit, names in units.items() if owner[unit] == context.data_rank}
    return microbatcher.split(
        {name: samples[name] for names in mine.values() for name in names},
        {prompt.key: prompt for prompt in prompts},
        units=mine,
    )


def take_update(
    policy: Policy, batches: Sequence[TrainingBatch], loss: LossFunction, *, recorder: Recorder
) -> UpdateResult:
    """Collective over the world: take one optimizer step and note its metrics.

    Args:
        batches: of this rank; at least one.
    """
    # Before the step: afterwards the optimizer has the rate of the next one.
    recorder.note({"actor/lr": current_learning_rate(policy.optimizer)})
    # A rank without a sample has a row of weight zero.
    recorder.note(policy.count_tokens("update", [batch for batch in batches if batch.weights_B.any()]))
    with recorder.timed("update"):
        result = policy.update(batches, loss)
    recorder.note({**result.logged(), "actor/skipped_updates": float(not result.applied)})
    return result
