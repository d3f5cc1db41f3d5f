"""Evaluation of a model behind an OpenAI-compatible server: no model is loaded here, no process group is started."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from megatron_r1v2.config.recipes import EvaluateRecipe
from megatron_r1v2.config.schema import EvaluationConfig, RewardConfig
from megatron_r1v2.data.images import decode_image
from megatron_r1v2.data.messages import openai_messages
from megatron_r1v2.data.samples import ShardSample, parse_sample
from megatron_r1v2.data.shards import check_shards
from megatron_r1v2.data.stream import read_shards
from megatron_r1v2.evaluation.chat_endpoint import ChatEndpoint, Completion
from megatron_r1v2.evaluation.evaluator import check_answered
from megatron_r1v2.evaluation.pass_at_1 import EVALUATION_SEED, EvaluationResult, evaluation_path
from megatron_r1v2.evaluation.response_log import ResponseRow
from megatron_r1v2.evaluation.response_rows import Evaluation, evaluation_rows
from megatron_r1v2.evaluation.rollout_records import images_base64
from megatron_r1v2.monitoring.progress import progress_bar
from megatron_r1v2.rewards.score import score_rollouts
from megatron_r1v2.rewards.verifiers import TIMEOUT_SECONDS, VerifierPool, worker_count
from megatron_r1v2.types import Prompt, Rollout

Place = tuple[ShardSample, int]
"""A sample and the run that a response belongs to."""


def run_endpoint_evaluation(recipe: EvaluateRecipe, name: str) -> EvaluationResult:
    """Evaluate `evaluation.endpoint_model` on `evaluation.data`, or go on with an evaluation that was interrupted.

    Args:
        name: of the evaluation; `evaluation-NAME.json` and its responses go to `run.output_dir`.

    Raises:
        EndpointFailed: the endpoint or the judge gives no answer; what was answered before is kept.
        ValueError: bad data, or an evaluation of this name with other settings, finished or interrupted.
    """
    settings, reward = recipe.evaluation, recipe.reward
    max_tokens = recipe.generation.max_response_tokens
    evaluation_path(Path(recipe.run.output_dir), name)  # refuses a bad name before anything is read
    fraction = recipe.data.max_corrupt_fraction
    samples = list(read_shards(settings.data, parse_sample, max_corrupt_fraction=fraction, count=settings.prompts))
    check_answered(samples)
    endpoint = ChatEndpoint.from_settings(settings, "endpoint")
    evaluation = Evaluation(
        name,
        Path(recipe.run.output_dir),
        settings,
        reward,
        max_tokens,
        model=endpoint.model,
        step=0,
        available=sum(check_shards(settings.data).values()),
    )
    log = evaluation.open_log()
    with VerifierPool(worker_count(), TIMEOUT_SECONDS) as pool:
        places = [(sample, index) for sample in samples for index in range(settings.runs)]
        missing = [(sample, index) for sample, index in places if (sample.key, index) not in log.places]
        with progress_bar("evaluate", len(places), shown=True) as show:
            show(len(places) - len(missing))
            answers = endpoint.ask_all(missing, lambda place: chat_request(place, settings, max_tokens), about=_about)
            for done, (place, completion) in enumerate(answers, start=len(places) - len(missing) + 1):
                log.append([_row(place, completion, reward, pool)])
                show(done)
    return evaluation.conclude([sample.key for sample in samples], log)


def chat_request(place: Place, settings: EvaluationConfig, max_tokens: int) -> dict[str, object]:
    """Return the body of the request for one response, less the model's name.

    Args:
        place: sample and run; they and `EVALUATION_SEED` decide the request's seed.
    """
    sample, index = place
    seed = hashlib.sha256(f"{EVALUATION_SEED}/{sample.key}/{index}".encode()).digest()
    return {
        "messages": openai_messages(sample.messages, list(sample.images.values())),
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "max_tokens": max_tokens,
        # Servers differ in the seeds they accept: 31 bits are accepted by all.
        "seed": int.from_bytes(seed[:4], "big") >> 1,
    }


def _about(place: Place) -> str:
    return place[0].key


def _row(place: Place, completion: Completion, reward: RewardConfig, pool: VerifierPool) -> ResponseRow:
    sample, index = place
    prompt = _prompt(sample)
    rollout = Rollout(
        prompt_key=sample.key,
        sample_index=index,
        token_ids=(),
        rollout_log_probs=(),
        policy_version=0,
        finish_reason="stop" if completion.finish_reason == "stop" else "length",
    )
    # Answer, format and claims alone: the other parts of a reward need token ids, which an endpoint does not give.
    rules = RewardConfig(
        answer_weight=reward.answer_weight,
        format_weight=reward.format_weight,
        claim_pattern=reward.claim_pattern,
    )
    scored, _ = score_rollouts(
        {sample.key: prompt},
        [rollout],
        [completion.text],
        settings=rules,
        pool=pool,
        max_response_tokens=1,  # of no part that is scored here
    )
    (row,) = evaluation_rows([prompt], scored, step=0)
    row |= {"finish_reason": completion.finish_reason, "response_tokens": completion.tokens}
    return row | {"image_png": _picture(sample) if index == 0 else None}


def _prompt(sample: ShardSample) -> Prompt:
    """Return a prompt for the rules alone; tokens and tiles are the server's business."""
    return Prompt(
        key=sample.key,
        messages=sample.messages,
        token_ids=(),
        tiles_TCHW=torch.zeros(0, 3, 1, 1, dtype=torch.uint8),
        answer=sample.answer,
        answer_type=sample.answer_type,
        facts=sample.facts,
        alternatives=sample.alternatives,
        tolerances=sample.tolerances,
        metadata=sample.metadata,
    )


def _picture(sample: ShardSample) -> str | None:
    return images_base64([decode_image(data, f"{sample.key}.{name}") for name, data in sample.images.items()])
