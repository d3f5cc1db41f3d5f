"""The MPO stage: mixed preference optimization on pairs of responses (R1V2 report, section 3.2, equations 2 to 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_r1v2.config.choices import LossAggregation
from megatron_r1v2.config.recipes import MpoRecipe
from megatron_r1v2.config.schema import PreferenceConfig, RewardConfig
from megatron_r1v2.data.mixture import num_train_samples, read_train
from megatron_r1v2.data.samples import parse_sample
from megatron_r1v2.resilience.fingerprint import Change, Fingerprint
from megatron_r1v2.rl.mpo import (
    MpoInputs,
    MpoSettings,
    RewardShift,
    TermWeights,
    generation_loss,
    mpo_loss,
    split_by_margin,
)
from megatron_r1v2.stages.calibrator import Calibrator
from megatron_r1v2.stages.loop import run_steps
from megatron_r1v2.stages.reference_log_probs import (
    compute_reference_fingerprint,
    keep_for_fewer_pairs,
    load_or_compute_log_probs,
)
from megatron_r1v2.stages.resume import Restored
from megatron_r1v2.stages.session import Session, open_session
from megatron_r1v2.stages.supervised_data import SIDES, PairSource, pair_samples, shard_samples, take_update
from megatron_r1v2.stages.validation import Validation
from megatron_r1v2.types import Prompt, TrainingBatch

SHOWN = ("actor/loss", "rewards/margins", "rewards/accuracies", "validation/pass_at_1")
# The mean of the rewards of all earlier steps, as in TRL.
_DELTA_MOMENTUM = 0.0


def run_mpo(recipe: MpoRecipe) -> Path:
    """Run the stage until its last step or until validation Pass@1 is high enough, and return the run's folder."""
    check_margins(recipe)
    with open_session(recipe, stage="mpo", shown=SHOWN) as session, session.loaded.verifiers() as pool:
        stage = MpoStage(session, recipe)
        reward = RewardConfig(claim_pattern=recipe.reward.claim_pattern)
        evaluator = session.loaded.evaluator(session.loaded.engine(), pool, settings=recipe.evaluation, reward=reward)
        validation = Validation(session, evaluator, stage.calibrator)
        if session.is_finished or stage.load_or_compute_reference():
            run_steps(session, stage.step, state=stage.state_dict, validate=validation.validate_if_due)
    return Path(recipe.run.output_dir)


def check_margins(recipe: MpoRecipe) -> None:
    """Refuse a tau that no pair reaches, before anything is computed.

    Raises:
        ValueError: no margin is as large as `preference.min_margin`, or as the calibrator may make it.
    """
    name, tau = "preference.min_margin", recipe.preference.min_margin
    if recipe.hallucination.target_rate:
        name, tau = "hallucination.max_margin", recipe.hallucination.max_margin
    if tau <= 0:
        return
    # A pair that nobody scored counts as one of margin 0, as in `split_by_margin`.
    samples = read_train(recipe.data, parse_sample)
    largest = max((sample.margin or 0.0 for sample in samples if sample.chosen), default=0.0)
    if largest < tau:
        raise ValueError(
            f"{name}={tau:g} but the largest margin in data.train={recipe.data.train_text!r} is {largest:g}: no pair "
            "would be left; lower it, or build the pairs with python -m megatron_r1v2 pairs, which writes margins"
        )


class MpoStage:
    """The steps of a run, and what they carry from one to the next: delta, and tau when it is calibrated."""

    def __init__(self, session: Session, recipe: MpoRecipe) -> None:
        """Set up the stage, delta restored when the session was resumed."""
        self.session = session
        self.settings, self.aggregation = recipe.preference, recipe.loss.aggregation
        self._reference_dir = recipe.preference.reference_dir or f"{recipe.run.output_dir}/reference"
        self.source = PairSource("mpo", f"data.train={session.recipe.data.train_text!r}")
        self.calibrator = Calibrator(
            recipe.hallucination,
            session.recorder,
            name="threshold",
            configured=self.settings.min_margin,
            bound=recipe.hallucination.max_margin,
            restored=session.restored.state,
        )
        self.delta = _restored_delta(session.restored)
        self.reference_fingerprint: Fingerprint | None = None
        self.reference: Mapping[str, float] = {}
        self._num_pairs = num_train_samples(session.recipe.data)
        self._passed_over = 0

    @property
    def needs_reference(self) -> bool:
        """Return whether a term of the loss compares with the model that the stage started from."""
        # If not, this is supervised training on the chosen responses, and the rejected ones are not computed.
        return self.settings.preference_weight > 0 or self.settings.quality_weight > 0

    def load_or_compute_reference(self) -> bool:
        """Collective over the world: get the reference log-probs; return False when asked to stop before the end.

        Raises:
            ValueError: data set, model or settings are not those that a resumed run has trained with.
        """
        if not self.needs_reference:
            return True
        with self.session.recorder.timed("reference"):
            fingerprint = self.reference_fingerprint = compute_reference_fingerprint(self.session)
            saved = Fingerprint.of(**self.session.restored.state.get("reference", fingerprint.values))
            changes = fingerprint.changes_since(saved)
            if [change.setting for change in changes] == ["data"] and self.session.restored.taken_out:
                keep_for_fewer_pairs(self.session, saved, fingerprint, folder=Path(self._reference_dir))
            elif changes:
                raise ValueError(
                    f"what the reference log-probs of this run belong to has changed since it was saved: "
                    f"{'; '.join(map(_told, changes))}; put it back, or start anew with run.output_dir set to a new "
                    "folder"
                )
            found = load_or_compute_log_probs(self.session, self.source, fingerprint, folder=Path(self._reference_dir))
        self.reference = found or {}
        return found is not None

    def step(self) -> None:
        """Collective over the world: read pairs, leave out those below the margin, update policy and delta."""
        session = self.session
        prompts = session.next_prompts()
        # Before they are split by their margins: a missing pair is an error, not a pair of low margin.
        for prompt in prompts:
            self.source.preference_of(prompt)
        kept, below = split_by_margin(prompts, self.calibrator.value)
        self.calibrator.note()
        session.recorder.note(
            {
                "mpo/pairs_kept": len(kept),
                "mpo/pairs_below_margin": len(below),
                "mpo/min_margin": self.calibrator.value,
                "mpo/delta": self.delta.value,
            }
        )
        self._check_not_idle(len(kept))
        if kept:
            self.update(kept)
        session.step += 1

    def update(self, prompts: Sequence[Prompt]) -> None:
        """Collective over the world: take one optimizer step on pairs.

        With the delta of the steps before: the rewards of this one are known to all ranks only after all microbatches,
        and the result must not depend on how many there are.
        """
        session, settings = self.session, self.settings
        sides = SIDES if self.needs_reference else SIDES[:1]
        samples, units = pair_samples(prompts, self.source, session.response_encoder, sides=sides)
        microbatches = shard_samples(
            samples, prompts, units, microbatcher=session.microbatcher, context=session.context
        )
        batches = [self._with_reference(part.batch, part.names) for part in microbatches]
        session.recorder.note(session.policy.count_tokens("update", batches))
        batches = batches or [self._filler(prompts[0])]
        denominator = len(prompts)
        if self.aggregation is LossAggregation.token:
            denominator = sum(samples[names[0]].response_length for names in units.values())
        loss = partial(
            batch_loss,
            settings=settings,
            aggregation=self.aggregation.value,
            delta=self.delta.value,
            num_pairs=len(prompts),
            generation_denominator=denominator,
        )
        result = take_update(session.policy, batches, loss, recorder=session.recorder)
        # A skipped update moves nothing, so its rewards do not move delta either.
        if self.needs_reference and result.applied:
            mean = (result.metrics["rewards/chosen"] + result.metrics["rewards/rejected"]) / 2
            self.delta = self.delta.update(mean, 2 * len(prompts), momentum=_DELTA_MOMENTUM)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed stage must know: delta, tau, and the fingerprint of the reference log-probs."""
        reference = self.reference_fingerprint.values if self.reference_fingerprint is not None else {}
        return {"delta": asdict(self.delta), "reference": reference, **self.calibrator.state_dict()}

    def _with_reference(self, batch: TrainingBatch, names: Sequence[str]) -> TrainingBatch:
        if not self.needs_reference:
            return batch
        # float64: small differences between sums over thousands of tokens are what the loss is about.
        sums = [self.reference[name] for name in names]
        return replace(
            batch, reference_sums_B=torch.tensor(sums, dtype=torch.float64, device=batch.token_ids_BS.device)
        )

    def _filler(self, prompt: Prompt) -> TrainingBatch:
        if not self.needs_reference:
            return self.session.microbatcher.filler(prompt)
        batch = self.session.microbatcher.filler(prompt, rows=len(SIDES))
        return replace(batch, reference_sums_B=torch.zeros_like(batch.weights_B, dtype=torch.float64))

    def _check_not_idle(self, num_kept: int) -> None:
        """Refuse to go on when a whole epoch has passed without a pair to train on."""
        self._passed_over = 0 if num_kept else self._passed_over + self.session.recipe.train.prompts_per_step
        if self._passed_over > self._num_pairs:
            raise ValueError(
                f"none of the {self._num_pairs} pairs of data.train={self.session.recipe.data.train_text!r} can be "
                f"trained on: their margins are below preference.min_margin={self.calibrator.value:g} (a calibrator "
                "raises it up to hallucination.max_margin), or they have no image and train.parts lacks language; "
                "lower the one or add the other"
            )


def _restored_delta(restored: Restored) -> RewardShift:
    """Return the shift of a checkpoint, in the unit of a beta that has changed since."""
    delta = RewardShift(**restored.state.get("delta", {}))
    for change in (each.change for each in restored.changes):
        if change.setting == "preference.beta" and isinstance(change.old, float) and isinstance(change.new, float):
            delta = delta.rescaled(change.new / change.old)
    return delta


def _told(change: Change) -> str:
    """Return a change for people, who have no use for the whole of a digest."""
    old, new = (value[:12] if isinstance(value, str) else value for value in (change.old, change.new))
    return str(Change(change.setting, old, new))


def batch_loss(
    log_probs_BS: torch.Tensor,
    batch: TrainingBatch,
    *,
    settings: PreferenceConfig,
    aggregation: str,
    delta: float,
    num_pairs: int,
    generation_denominator: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Compute the MPO loss of a microbatch.

    Args:
        log_probs_BS: float32 [B, S] of the policy in training.
        batch: the microbatch; without reference log-probs its rows are chosen responses alone.
        aggregation: of the generation term.
        delta: shift of the quality term.
        num_pairs: of the step over all ranks.
        generation_denominator: pairs or chosen tokens of the step over all ranks.

    Returns:
        This microbatch's part of the loss, and metrics as (sum, count) pairs.
    """
    if batch.reference_sums_B is None:
        loss, metrics = generation_loss(
            log_probs_BS,
            batch.response_mask_BS,
            denominator=generation_denominator,
            aggregation=aggregation,
            weights_P=batch.weights_B,
        )
        return settings.generation_weight * loss, metrics
    weights = TermWeights(settings.preference_weight, settings.quality_weight, settings.generation_weight)
    return mpo_loss(
        MpoInputs(log_probs_BS, batch.reference_sums_B, batch.response_mask_BS, batch.weights_B),
        MpoSettings(weights, settings.beta, aggregation),
        delta=delta,
        num_pairs=num_pairs,
        generation_denominator=generation_denominator,
    )
