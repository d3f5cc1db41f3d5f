"""What the stages that train on given responses share: reading prompts, making samples, sharing them out, updating."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_r1v2.stages.session import Session, next_distinct
from megatron_r1v2.training.batches import response_sample
from megatron_r1v2.training.microbatches import Microbatch
from megatron_r1v2.training.optimizer import current_learning_rate
from megatron_r1v2.training.policy import LossFunction, UpdateResult
from megatron_r1v2.training.replay import assign
from megatron_r1v2.types import Prompt, Sample, TrainingBatch


def next_trainable(session: Session) -> list[Prompt]:
    """Read the prompts of a step, less those that nothing in training sees.

    Args:
        session: the running stage.

    Returns:
        Prompts with distinct keys.
    """
    if session.policy.features is not None:
        session.policy.features.clear()
    prompts = next_distinct(session.stream, session.recipe.train.prompts_per_step)
    trainable = [prompt for prompt in prompts if session.trains(prompt)]
    session.recorder.note({"data/text_only_left_out": len(prompts) - len(trainable)})
    return trainable


def given_sample(session: Session, prompt: Prompt, response: str, *, index: int = 0) -> Sample:
    """Turn a prompt and a response to it into a sample.

    Args:
        session: gives tokenizer and end token.
        prompt: the prompt.
        response: as text, without the end-of-turn token.
        index: which of the responses to the prompt this is.
    """
    end = session.recipe.generation.stop_tokens[0]
    return response_sample(prompt, session.tokenizer.encode_response(response, end, key=prompt.key), index=index)


def shard_samples(
    session: Session,
    samples: Mapping[str, Sample],
    prompts: Sequence[Prompt],
    units: Mapping[str, Sequence[str]] | None = None,
) -> list[Microbatch]:
    """Make the microbatches of this data-parallel rank.

    Args:
        session: the running stage.
        samples: of all ranks, by id.
        prompts: theirs.
        units: ids of samples that stay together, by the name of the unit; None: each by itself.
    """
    units = units or {name: (name,) for name in samples}
    lengths = {unit: sum(len(samples[name].token_ids) for name in names) for unit, names in units.items()}
    owner = assign(lengths, session.context.data_size)
    mine = {unit: names for unit, names in units.items() if owner[unit] == session.context.data_rank}
    return session.microbatcher.split(
        {name: samples[name] for names in mine.values() for name in names},
        {prompt.key: prompt for prompt in prompts},
        units=mine,
    )


def update(session: Session, batches: Sequence[TrainingBatch], loss: LossFunction) -> UpdateResult:
    """Collective over the world: take one optimizer step and note its metrics.

    Args:
        session: the running stage.
        batches: of this rank; at least one.
        loss: of a microbatch.
    """
    session.recorder.note({"actor/lr": current_learning_rate(session.policy.optimizer)})
    with session.recorder.timed("update"):
        result = session.policy.update(batches, loss)
    session.recorder.note({**result.logged(), "actor/skipped_updates": float(not result.applied)})
    return result
