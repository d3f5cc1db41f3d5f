"""The GRPO stage: generate, score, select with the buffer, train (R1V2 report, section 3.3, equations 6 to 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_r1v2.config.choices import EffectiveBy
from megatron_r1v2.config.recipes import GrpoRecipe
from megatron_r1v2.evaluation.rollout_records import rollout_record
from megatron_r1v2.rewards.model import RewardModel
from megatron_r1v2.rewards.verifiers import VerifierPool
from megatron_r1v2.stages.calibrator import Calibrator
from megatron_r1v2.stages.grpo.replay_buffer import ReplayBuffer
from megatron_r1v2.stages.grpo.rollouts import RolloutPhase
from megatron_r1v2.stages.grpo.selection import (
    Selection,
    check_answers,
    fresh_samples,
    sample_id,
    select,
    telling_responses,
)
from megatron_r1v2.stages.grpo.updates import UpdatePhase
from megatron_r1v2.stages.loaded_reward_model import open_reward_model
from megatron_r1v2.stages.loop import run_steps
from megatron_r1v2.stages.session import Session, open_session
from megatron_r1v2.stages.validation import Validation
from megatron_r1v2.types import Prompt, ScoredRollout

SHOWN = ("critic/rewards/mean", "reward/answer/mean", "ssb/fresh_effective_fraction", "ssb/trained_effective_fraction")

ROLLOUTS_KEPT = 8
"""Of each step, for the report."""

_LOGGED_IN_VAIN = 3
_IN_VAIN = {
    EffectiveBy.answer: "all answers to a prompt are wrong, or all are right, so that the answer teaches nothing. "
    "Look at the responses in the report; take prompts that the model answers sometimes (r1v2 filter-prompts), or set "
    "buffer.effective_by=reward where other parts of the reward tell the responses apart",
    EffectiveBy.reward: "all responses to a prompt earn the same reward, which teaches nothing. "
    "Look at the responses in the report; give a reward that tells them apart, or other prompts",
}


def run_grpo(recipe: GrpoRecipe, *, reward_model: RewardModel | None = None) -> Path:
    """Run the stage to its end, from where it stopped when it was interrupted, and return the run's folder.

    Args:
        reward_model: what `reward.model_weight` weighs; None: what the `reward_model` section names, if anything.
    """
    keep_reference = recipe.algorithm.kl_coefficient > 0
    shown = (*SHOWN, *(f"reward/{function.name}/mean" for function in recipe.reward.functions))
    with (
        open_session(
            recipe, stage="grpo", shown=shown, keep_reference=keep_reference, temperature=recipe.generation.temperature
        ) as session,
        session.loaded.verifiers() as pool,
    ):
        stage = GrpoStage(session, recipe, pool, reward_model)
        evaluator = session.loaded.evaluator(
            stage.rollouts.engine, pool, settings=recipe.evaluation, reward=recipe.reward
        )
        validation = Validation(session, evaluator, stage.calibrator)
        run_steps(
            session,
            stage.step,
            state=stage.state_dict,
            replay=stage.rank_state_dict,
            validate=validation.validate_if_due,
        )
    return Path(recipe.run.output_dir)


class GrpoStage:
    """The steps of a run, and what they carry from one to the next: the Selective Sample Buffer, the calibrator."""

    def __init__(
        self, session: Session, recipe: GrpoRecipe, pool: VerifierPool | None, reward_model: RewardModel | None = None
    ) -> None:
        """Set up the stage, its buffer restored when the session was resumed.

        Args:
            pool: answer checkers, on the leader of each replica.

        Raises:
            DataError: prompts that nothing can judge.
        """
        check_answers(session.survey.unanswered, recipe.reward, recipe.buffer.effective_by)
        self.session, self.recipe = session, recipe
        self._steps_in_vain = 0
        self.calibrator = Calibrator(
            recipe.hallucination,
            session.recorder,
            name="model_weight",
            configured=recipe.reward.model_weight,
            bound=0.0,
            restored=session.restored.state,
        )
        self.buffer = ReplayBuffer(
            recipe.buffer,
            session.context,
            reward=recipe.reward,
            model_weight=self.calibrator.value,
            restored=session.restored,
        )
        self.rollouts = RolloutPhase(
            session,
            session.loaded.engine(),
            recipe=recipe,
            pool=pool,
            reward_model=open_reward_model(session.loaded, recipe) if reward_model is None else reward_model,
            calibrator=self.calibrator,
        )
        self.updates = UpdatePhase(
            session.policy,
            session.microbatcher,
            settings=recipe.algorithm,
            aggregation=recipe.loss.aggregation,
            reference=session.reference,
            recorder=session.recorder,
        )

    def step(self) -> None:
        """Collective over the world: do one step of the paper: rollouts, rewards, advantages and buffer, update."""
        session, timed = self.session, self.session.recorder.timed
        # A validation after the last step may have lowered the reward model's weight.
        self.buffer.invalidate(self.calibrator.value)
        prompts, scored = self.rollouts.generate_and_score()
        session.preemption.poll_between_phases()
        selection = self.select(prompts, scored)
        with timed("exchange"):
            fresh = fresh_samples(selection, scored, prompts)
            samples, sample_prompts = self.buffer.exchange_samples(selection, fresh, prompts)
        with timed("log_probs"):
            self.add_segment_log_probs()
            # The forward pass of an only update gives them.
            several = len(selection.updates) > 1
            trained = self.updates.add_old_log_probs(samples, sample_prompts) if several else samples
        # The last moment to give the step up: what follows changes the weights.
        session.preemption.poll_between_phases()
        if trained is not None:
            with timed("update"):
                trained = self.updates.take_updates(selection, trained, sample_prompts, filler=self.rollouts.filler)
        if trained is not None:
            # With the old log-probs of this step: a later ratio is taken against the policy that sampled.
            self.buffer.add(selection, trained, sample_prompts, step=session.step)
        self.log_rollouts(selection, prompts, scored)
        speed = self.rollouts.generated_tokens / session.recorder.seconds("generate")
        session.recorder.note({"perf/generated_tokens_per_second": speed})
        session.step += 1

    def add_segment_log_probs(self) -> None:
        """Collective over the world: compute the old log-probs of the responses that go on, with what sampled them."""
        if not self.recipe.generation.segment_tokens:
            return
        groups = self.rollouts.in_flight
        samples, prompts = groups.new_segments()
        dropped = groups.add_old_log_probs(self.updates.add_old_log_probs(samples, prompts))
        if dropped:
            self.session.recorder.note({"rollout/groups_dropped": dropped})

    def select(self, prompts: Sequence[Prompt], scored: Sequence[ScoredRollout]) -> Selection:
        """Collective over the data-parallel ranks: compute advantages, top effective samples up from the buffer.

        Args:
            scored: this replica's responses.
        """
        session = self.session
        selection = select(
            self.recipe,
            self.buffer.index,
            prompts,
            scored,
            step=session.step,
            trains_text=session.trains_text,
            context=session.context,
        )
        session.recorder.note(selection.metrics)
        self.log_nothing_effective(selection)
        return selection

    def log_nothing_effective(self, selection: Selection) -> None:
        """Log it when no group was effective for some steps in a row, and what helps."""
        is_effective = any(record.entry.effective for record in selection.records.values())
        self._steps_in_vain = 0 if is_effective else self._steps_in_vain + 1
        if self._steps_in_vain == _LOGGED_IN_VAIN:
            self.session.recorder.log(
                f"step {self.session.step + 1}: no group of the last {_LOGGED_IN_VAIN} steps was effective: "
                f"{_IN_VAIN[self.recipe.buffer.effective_by]}"
            )

    def log_rollouts(self, selection: Selection, prompts: Sequence[Prompt], scored: Sequence[ScoredRollout]) -> None:
        """Write some of the main rank's rollouts for the report."""
        session = self.session
        if not session.context.is_main:
            return
        by_key = {prompt.key: prompt for prompt in prompts}
        own = [(response, selection.records[sample_id(response.rollout)]) for response in scored]
        rows = []
        for place in telling_responses([record for _, record in own], ROLLOUTS_KEPT):
            response, record = own[place]
            prompt = by_key[response.rollout.prompt_key]
            rows.append(rollout_record(session.step + 1, prompt, response, advantage=record.advantage))
        session.recorder.write_rollouts(rows)

    def rank_state_dict(self) -> Mapping[str, Any]:
        """Return what this replica holds for the steps to come: samples of the buffer, groups that go on."""
        return {**self.buffer.samples.state_dict(), **self.rollouts.in_flight.state_dict()}

    def state_dict(self) -> Mapping[str, Any]:
        """Return what a resumed stage must know: the index of the buffer, and the reward model's weight."""
        return {**self.calibrator.state_dict(), **self.buffer.state_dict()}
