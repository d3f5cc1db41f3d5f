"""The responses of a model to an evaluation set, generated and scored over all replicas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_r1v2.config.schema import EvaluationConfig, RewardConfig
from megatron_r1v2.data.samples import ShardSample
from megatron_r1v2.evaluation.pass_at_1 import EVALUATION_SEED, Conditions, EvaluationResult, evaluate_outcomes
from megatron_r1v2.evaluation.response_rows import evaluation_rows, outcome_of
from megatron_r1v2.generation.engine import Progress, RolloutEngine, Sampling
from megatron_r1v2.generation.features import FeatureCache
from megatron_r1v2.generation.queue import SharedPromptQueue
from megatron_r1v2.parallel import objects
from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.rewards.replica import ReplicaScorer
from megatron_r1v2.rewards.verifiers import VerifierPool
from megatron_r1v2.types import Prompt, ScoredRollout

# Evaluations share their random numbers, so the weights' version must not change them.
_VERSION = 0


@dataclass(frozen=True)
class Evaluator:
    """The model, the rules and the ranks of an evaluation; the prompts come with each call."""

    engine: RolloutEngine
    features: FeatureCache
    settings: EvaluationConfig
    reward: RewardConfig
    pool: VerifierPool | None
    decode: Callable[[Sequence[int]], str]
    context: ParallelContext
    max_response_tokens: int
    progress: Progress | None = None
    """Called with (responses finished, tokens in them) of this replica after each step, where a call has none."""
    wait_for_all: Callable[[str], None] | None = None
    """Called, with the name of the place, when this replica has generated, and others may not have."""

    def run(self, prompts: Sequence[Prompt], *, name: str, step: int) -> EvaluationResult:
        """Collective over all ranks: evaluate by the rules alone, without a judge; return the result on every rank.

        Args:
            prompts: the same on every rank.
            step: training steps behind the weights.
        """
        scored = self.respond(prompts, name=name, step=step)
        outcomes = None
        if self.context.is_main:
            rows = evaluation_rows(prompts, scored, step=step, pictures=False)
            outcomes = [outcome_of(row) for row in rows]
        return evaluate_outcomes(
            name,
            [prompt.key for prompt in prompts],
            objects.all_gather(outcomes)[0] or [],
            Conditions(self.settings.temperature, self.settings.top_p, EVALUATION_SEED, step),
        )

    def respond(
        self, prompts: Sequence[Prompt], *, name: str, step: int, progress: Progress | None = None
    ) -> list[ScoredRollout]:
        """Collective over all ranks: generate and score responses.

        Args:
            prompts: the same on every rank.
            name: never used before at this step.
            progress: called with (responses finished, tokens in them) of this replica after every engine step.

        Returns:
            `evaluation.runs` responses to each prompt, on every rank, ordered by prompt and run.

        Raises:
            ValueError: a prompt has no answer.
        """
        check_answered(prompts)
        queue = SharedPromptQueue(prompts, context=self.context, name=f"evaluate-{name}-{step}")
        rollouts = self.engine.generate(
            queue,
            Sampling(
                num_responses=self.settings.runs,
                policy_version=_VERSION,
                temperature=self.settings.temperature,
                top_p=self.settings.top_p,
                max_response_tokens=self.max_response_tokens,
                seed=EVALUATION_SEED,
            ),
            features=self.features,
            progress=progress or self.progress,
        )
        # The gathers below would wait for a lost rank without saying which one it is.
        if self.wait_for_all is not None:
            self.wait_for_all(f"evaluated-{name}-{step}")
        by_key = {prompt.key: prompt for prompt in prompts}
        scorer = ReplicaScorer(
            # The rules alone: no rate depends on a reward model, and none is loaded here.
            self.reward.changed(model_weight=0.0),
            self.context,
            decode=self.decode,
            pool=self.pool,
            reward_model=None,
            max_response_tokens=self.max_response_tokens,
        )
        mine, _ = scorer.score(by_key, rollouts)
        order = {prompt.key: index for index, prompt in enumerate(prompts)}
        # Sorted: which replica generated a response depends on how fast each was.
        scored = [response for part in objects.all_gather(mine, self.context.groups.dp) for response in part]
        scored.sort(key=lambda response: (order[response.rollout.prompt_key], response.rollout.sample_index))
        return scored


def check_answered(prompts: Sequence[Prompt | ShardSample]) -> None:
    """Raise ValueError where a prompt has no answer: Pass@1 compares answers, whatever else judges a response."""
    if missing := [prompt.key for prompt in prompts if not prompt.answer]:
        raise ValueError(f"prompt {missing[0]!r} has no answer, which an evaluation compares; take it out")
