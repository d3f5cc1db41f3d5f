"""The reward_model stage: a scalar head (and other `train.parts`) trained by the Bradley-Terry loss on pairs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from megatron_r1v2.config.recipes import RewardModelRecipe
from megatron_r1v2.parallel import objects
from megatron_r1v2.rl.aggregation import mean_metrics
from megatron_r1v2.rl.reward_model import bradley_terry_loss
from megatron_r1v2.stages.loop import run_steps
from megatron_r1v2.stages.session import Session, open_session
from megatron_r1v2.stages.step_prompts import in_groups
from megatron_r1v2.stages.supervised_data import SIDES, PairSource, pair_samples, shard_samples, take_update
from megatron_r1v2.training.policy import Metrics, add_pairs
from megatron_r1v2.training.score_positions import append_pad_token, last_scores
from megatron_r1v2.types import Prompt, TrainingBatch

SHOWN = ("reward_model/loss", "reward_model/accuracy", "reward_model/margin", "validation/accuracy")


def run_reward_model(recipe: RewardModelRecipe) -> Path:
    """Run the stage to its end, resumed where it was interrupted, and return the run's folder."""
    with open_session(recipe, stage="reward_model", shown=SHOWN) as session:
        validates = bool(recipe.data.validation) and recipe.evaluation.every_steps > 0
        held_out = (
            list(session.loaded.read_prompts(recipe.data.validation, recipe.evaluation.prompts)) if validates else []
        )
        check_positions(session, held_out)

        def step() -> None:
            preference_step(session, centring_weight=recipe.reward_model.centring_weight)
            if held_out and (session.is_finished or session.step % recipe.evaluation.every_steps == 0):
                validate(session, held_out)

        run_steps(session, step)
    return Path(recipe.run.output_dir)


def preference_step(session: Session, *, centring_weight: float) -> None:
    """Collective over the world: take one optimizer step on the next pairs.

    Args:
        centring_weight: of (chosen score + rejected score)^2.
    """
    prompts = session.next_prompts()
    batches = pair_batches(session, prompts, setting=f"data.train={session.recipe.data.train_text!r}")
    loss = partial(pair_loss, denominator=len(prompts), centring_weight=centring_weight)
    # Every rank takes the step: one without a pair runs one of weight zero.
    batches = batches or [session.microbatcher.filler(prompts[0], rows=len(SIDES))]
    take_update(session.policy, batches, loss, recorder=session.recorder)
    session.step += 1


def validate(session: Session, prompts: Sequence[Prompt]) -> None:
    """Collective over the world: note how well the model ranks pairs that it does not train on.

    Args:
        prompts: with preferences, the same on every rank.
    """
    parts: list[Metrics] = []
    with session.recorder.timed("validate"):
        for few in in_groups(prompts, session.recipe.train.prompts_per_step):
            if session.policy.features is not None:
                session.policy.features.clear()
            batches = pair_batches(session, few, setting=f"data.validation={session.recipe.data.validation!r}")
            for batch, values_BS in zip(batches, session.policy.compute_values(batches), strict=True):
                # The sums alone count here, so the loss needs no denominator.
                parts.append(pair_loss(values_BS, batch, denominator=1.0)[1])
    mine = {name: pair.cpu() for name, pair in add_pairs(parts).items()}
    total = add_pairs(objects.all_gather(mine, session.context.groups.dp))
    means = mean_metrics(total)
    session.recorder.note({f"validation/{name.removeprefix('reward_model/')}": value for name, value in means.items()})


def check_positions(session: Session, prompts: Sequence[Prompt]) -> None:
    """Refuse a validation pair with more tokens than the model has positions, before the first step.

    Raises:
        ValueError: there is one; or a prompt has no pair.
    """
    source = PairSource("reward_model", f"data.validation={session.recipe.data.validation!r}")
    samples, units = pair_samples(prompts, source, session.response_encoder)
    given = session.loaded.given_responses
    for key, names in units.items():
        for sample in (samples[name] for name in names):
            if given and (mistake := given.mistake(key, sample.prompt_length, sample.response_length)):
                raise ValueError(f"{source.setting}: {mistake}")


def pair_batches(session: Session, prompts: Sequence[Prompt], *, setting: str) -> list[TrainingBatch]:
    """Make the microbatches of this data-parallel rank; the rows of a pair are neighbours, the chosen one first.

    Args:
        prompts: with preferences, of all ranks.
        setting: that named the data set, for the error.

    Raises:
        ValueError: a prompt has no preference.
    """
    samples, units = pair_samples(prompts, PairSource("reward_model", setting), session.response_encoder)
    # The score is read at the last token of a response, which must be an input for that.
    padded = {name: append_pad_token(sample, session.tokenizer.pad_id) for name, sample in samples.items()}
    microbatches = shard_samples(padded, prompts, units, microbatcher=session.microbatcher, context=session.context)
    return [part.batch for part in microbatches]


def pair_loss(
    values_BS: torch.Tensor, batch: TrainingBatch, *, denominator: float, centring_weight: float = 0.0
) -> tuple[torch.Tensor, Metrics]:
    """Compute the Bradley-Terry loss of a microbatch.

    Args:
        values_BS: float32 [B, S]: scores of all tokens; rows are pairs, the chosen response first.
        denominator: pairs of the whole batch over all ranks.

    Returns:
        This microbatch's part of the loss, and metrics as (sum, count) pairs.
    """
    scores_B = last_scores(values_BS, batch)
    return bradley_terry_loss(
        scores_B[0::2],
        scores_B[1::2],
        denominator=denominator,
        centring_weight=centring_weight,
        weights_P=batch.weights_B[0::2],
    )
