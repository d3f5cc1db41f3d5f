"""Checks of sections and of their combinations, beyond the bounds of single settings; one sentence for each mistake."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping

from megatron_r1v2.config.choices import Fp8, Layers, Part, Precision
from megatron_r1v2.config.schema import (
    DataConfig,
    EvaluationConfig,
    GenerationConfig,
    HallucinationConfig,
    ModelConfig,
    ParallelConfig,
    RewardConfig,
    RewardModelConfig,
    TrainConfig,
)


def compute_mistakes(model: ModelConfig, parallel: ParallelConfig, generation: GenerationConfig) -> Iterator[str]:
    """Check layers, precision and layout."""
    if parallel.sequence and parallel.tensor == 1:
        yield (
            "parallel.sequence=true splits activations over tensor-parallel ranks but parallel.tensor=1; "
            "set parallel.tensor to 2 or more, or parallel.sequence=false"
        )
    if model.layers is Layers.te and model.precision is Precision.fp32:
        yield (
            "model.layers=te with model.precision=fp32: TransformerEngine's fused attention has no fp32; "
            "set model.precision=bf16 or model.layers=local"
        )
    if model.fp8 is not Fp8.none and model.layers is not Layers.te:
        yield (
            f"model.fp8={model.fp8.value} needs TransformerEngine's layers but model.layers={model.layers.value}; "
            "set model.layers=te, or model.fp8=none"
        )
    if generation.cuda_graphs is True and model.fp8 is Fp8.blockwise:
        yield (
            "generation.cuda_graphs=true with model.fp8=blockwise: each rank needs blocks of 128 tokens, more than the "
            "64 requests that megatron-core's graphs are cut to; set model.fp8=tensorwise or "
            "generation.cuda_graphs=false"
        )


def training_mistakes(train: TrainConfig, model: ModelConfig) -> Iterator[str]:
    """Check what trains, and the schedule."""
    parts = [part.value for part in train.parts]
    accepted = ", ".join(part.name for part in Part)
    if not parts:
        yield f"train.parts is empty: nothing would be trained; accepted: one or more of {accepted}"
    if len(set(parts)) != len(parts):
        yield f"train.parts={parts} names a part twice; accepted: each of {accepted} once"
    if model.fp8_weights and (model.fp8 is Fp8.none or Part.language in train.parts):
        yield (
            f"model.fp8_weights=true with model.fp8={model.fp8.value} and train.parts={parts}: it keeps a frozen "
            "language model in 8 bits; set model.fp8, take language out of train.parts, or set model.fp8_weights=false"
        )
    if train.min_learning_rate > train.learning_rate:
        yield (
            f"train.min_learning_rate={train.min_learning_rate} is above train.learning_rate={train.learning_rate}; "
            "lower it"
        )
    if train.warmup_steps > train.steps:
        yield f"train.warmup_steps={train.warmup_steps} is more than train.steps={train.steps}; lower it"


def validation_mistakes(evaluation: EvaluationConfig, data: DataConfig) -> Iterator[str]:
    """Check that validation while a stage runs has prompts, and that its goal is looked at."""
    if evaluation.every_steps and not data.validation:
        yield (
            f"evaluation.every_steps={evaluation.every_steps} needs prompts: set data.validation to a folder of "
            "shards, or evaluation.every_steps=0"
        )
    if evaluation.stop_at_pass_at_1 and not evaluation.every_steps:
        yield (
            f"evaluation.stop_at_pass_at_1={evaluation.stop_at_pass_at_1} is never looked at while "
            "evaluation.every_steps=0; set evaluation.every_steps"
        )


def claim_mistakes(reward: RewardConfig) -> Iterator[str]:
    """Check the pattern that finds claims, and that there is one where claims count."""
    pattern = reward.claim_pattern
    if reward.consistency_weight and not pattern:
        yield (
            f"reward.consistency_weight={reward.consistency_weight} with an empty reward.claim_pattern: no claim would "
            r"ever be found; give a pattern, e.g. (?P<name>left|right) (?P<value>\d), or set the weight to 0"
        )
    if not pattern:
        return
    try:
        groups = re.compile(pattern).groupindex
    except re.error as error:
        yield f"reward.claim_pattern={pattern!r} is not a regular expression: {error}"
        return
    if missing := {"name", "value"} - set(groups):
        yield (
            f"reward.claim_pattern={pattern!r} has no group {' and '.join(sorted(missing))}; "
            r"it needs both, e.g. (?P<name>left|right) (?P<value>\d)"
        )


def function_mistakes(reward: RewardConfig) -> Iterator[str]:
    """Check the names and files of own reward functions."""
    taken = set(RewardConfig().weights)
    for place, function in enumerate(reward.functions):
        setting = f"reward.functions[{place}]"
        if not function.path.endswith(".py"):
            yield f"{setting}.path={function.path!r} is no Python file; give the path of one, such as reward.py"
        if not function.name.isidentifier():
            yield f"{setting}.name={function.name!r} is no name of a function; give the name it has in its file"
        if function.name in taken:
            yield f"{setting}.name={function.name!r} is the name of another part of the reward; rename the function"
        taken.add(function.name)


def score_source_mistakes(reward: RewardConfig, reward_model: RewardModelConfig) -> Iterator[str]:
    """Check that scores come from one place when they count, and from none when they do not."""
    weight = reward.model_weight
    given = [
        f"reward_model.{name}={value!r}" for name in ("checkpoint", "url") if (value := getattr(reward_model, name))
    ]
    if weight > 0 and len(given) != 1:
        yield (
            f"reward.model_weight={weight:g} needs one source of scores, got {' and '.join(given) or 'none'}; set "
            "reward_model.checkpoint to a checkpoint of the reward_model stage, or reward_model.url to a server"
        )
    if weight == 0 and given:
        yield (
            f"{' and '.join(given)} would never be asked while reward.model_weight=0; raise the weight, or leave the "
            "source empty"
        )
    if reward_model.url and not re.fullmatch(r"https?://[^\s/]+(/\S*)?", reward_model.url):
        yield f"reward_model.url={reward_model.url!r} is no address of a server; accepted: e.g. http://127.0.0.1:8001"


def group_mistakes(generation: GenerationConfig, train: TrainConfig) -> Iterator[str]:
    """Check that a group of responses can be compared, and that each update has one."""
    if generation.responses_per_prompt < 2:
        yield (
            f"generation.responses_per_prompt={generation.responses_per_prompt} leaves nothing to compare within a "
            "group; GRPO needs 2 or more"
        )
    if train.updates_per_step > train.prompts_per_step:
        yield (
            f"train.updates_per_step={train.updates_per_step} is more than train.prompts_per_step="
            f"{train.prompts_per_step}, and the responses to a prompt are trained together; lower it"
        )


def calibration_mistakes(
    hallucination: HallucinationConfig, data: DataConfig, evaluation: EvaluationConfig, reward: RewardConfig
) -> Iterator[str]:
    """Check what holding the hallucination rate needs, when it is wanted."""
    if not hallucination.target_rate:
        return
    needed = f"hallucination.target_rate={hallucination.target_rate}"
    if not data.validation or not evaluation.every_steps:
        yield (
            f"{needed} needs a rate to hold: set data.validation to a folder of shards with facts, and "
            "evaluation.every_steps"
        )
    if not reward.claim_pattern:
        yield f"{needed} needs reward.claim_pattern: without it no claim is found"


def endpoint_mistakes(evaluation: EvaluationConfig) -> Iterator[str]:
    """Check where the evaluated model and the judge are served."""
    for kind in ("endpoint", "judge"):
        url, model = getattr(evaluation, f"{kind}_url"), getattr(evaluation, f"{kind}_model")
        if bool(url) != bool(model):
            yield f"evaluation.{kind}_url={url!r} and evaluation.{kind}_model={model!r}: set both, or neither"
        if url and not re.match(r"https?://[^/]+", url):
            yield (
                f"evaluation.{kind}_url={url!r} is not a URL; accepted: the base of an OpenAI-compatible server, such "
                "as http://127.0.0.1:8000/v1"
            )


CHECKS: Mapping[Callable[..., Iterator[str]], tuple[str, ...]] = {
    check: tuple(inspect.signature(check).parameters)
    for check in (
        compute_mistakes,
        training_mistakes,
        validation_mistakes,
        claim_mistakes,
        function_mistakes,
        score_source_mistakes,
        calibration_mistakes,
        endpoint_mistakes,
    )
}
"""The checks of every recipe that has their sections, which are the names of their parameters."""
