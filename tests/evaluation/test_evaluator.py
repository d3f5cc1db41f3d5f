"""An evaluation over two replicas: every prompt is answered once a run, and every rank has the same result."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_r1v2.config.schema import EvaluationConfig, ParallelConfig, RewardConfig
from megatron_r1v2.evaluation.evaluator import Evaluator
from megatron_r1v2.evaluation.pass_at_1 import EVALUATION_SEED
from megatron_r1v2.parallel import groups
from megatron_r1v2.rewards.verifiers import VerifierPool
from megatron_r1v2.types import Prompt, Rollout
from tests.ranks import run_ranks

RUNS = 3
KEYS = [f"q-{number}" for number in (3, 1, 2, 5, 4)]


def prompt(key: str) -> Prompt:
    tiles = torch.zeros(0, 3, 4, 4, dtype=torch.uint8)
    messages = ({"role": "user", "content": "?"},)
    return Prompt(key, messages, (1,), tiles, answer="8", answer_type="numeric", alternatives=("nine",))


class ScriptedEngine:
    """An engine that answers "8" in run 0 and "nine" in run 1, for odd prompts of the queue that it is given."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.seen: list[str] = []

    def generate(self, queue, sampling, *, features, progress):
        self.asked.append(sampling)
        rollouts = []
        for one in queue:
            self.seen.append(one.key)
            for run in reversed(range(sampling.num_responses)):
                right = int(one.key[-1]) % 2 == 1 and run < 2
                token = run if right else 2
                rollouts.append(Rollout(one.key, run, (token, 9), (0.0, 0.0), policy_version=0, finish_reason="stop"))
        if progress is not None:
            progress(len(rollouts), 2 * len(rollouts))
        return rollouts


def evaluate() -> dict[str, Any]:
    context = groups.initialize(ParallelConfig(), seed=1)
    engine, waited, told = ScriptedEngine(), [], []
    pool = VerifierPool(1, 20.0) if context.is_replica_leader else None
    evaluator = Evaluator(
        engine=engine,
        features=SimpleNamespace(),
        settings=EvaluationConfig(runs=RUNS, temperature=0.6, top_p=0.9),
        # Without a reward model its weight must not count.
        reward=RewardConfig(model_weight=0.5),
        pool=pool,
        decode=lambda ids: f"x</think>\\boxed{{{('8', 'nine', 'wrong')[ids[0]]}}}",
        context=context,
        max_response_tokens=7,
        progress=lambda responses, tokens: told.append(responses),
        wait_for_all=waited.append,
    )
    try:
        result = evaluator.run([prompt(key) for key in KEYS], name="after", step=12)
        scored = evaluator.respond([prompt(key) for key in KEYS[:2]], name="more", step=12)
    finally:
        if pool is not None:
            pool.close()
    order = [(one.rollout.prompt_key, one.rollout.sample_index) for one in scored]
    return {
        "result": result, "order": order, "seen": engine.seen, "asked": engine.asked, "waited": waited, "told": told,
    }  # fmt: skip


def test_two_replicas_share_the_prompts_and_agree_on_the_result():
    first, second = run_ranks(2, evaluate)
    result = first["result"]
    assert result == second["result"]
    # 8 by the answer in run 0, "nine" as an alternative in run 1, nothing in run 2; for three of five prompts.
    assert result.runs == (0.6, 0.6, 0.0)
    assert (result.num_prompts, result.step, result.mean_response_tokens) == (5, 12, 2.0)
    assert (result.temperature, result.top_p, result.seed, result.judged) == (0.6, 0.9, EVALUATION_SEED, 0)
    assert sorted(first["seen"] + second["seen"]) == sorted(KEYS + KEYS[:2]), "each prompt by one replica"
    expected = [(key, run) for key in KEYS[:2] for run in range(RUNS)]
    assert first["order"] == second["order"] == expected
    assert first["waited"] == ["evaluated-after-12", "evaluated-more-12"]
    assert sum(first["told"] + second["told"]) == RUNS * 7
    sampling = first["asked"][0]
    assert (sampling.num_responses, sampling.policy_version, sampling.seed) == (RUNS, 0, EVALUATION_SEED)
    assert (sampling.temperature, sampling.top_p, sampling.max_response_tokens) == (0.6, 0.9, 7)


def test_a_prompt_without_an_answer_is_refused_before_anything_is_generated():
    evaluator = Evaluator(
        engine=None, features=None, settings=EvaluationConfig(), reward=RewardConfig(), pool=None,
        decode=str, context=SimpleNamespace(), max_response_tokens=7,
    )  # fmt: skip
    with pytest.raises(ValueError, match="prompt 'q-2' has no answer, which an evaluation compares"):
        evaluator.respond([prompt("q-1"), replace(prompt("q-2"), answer="")], name="a", step=0)
