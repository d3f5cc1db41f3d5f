"""The align stage: supervised training on reference responses, usually of the adapter alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from megatron_r1v2.config.schema import RunRecipe
from megatron_r1v2.rl.supervised import supervised_loss
from megatron_r1v2.training.optimizer import current_learning_rate
from megatron_r1v2.training.replay import assign
from megatron_r1v2.training.session import Session, next_distinct, open_session
from megatron_r1v2.training.validation import Validation
from megatron_r1v2.types import Prompt, TrainingBatch, TrainingSample

SHOWN = ("actor/nll", "actor/grad_norm", "validation/pass_at_1")


def run_align(recipe: RunRecipe) -> Path:
    """Run the stage until its last step or until validation Pass@1 is high enough.

    Args:
        recipe: the settings.

    Returns:
        The run's folder.
    """
    with open_session(recipe, stage="align", shown=SHOWN) as session, session.verifiers() as pool:
        validation = Validation(session, session.evaluator(session.engine(), pool))
        finished, stopping = session.is_finished, False
        while not finished and not stopping:
            supervised_step(session)
            finished = validation.is_reached() or session.is_finished
            stopping = session.must_stop()
            if session.should_save(last=finished or stopping):
                with session.recorder.timed("save"):
                    session.save({"finished": finished}, {})
            session.end_step()
    return Path(recipe.run.output_dir)


def supervised_step(session: Session) -> None:
    """Take one optimizer step on reference responses.

    Args:
        session: the running stage.
    """
    recipe = session.recipe
    if session.policy.features is not None:
        session.policy.features.clear()
    prompts = next_distinct(session.stream, recipe.train.prompts_per_step)
    session.recorder.note({"data/text_only_left_out": 0})
    if not session.trains_text:
        with_image = [prompt for prompt in prompts if prompt.modality == "image"]
        session.recorder.note({"data/text_only_left_out": len(prompts) - len(with_image)})
        prompts = with_image
    samples = {prompt.key: supervised_sample(session, prompt) for prompt in prompts}
    if samples:
        _update(session, samples, prompts)
    session.step += 1


def _update(session: Session, samples: dict[str, TrainingSample], prompts: Sequence[Prompt]) -> None:
    context = session.context
    owner = assign({key: len(sample.token_ids) for key, sample in samples.items()}, context.data_size)
    mine = {key: sample for key, sample in samples.items() if owner[key] == context.data_rank}
    microbatches = session.microbatcher.split(mine, {prompt.key: prompt for prompt in prompts})
    batches = [part.batch for part in microbatches] or [session.microbatcher.filler(prompts[0])]
    session.recorder.note({"actor/lr": current_learning_rate(session.policy.optimizer)})
    with session.recorder.timed("update"):
        session.recorder.note(
            session.policy.update(
                batches, partial(_loss, denominator=sum(sample.response_length for sample in samples.values()))
            )
        )


def supervised_sample(session: Session, prompt: Prompt) -> TrainingSample:
    """Turn a prompt with a reference response into a sample.

    Args:
        session: gives tokenizer and end token.
        prompt: from a supervised data set.

    Raises:
        ValueError: the prompt has no response.
    """
    if prompt.response is None:
        raise ValueError(
            f"sample {prompt.key!r} of data.train={session.recipe.data.train!r} has no response; the align stage "
            'trains on reference responses: add a "response" field to the JSONL rows and run data.prepare again'
        )
    end = session.recipe.generation.stop_tokens[0]
    response = session.tokenizer.encode_response(prompt.response, end, key=prompt.key)
    return TrainingSample(
        prompt_key=prompt.key,
        sample_index=0,
        token_ids=(*prompt.token_ids, *response),
        prompt_length=len(prompt.token_ids),
        old_log_probs=(),
        rollout_log_probs=(),
        advantage=0.0,
        reward=0.0,
        policy_version=session.policy.version,
        group_effective=False,
        modality=prompt.modality,
    )


def _loss(
    log_probs_BS: torch.Tensor, batch: TrainingBatch, *, denominator: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return supervised_loss(log_probs_BS, batch.response_mask_BS, denominator=denominator, weights_B=batch.weights_B)
