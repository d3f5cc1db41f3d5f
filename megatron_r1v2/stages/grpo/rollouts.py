"""The rollout phase of a GRPO step: verified weights, responses of the engine, their rewards."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from itertools import chain

from megatron_r1v2.config.recipes import GrpoRecipe
from megatron_r1v2.data.mixture import share_metrics
from megatron_r1v2.generation.engine import RolloutEngine, Sampling
from megatron_r1v2.generation.queue import SharedPromptQueue
from megatron_r1v2.parallel import objects
from megatron_r1v2.resilience.rollout_cache import rollout_fingerprint
from megatron_r1v2.rewards.model import RewardModel
from megatron_r1v2.rewards.replica import ReplicaScorer
from megatron_r1v2.rewards.score import reward_metrics
from megatron_r1v2.rewards.verifiers import VerifierPool
from megatron_r1v2.stages.calibrator import Calibrator
from megatron_r1v2.stages.grpo.segments import GroupsInFlight, check_enough_prompts
from megatron_r1v2.stages.grpo.selection import count_effective_groups
from megatron_r1v2.stages.session import Session
from megatron_r1v2.stages.step_prompts import TooFewPrompts, next_distinct
from megatron_r1v2.training.weight_verification import FROZEN_EVERY, GATE_REQUESTS, check_engine
from megatron_r1v2.types import Prompt, Rollout, ScoredRollout


class RolloutPhase:
    """The reader of prompts that samples N responses to each and scores them.

    Args:
        engine: on the weights in training.
        pool: answer checkers, on the leader of each replica.
        reward_model: weighed by `reward.model_weight`; None: no reward model.
    """

    def __init__(
        self,
        session: Session,
        engine: RolloutEngine,
        *,
        recipe: GrpoRecipe,
        pool: VerifierPool | None,
        reward_model: RewardModel | None,
        calibrator: Calibrator,
    ) -> None:
        self.session, self.recipe = session, recipe
        self.engine = engine
        self.pool = pool
        self.reward_model = reward_model
        self.calibrator = calibrator
        check_enough_prompts(session.stream.num_distinct, recipe)
        self.in_flight = GroupsInFlight(session.context, max_age=recipe.buffer.max_age, shards=session.restored.replay)
        """The groups that go on in the next step; none without generation.segment_tokens."""
        self.generated_tokens = 0
        """Response tokens of all replicas that the step has drawn so far, those of earlier segments left out."""
        self._prefill_tokens = (0, 0)
        """Computed in the step so far, and with a prompt for each response."""
        shared = session.policy.features
        self._exhaustion_logged = False
        self._waits: list[float] = []
        """Seconds of each round of the step, after this replica's last response."""
        self.features = shared if shared is not None else session.loaded.feature_cache()
        # A cache for its few requests: that of a whole phase would take longer to allocate than they take.
        self.gate_engine = session.loaded.engine(max_requests=GATE_REQUESTS)
        self.gated_weight: float | None = None
        """The reward model's weight when the gate was passed last; None: not yet in this process."""

    def generate_and_score(self) -> tuple[list[Prompt], list[ScoredRollout]]:
        """Collective over the world: generate and score, once or (dynamic sampling) until enough groups are effective.

        Returns:
            The prompts of the step, the same on every rank, and this replica's responses. With
            `generation.segment_tokens` they are those whose last response has ended, as `GroupsInFlight.settle` says.
        """
        session, timed = self.session, self.session.recorder.timed
        wanted, rounds = self.recipe.train.prompts_per_step, self.recipe.algorithm.dynamic_sampling_rounds
        prompts: list[Prompt] = []
        scored: list[ScoredRollout] = []
        counts: Counter[str] = Counter()
        exhausted, effective = False, 0
        self.features.clear()
        dropped = self.in_flight.drop_old(session.step)
        for done in range(1, rounds + 1):
            taken = [*self.in_flight.steps, *(prompt.key for prompt in prompts)]
            try:
                with timed("data"):
                    more = next_distinct(session.stream, wanted, besides=taken)
            except TooFewPrompts:  # samples are left out or corrupt
                if not prompts:
                    raise
                exhausted, done = True, done - 1
                break
            self.filler = more[0]
            if done == 1:
                with timed("gate"):
                    self.verify_weights(more)
            with timed("generate"):
                rollouts = self.generate(more, round_number=done)
            if session.recipe.generation.segment_tokens:
                more, rollouts = self.in_flight.settle(more, rollouts)
                session.recorder.note(
                    {"rollout/groups_in_flight": len(self.in_flight.steps), "rollout/groups_dropped": dropped}
                )
            with timed("reward"):
                more_scored, more_counts = self.score(more, rollouts)
            prompts += more
            scored += more_scored
            counts.update(more_counts)
            # A small data set has no prompts for another round: the step goes on with what it has.
            exhausted = len(prompts) + wanted > session.stream.num_distinct
            effective = self.sum_effective_groups(prompts, scored) if rounds > 1 else wanted
            if done == rounds or exhausted or effective >= wanted:
                break
        if exhausted and effective < wanted:
            self.log_exhausted(effective)
        if session.policy.features is None:
            self.features.clear()  # of a tower that trains: the update does not read them, and needs the memory
        session.recorder.note(
            {"rollout/rounds": done, **reward_metrics(counts), **self._gather_waits(), **share_metrics(prompts)}
        )
        return prompts, scored

    def log_exhausted(self, effective: int) -> None:
        """Log once that dynamic sampling has no further prompts, and what the step trains on."""
        if self._exhaustion_logged:
            return
        self._exhaustion_logged = True
        shares = " in the shares of" if len(self.recipe.data.sources) > 1 else " in"
        self.session.recorder.log(
            f"step {self.session.step + 1}: dynamic sampling has no prompts for a further round "
            f"({self.session.stream.num_distinct} samples{shares} data.train): the step trains on the {effective} "
            f"effective groups of train.prompts_per_step={self.recipe.train.prompts_per_step} that it found; said once"
        )

    def verify_weights(self, prompts: Sequence[Prompt]) -> None:
        """Collective over the world: check that all replicas sample from the same weights; their engines if due."""
        session, recipe = self.session, self.recipe
        # All parts were verified when the run started or was resumed.
        weights = session.verifier.verify_weights({}, None, trained_only=session.step % FROZEN_EVERY > 0)
        if self.gated_weight != self.calibrator.value or session.step % recipe.algorithm.gate_every == 0:
            session.recorder.note(
                check_engine(
                    self.gate_engine,
                    prompts,
                    self.features,
                    policy=session.policy,
                    microbatcher=session.microbatcher,
                    generation=recipe.generation,
                    settings=recipe.algorithm,
                )
            )
            self.gated_weight = self.calibrator.value
        session.preemption.rollouts.begin_step(
            session.step,
            rollout_fingerprint(
                recipe.run.seed,
                session.policy.version,
                recipe.generation,
                session.loaded.stop_ids,
                weights,
                recipe.model,
            ),
        )

    def generate(self, prompts: Sequence[Prompt], *, round_number: int) -> list[Rollout]:
        """Collective over the world: sample N responses to each prompt, less those kept from before an interruption.

        Args:
            prompts: of the round, the same on every rank.

        Returns:
            This replica's rollouts: of the prompts that it took from the shared queue, and its share of those kept.
        """
        session, preemption = self.session, self.session.preemption
        settings = session.recipe.generation
        kept, missing = preemption.rollouts.load(prompts)
        held, begun = self.in_flight.prompts, self.in_flight.responses
        if held:
            kept |= preemption.rollouts.load_begun(held, begun)
        preemption.log_resumed_rollouts(session.step, len(prompts) - len(missing), len(prompts))
        own = [prompt for prompt in held if prompt.key not in kept]
        is_last = session.step + 1 >= self.recipe.train.steps
        with (
            session.stream.reading(0 if is_last else self.recipe.train.prompts_per_step),
            preemption.rollouts.saving() as save,
        ):
            rollouts = self.engine.generate(
                SharedPromptQueue(
                    missing, context=session.context, name=f"grpo-{session.step}-{round_number}", own=own
                ),
                Sampling(
                    num_responses=settings.responses_per_prompt,
                    policy_version=session.policy.version,
                    temperature=settings.temperature,
                    max_response_tokens=settings.max_response_tokens,
                    segment_tokens=settings.segment_tokens,
                    step=session.step,
                ),
                features=self.features,
                progress=preemption.poll_between_engine_steps,
                on_finished=save,
                begun=begun,
            )
        done = time.perf_counter()
        preemption.wait_for_all(f"generated-{session.step}-{round_number}")
        self._waits.append(time.perf_counter() - done)
        session.recorder.note(
            {"rollout/evictions": self.engine.num_evictions, "memory_gib/kv_cache": self.engine.cache_bytes / 2**30}
        )
        rollouts = [*chain(*kept.values()), *rollouts]
        before = sum(len(rollout.token_ids) for responses in begun.values() for rollout in responses)
        self._count_tokens(sum(len(rollout.token_ids) for rollout in rollouts) - before, round_number)
        order = {prompt.key: place for place, prompt in enumerate((*held, *prompts))}
        # Which replica takes which prompt is a matter of time; the order of the prompts is not.
        return sorted(rollouts, key=lambda rollout: order[rollout.prompt_key])

    def _gather_waits(self) -> dict[str, float]:
        """Collective over the data-parallel ranks: return how long replicas have waited for the others in this step."""
        waits = objects.all_gather(sum(self._waits), self.session.context.groups.dp)
        self._waits.clear()
        return {"rollout/wait_s/mean": sum(waits) / len(waits), "rollout/wait_s/max": max(waits)}

    def _count_tokens(self, drawn: int, round_number: int) -> None:
        """Collective over the data-parallel ranks: count the tokens of all replicas in the step so far.

        Args:
            drawn: by this replica in the round.
        """
        replicas = objects.all_gather((drawn, *self.engine.prefill_tokens), self.session.context.groups.dp)
        before = (self.generated_tokens, *self._prefill_tokens) if round_number > 1 else (0, 0, 0)
        self.generated_tokens, computed, separate = (sum(counts) for counts in zip(before, *replicas, strict=True))
        self._prefill_tokens = computed, separate
        self.session.recorder.note({"perf/prefill_tokens": computed, "perf/prefill_tokens_separate": separate})

    def score(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> tuple[list[ScoredRollout], Counter[str]]:
        """Collective over the world: score this replica's rollouts.

        Returns:
            The scored rollouts of this replica, and the reward sums of all.
        """
        session = self.session
        self.calibrator.note()
        scorer = ReplicaScorer(
            self.recipe.reward.changed(model_weight=self.calibrator.value),
            session.context,
            decode=session.tokenizer.decode,
            pool=self.pool,
            reward_model=self.reward_model,
            max_response_tokens=session.recipe.generation.max_response_tokens,
        )
        scored, counts = scorer.score({prompt.key: prompt for prompt in prompts}, rollouts)
        total: Counter[str] = Counter()
        for part in objects.all_gather(counts, session.context.groups.dp):
            total.update(part)
        return scored, total

    def sum_effective_groups(self, prompts: Sequence[Prompt], scored: Sequence[ScoredRollout]) -> int:
        """Collective over the data-parallel ranks: count the groups of all replicas that can teach something.

        Args:
            scored: this replica's responses.
        """
        session = self.session
        mine = count_effective_groups(
            scored,
            prompts,
            effective_by=self.recipe.buffer.effective_by,
            group_size=self.recipe.generation.responses_per_prompt,
            trains_text=session.trains_text,
        )
        return sum(objects.all_gather(mine, session.context.groups.dp))
