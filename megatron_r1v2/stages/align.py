"""The align stage: supervised training on reference responses, usually of the adapter alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from megatron_r1v2.config.recipes import AlignRecipe
from megatron_r1v2.config.schema import RewardConfig
from megatron_r1v2.data.samples import DataError
from megatron_r1v2.rl.supervised import supervised_loss
from megatron_r1v2.stages.loop import run_steps
from megatron_r1v2.stages.session import Session, open_session
from megatron_r1v2.stages.supervised_data import ResponseEncoder, shard_samples, take_update
from megatron_r1v2.stages.validation import Validation
from megatron_r1v2.types import Prompt, Sample, TrainingBatch

SHOWN = ("actor/nll", "actor/grad_norm", "validation/pass_at_1")


def run_align(recipe: AlignRecipe) -> Path:
    """Run the stage until its last step or until validation Pass@1 is high enough, and return the run's folder."""
    with open_session(recipe, stage="align", shown=SHOWN) as session, session.loaded.verifiers() as pool:
        reward = RewardConfig(claim_pattern=recipe.reward.claim_pattern)
        evaluator = session.loaded.evaluator(session.loaded.engine(), pool, settings=recipe.evaluation, reward=reward)
        validation = Validation(session, evaluator)
        run_steps(session, partial(supervised_step, session), validate=validation.validate_if_due)
    return Path(recipe.run.output_dir)


def supervised_step(session: Session) -> None:
    """Collective over the world: take one optimizer step on reference responses."""
    prompts, microbatcher = session.next_prompts(), session.microbatcher
    encoder, folder = session.response_encoder, session.recipe.data.train_text
    samples = {prompt.key: supervised_sample(prompt, encoder, folder) for prompt in prompts}
    if samples:
        microbatches = shard_samples(samples, prompts, microbatcher=microbatcher, context=session.context)
        # Every rank takes the step: one without a sample runs a row of weight zero.
        batches = [part.batch for part in microbatches] or [microbatcher.filler(prompts[0])]
        # Over all ranks, so that the loss does not depend on who has which sample.
        tokens = sum(sample.response_length for sample in samples.values())
        take_update(session.policy, batches, partial(_loss, denominator=tokens), recorder=session.recorder)
    session.step += 1


def supervised_sample(prompt: Prompt, encoder: ResponseEncoder, folder: str) -> Sample:
    """Turn a prompt with a reference response into a sample.

    Raises:
        DataError: the prompt has no response.
    """
    if prompt.response is None:
        raise DataError(
            f"sample {prompt.key!r} of data.train={folder!r} has no response; the align stage "
            'trains on reference responses: add a "response" field to the JSONL rows and run r1v2 prepare again'
        )
    return encoder.sample(prompt, prompt.response)


def _loss(
    log_probs_BS: torch.Tensor, batch: TrainingBatch, *, denominator: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return supervised_loss(log_probs_BS, batch.response_mask_BS, denominator=denominator, weights_B=batch.weights_B)
