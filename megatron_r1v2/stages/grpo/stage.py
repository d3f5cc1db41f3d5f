"""The GRPO stage: generate, score, select with the buffer, train (R1V2 report, section 3.3, equations 6 to 8)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from megatron_r1v2.config.schema import AlgorithmConfig, RunRecipe
from megatron_r1v2.evaluation.rollout_records import rollout_record
from megatron_r1v2.generation.features import FeatureCache
from megatron_r1v2.generation.queue import SharedPromptQueue
from megatron_r1v2.parallel import objects
from megatron_r1v2.rewards.model import RewardModel
from megatron_r1v2.rewards.replica import score_in_replica
from megatron_r1v2.rewards.score import reward_metrics
from megatron_r1v2.rewards.verifiers import VerifierPool
from megatron_r1v2.rl.grpo import GrpoInputs, GrpoSettings, grpo_loss
from megatron_r1v2.rl.mismatch import check_mismatch, truncated_importance_weights
from megatron_r1v2.rl.sample_buffer import SampleBuffer
from megatron_r1v2.stages.calibrator import Calibrator
from megatron_r1v2.stages.grpo.selection import (
    Selection,
    count_effective_groups,
    sample_id,
    select,
    training_sample,
)
from megatron_r1v2.stages.loaded_reward_model import open_reward_model
from megatron_r1v2.stages.loop import run_steps
from megatron_r1v2.stages.preemption import made_by
from megatron_r1v2.stages.session import Session, next_distinct, open_session
from megatron_r1v2.stages.validation import Validation
from megatron_r1v2.training.batches import with_old_log_probs
from megatron_r1v2.training.mismatch import compute_mismatch
from megatron_r1v2.training.optimizer import current_learning_rate
from megatron_r1v2.training.policy import UpdateResult
from megatron_r1v2.training.replay import ReplayStore, send_to_trainers
from megatron_r1v2.training.weight_verification import check_engine
from megatron_r1v2.types import Prompt, Rollout, Sample, ScoredRollout, TrainingBatch

SHOWN = ("critic/rewards/mean", "reward/answer/mean", "ssb/fresh_effective_fraction", "ssb/trained_effective_fraction")


def run_grpo(recipe: RunRecipe, *, reward_model: RewardModel | None = None) -> Path:
    """Run the stage to its end, from where it stopped when it was interrupted.

    Args:
        recipe: the settings.
        reward_model: what `reward.model_weight` weighs; None: what the `reward_model` section names, if anything.

    Returns:
        The run's folder.
    """
    with open_session(recipe, stage="grpo", shown=SHOWN) as session, session.verifiers() as pool:
        stage = GrpoStage(session, pool, reward_model)
        validation = Validation(session, session.evaluator(stage.engine, pool), stage.calibrator)
        replay = stage.store.state_dict
        run_steps(session, stage.step, state=stage.state_dict, replay=replay, is_reached=validation.is_reached)
    return Path(recipe.run.output_dir)


class GrpoStage:
    """The steps of a run, and what they carry from one to the next: the Selective Sample Buffer, the calibrator."""

    def __init__(self, session: Session, pool: VerifierPool | None, reward_model: RewardModel | None = None) -> None:
        """Set up the stage, its buffer restored when the session was resumed.

        Args:
            session: the running stage.
            pool: answer checkers, on the leader of each replica.
            reward_model: what `reward.model_weight` weighs; None: what the `reward_model` section names, if anything.
        """
        self.session = session
        self.pool = pool
        self.reward_model = open_reward_model(session) if reward_model is None else reward_model
        self.calibrator = Calibrator(
            session,
            name="model_weight",
            configured=session.recipe.reward.model_weight,
            bound=session.recipe.hallucination.min_model_weight,
        )
        self.engine = session.engine()
        self.store = ReplayStore()
        self.buffer: SampleBuffer | None = None
        self.buffer_weight = session.loaded_state.get("buffer_weight", self.calibrator.value)
        settings = session.recipe.buffer
        if settings.enabled:
            self.buffer = SampleBuffer(
                settings.capacity, settings.max_age, settings.priority_exponent, settings.balance_modalities
            )
            if "buffer" in session.loaded_state:
                self.buffer.load_state_dict(session.loaded_state["buffer"])
                self.store.load_state_dicts(
                    session.loaded_replay, data_rank=session.context.data_rank, data_size=session.context.data_size
                )

    def step(self) -> None:
        """Do one step of the paper: rollouts, rewards, advantages and buffer, update."""
        session, timed = self.session, self.session.recorder.timed
        self.invalidate_buffer()
        prompts, scored = self.generate_and_score()
        session.poll_between_phases()
        selection = self.select(prompts, scored)
        with timed("exchange"):
            samples, sample_prompts = self.exchange_samples(selection, prompts, scored)
        with timed("log_probs"):
            trained = self.add_old_log_probs(samples, sample_prompts)
        session.poll_between_phases()
        if trained is None:
            session.recorder.note({"actor/skipped_updates": 1.0})
        else:
            with timed("update"):
                self.update(selection, trained, sample_prompts | {"": prompts[0]})
            self.add_to_buffer(selection, trained, sample_prompts)
        self.keep_rollouts(selection, prompts, scored)
        speed = selection.num_generated_tokens / session.recorder.seconds("generate")
        session.recorder.note({"perf/generated_tokens_per_second": speed})
        session.step += 1

    def invalidate_buffer(self) -> None:
        """Empty the buffer when the calibrator has lowered the reward model's weight: its advantages rest on more."""
        if self.buffer is not None and self.calibrator.value < self.buffer_weight:
            self.store.drop(self.buffer.clear())
        self.buffer_weight = self.calibrator.value

    def generate_and_score(self) -> tuple[list[Prompt], list[ScoredRollout]]:
        """Generate and score: once, or with dynamic sampling until enough groups are effective.

        Returns:
            The prompts of the step, the same on every rank, and this replica's responses.
        """
        session, timed = self.session, self.session.recorder.timed
        wanted, rounds = session.recipe.train.prompts_per_step, session.recipe.algorithm.dynamic_sampling_rounds
        prompts: list[Prompt] = []
        scored: list[ScoredRollout] = []
        counts: Counter[str] = Counter()
        features = session.feature_cache() if session.policy.features is None else session.policy.features
        features.clear()
        for done in range(1, rounds + 1):
            more = next_distinct(session.stream, wanted, besides=prompts)
            if done == 1:
                self.verify_weights(more, features)
            with timed("generate"):
                rollouts = self.generate(more, features, round_number=done)
            with timed("reward"):
                more_scored, more_counts = self.score(more, rollouts)
            prompts += more
            scored += more_scored
            counts.update(more_counts)
            if done == rounds or self.effective_groups(prompts, scored) >= wanted:
                break
        session.recorder.note({"rollout/rounds": done, **reward_metrics(counts)})
        return prompts, scored

    def verify_weights(self, prompts: Sequence[Prompt], features: FeatureCache) -> None:
        """Hold that all replicas are about to sample from the same weights, and that the engine computes with them."""
        session = self.session
        with session.recorder.timed("gate"):
            weights = session.verifier.verify_weights({}, None)
            session.recorder.note(
                check_engine(
                    self.engine,
                    prompts,
                    features,
                    policy=session.policy,
                    microbatcher=session.microbatcher,
                    generation=session.recipe.generation,
                    settings=session.recipe.algorithm,
                )
            )
        session.preemption.kept.begin_step(
            session.step,
            made_by(session.recipe.run.seed, session.policy.version, session.recipe.generation, weights),
        )

    def generate(self, prompts: Sequence[Prompt], features: FeatureCache, *, round_number: int) -> list[Rollout]:
        """Sample N responses to each prompt that this replica takes from the shared queue, less those that are on disk
        from before an interruption."""
        session = self.session
        settings = session.recipe.generation
        preemption = session.preemption
        kept, missing = preemption.kept.take(prompts)
        preemption.log_resumed_rollouts(session.step, len(prompts) - len(missing), len(prompts))
        rollouts = self.engine.generate(
            SharedPromptQueue(missing, context=session.context, name=f"grpo-{session.step}-{round_number}"),
            num_responses=settings.responses_per_prompt,
            policy_version=session.policy.version,
            temperature=settings.temperature,
            max_response_tokens=settings.max_response_tokens,
            features=features,
            progress=preemption.poll_between_engine_steps,
            on_finished=preemption.kept.keep,
        )
        preemption.wait_for_all(f"generated-{session.step}-{round_number}")
        session.recorder.note({"rollout/evictions": self.engine.num_evictions})
        order = {prompt.key: place for place, prompt in enumerate(prompts)}
        return sorted((*chain(*kept.values()), *rollouts), key=lambda rollout: order[rollout.prompt_key])

    def score(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> tuple[list[ScoredRollout], Counter[str]]:
        """Score this replica's rollouts; returns them, and the reward sums of all replicas."""
        session = self.session
        self.calibrator.note()
        scored, counts = score_in_replica(
            {prompt.key: prompt for prompt in prompts},
            rollouts,
            decode=session.tokenizer.decode,
            settings=replace(session.recipe.reward, model_weight=self.calibrator.value),
            pool=self.pool,
            context=session.context,
            max_response_tokens=session.recipe.generation.max_response_tokens,
            reward_model=self.reward_model,
        )
        total: Counter[str] = Counter()
        for part in objects.all_gather(counts, session.context.groups.dp):
            total.update(part)
        return scored, total

    def effective_groups(self, prompts: Sequence[Prompt], scored: Sequence[ScoredRollout]) -> int:
        """Count the groups of all replicas that can teach something."""
        session = self.session
        mine = count_effective_groups(scored, prompts, trains_text=session.trains_text)
        return sum(objects.all_gather(mine, session.context.groups.dp))

    def select(self, prompts: Sequence[Prompt], scored: Sequence[ScoredRollout]) -> Selection:
        """Compute advantages over all replicas and top the effective samples up from the buffer."""
        session = self.session
        selection = select(
            session.recipe,
            self.buffer,
            prompts,
            scored,
            step=session.step,
            trains_text=session.trains_text,
            context=session.context,
        )
        session.recorder.note(selection.metrics)
        return selection

    def exchange_samples(
        self, selection: Selection, prompts: Sequence[Prompt], scored: Sequence[ScoredRollout]
    ) -> tuple[dict[str, Sample], dict[str, Prompt]]:
        """Send fresh and replayed samples from where they are to where they are trained."""
        session = self.session
        by_key = {prompt.key: prompt for prompt in prompts}
        held = dict(self.store.samples)
        for response in scored:
            name = sample_id(session.step, response.rollout)
            if name in selection.trainer:
                held[name] = training_sample(response, by_key[response.rollout.prompt_key], selection.records[name])
        return send_to_trainers(
            held,
            self.store.prompts | by_key,
            selection.trainer,
            group=session.context.groups.dp,
            device=session.context.device,
        )

    def add_old_log_probs(
        self, samples: Mapping[str, Sample], prompts: Mapping[str, Prompt]
    ) -> dict[str, Sample] | None:
        """Compute the training forward's log-probs of fresh samples; replayed ones keep those they were stored with.

        None: some are not finite, and the update is skipped."""
        session = self.session
        fresh = {name: sample for name, sample in samples.items() if sample.rl is not None and sample.rl.is_fresh}
        microbatches = session.microbatcher.split(fresh, prompts)
        batches = [part.batch for part in microbatches]
        log_probs = session.policy.compute_log_probs(batches)
        if session.policy.skip_update_if_not_finite(batches, log_probs):
            return None
        result = dict(samples)
        for part, log_probs_BS in zip(microbatches, log_probs, strict=True):
            for row, name in enumerate(part.names):
                result[name] = with_old_log_probs(fresh[name], log_probs_BS[row])
        metrics = compute_mismatch(batches, log_probs, session.context)
        session.recorder.note(metrics)
        check_mismatch(metrics, session.recipe.algorithm.max_log_prob_difference)
        return result

    def update(self, selection: Selection, samples: Mapping[str, Sample], prompts: Mapping[str, Prompt]) -> None:
        """Take the optimizer steps of this batch; none when no sample has an advantage.

        Args:
            selection: the same on every rank.
            samples: those that this rank trains.
            prompts: by key; the one under "" fills the microbatch of a rank that has no sample.
        """
        policy, algorithm = self.session.policy, self.session.recipe.algorithm
        learning_rate = current_learning_rate(policy.optimizer)
        results: list[UpdateResult] = []
        for update in selection.updates:
            mine = {name: samples[name] for name in update if name in samples}
            microbatches = self.session.microbatcher.split(mine, prompts, replayed=set(selection.plan.replayed))
            batches = [part.batch for part in microbatches] or [self.session.microbatcher.filler(prompts[""])]
            batches = self._with_reference(batches)
            loss = partial(batch_loss, algorithm=algorithm, denominator=selection.denominator)
            results.append(policy.update(batches, loss))
        self.session.recorder.note(
            {
                "actor/lr": learning_rate,
                "actor/updates": len(results),
                "actor/skipped_updates": float(sum(not result.applied for result in results)),
                **mean_of_updates([result.logged() for result in results]),
            }
        )

    def add_to_buffer(self, selection: Selection, samples: Mapping[str, Sample], prompts: Mapping[str, Prompt]) -> None:
        """Put this step's effective samples into the buffer; each stays on the rank that trained it."""
        if self.buffer is None:
            return
        dropped = self.buffer.add(selection.fresh_entries, self.session.step)
        fresh = set(selection.plan.fresh)
        self.store.add({name: sample for name, sample in samples.items() if name in fresh}, prompts)
        self.store.drop(dropped)

    def keep_rollouts(self, selection: Selection, prompts: Sequence[Prompt], scored: Sequence[ScoredRollout]) -> None:
        """Keep some of the main rank's rollouts for the report."""
        session = self.session
        if not session.context.is_main:
            return
        by_key = {prompt.key: prompt for prompt in prompts}
        records = []
        for response in scored[: session.recipe.logging.sample_rollouts]:
            record = selection.records[sample_id(session.step, response.rollout)]
            prompt = by_key[response.rollout.prompt_key]
            records.append(rollout_record(session.step + 1, prompt, response, advantage=record.advantage))
        session.recorder.write_rollouts(records)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed stage must know: the index of the buffer, and the reward model's weight."""
        state: dict[str, Any] = self.calibrator.state_dict()
        if self.buffer is not None:
            state |= {"buffer": self.buffer.state_dict(), "buffer_weight": self.buffer_weight}
        return state

    def _with_reference(self, batches: list[TrainingBatch]) -> list[TrainingBatch]:
        session = self.session
        if session.reference is None:
            return batches
        with session.reference.in_place_of(session.policy.model):
            log_probs = session.policy.compute_log_probs(batches)
        return [
            replace(batch, reference_log_probs_BS=log_probs_BS)
            for batch, log_probs_BS in zip(batches, log_probs, strict=True)
        ]


def mean_of_updates(of_updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average the metrics of a step's optimizer steps; a metric that some lack is averaged over those that have it.

    Args:
        of_updates: metrics by name, of each optimizer step.
    """
    found: dict[str, list[float]] = {}
    for metrics in of_updates:
        for name, value in metrics.items():
            found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def batch_loss(
    log_probs_BS: torch.Tensor, batch: TrainingBatch, *, algorithm: AlgorithmConfig, denominator: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Give a microbatch to the GRPO loss.

    Args:
        log_probs_BS: float32 [B, S] of the policy in training.
        batch: the microbatch.
        algorithm: clip ranges, KL coefficient, aggregation.
        denominator: of the whole batch over all ranks.

    Returns:
        This microbatch's part of the loss, and metrics as (sum, count) pairs.
    """
    importance_BS = None
    if algorithm.importance_cap > 0:
        importance_BS = truncated_importance_weights(
            batch.old_log_probs_BS, batch.rollout_log_probs_BS, algorithm.importance_cap
        )
    inputs = GrpoInputs(
        log_probs_BS,
        batch.old_log_probs_BS,
        batch.advantages_B,
        batch.response_mask_BS,
        weights_B=batch.weights_B,
        importance_weights_BS=importance_BS,
        reference_log_probs_BS=batch.reference_log_probs_BS,
        replayed_B=batch.replayed_B,
    )
    settings = GrpoSettings(
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        aggregation=algorithm.loss_aggregation.value,
        kl_coefficient=algorithm.kl_coefficient,
    )
    return grpo_loss(inputs, settings, denominator=denominator)
