"""Settings that are right one by one and wrong together, each with the sentence that says so."""

import re

import pytest

from megatron_r1v2.config.choices import Fp8, Layers, Packing, Part, Precision
from megatron_r1v2.config.combinations import (
    calibration_mistakes,
    claim_mistakes,
    compute_mistakes,
    endpoint_mistakes,
    function_mistakes,
    group_mistakes,
    score_source_mistakes,
    training_mistakes,
    validation_mistakes,
)
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

TE = {"layers": Layers.te, "precision": Precision.bf16}
HELD = HallucinationConfig(target_rate=0.2)
EVALUATED = EvaluationConfig(every_steps=5)
PATTERN = RewardConfig(claim_pattern=r"(?P<name>left) (?P<value>\d)")
SERVED = "http://127.0.0.1:1"


def score_source(weight, **source):
    return score_source_mistakes(RewardConfig(model_weight=weight), RewardModelConfig(**source))


def compute(model=None, parallel=None, generation=None):
    return compute_mistakes(
        ModelConfig(**(model or {})), ParallelConfig(**(parallel or {})), GenerationConfig(**(generation or {}))
    )


def training(train, model=None):
    return training_mistakes(TrainConfig(**train), ModelConfig(**(model or {})))


def own_function(*before, path="reward.py", name="f"):
    return function_mistakes(RewardConfig(functions=[*before, {"path": path, "name": name}]))


def held(data="shards", reward=PATTERN, evaluation=None, settings=HELD):
    return calibration_mistakes(settings, DataConfig(validation=data), evaluation or EVALUATED, reward)


def group(generation=None, train=None):
    return group_mistakes(GenerationConfig(**(generation or {})), TrainConfig(**(train or {})))


@pytest.mark.parametrize(
    ("mistakes", "message"),
    [
        (compute(parallel={"sequence": True}), "parallel.sequence=true .* parallel.tensor=1"),
        (compute(TE | {"precision": Precision.fp32}), "model.layers=te with model.precision=fp32"),
        (compute({"fp8": Fp8.tensorwise}), "model.fp8=tensorwise needs TransformerEngine's layers"),
        (
            compute(TE | {"fp8": Fp8.blockwise}, generation={"cuda_graphs": True}),
            "generation.cuda_graphs=true with model.fp8=blockwise",
        ),
        (training({"parts": []}), "train.parts is empty"),
        (training({"parts": [Part.adapter, Part.adapter]}), "names a part twice"),
        (training({}, TE | {"fp8_weights": True}), "model.fp8_weights=true with model.fp8=none"),
        (
            training({"parts": [Part.language]}, TE | {"fp8": Fp8.tensorwise, "fp8_weights": True}),
            "model.fp8_weights=true with model.fp8=tensorwise and train.parts=.'language'.",
        ),
        (training({"min_learning_rate": 1.0}), "train.min_learning_rate=1.0 is above"),
        (training({"warmup_steps": 200}), "train.warmup_steps=200 is more than train.steps=100"),
        (
            validation_mistakes(EvaluationConfig(every_steps=5), DataConfig()),
            "evaluation.every_steps=5 needs prompts: set data.validation",
        ),
        (
            validation_mistakes(EvaluationConfig(stop_at_pass_at_1=0.5), DataConfig()),
            "evaluation.stop_at_pass_at_1=0.5 is never looked at",
        ),
        (
            claim_mistakes(RewardConfig(consistency_weight=0.5)),
            "reward.consistency_weight=0.5 with an empty reward.claim_pattern",
        ),
        (claim_mistakes(RewardConfig(claim_pattern="(?P<name>a)")), "has no group value"),
        (claim_mistakes(RewardConfig(claim_pattern="a")), "has no group name and value"),
        (claim_mistakes(RewardConfig(claim_pattern="(?P<name>")), "is not a regular expression"),
        (own_function(path="reward.txt"), r"reward.functions\[0\].path='reward.txt' is no Python file"),
        (own_function(name="f()"), r"reward.functions\[0\].name='f\(\)' is no name of a function"),
        (own_function(name="format"), r"reward.functions\[0\].name='format' is the name of another part of the reward"),
        (own_function({"path": "a.py", "name": "f"}), r"reward.functions\[1\].name='f' is the name of another part"),
        (
            score_source(0.5),
            "reward.model_weight=0.5 needs one source of scores, got none; set reward_model.checkpoint",
        ),
        (
            score_source(0.5, checkpoint="a", url=SERVED),
            f"got reward_model.checkpoint='a' and reward_model.url='{SERVED}'",
        ),
        (
            score_source(0.0, checkpoint="a"),
            "reward_model.checkpoint='a' would never be asked while reward.model_weight",
        ),
        (score_source(0.0, url=SERVED), f"reward_model.url='{SERVED}' would never be asked"),
        (score_source(0.5, url="b:80"), "reward_model.url='b:80' is no address"),
        (group({"responses_per_prompt": 1}), "generation.responses_per_prompt=1"),
        (group(train={"updates_per_step": 65}), "train.updates_per_step=65 is more than train.prompts_per_step=64"),
        (held(data=""), "hallucination.target_rate=0.2 needs a rate to hold: set data.validation"),
        (
            held(evaluation=EvaluationConfig()),
            "set data.validation to a folder of shards with facts, and evaluation.every_steps",
        ),
        (held(reward=RewardConfig()), "needs reward.claim_pattern"),
        (
            endpoint_mistakes(EvaluationConfig(endpoint_url="http://127.0.0.1/v1")),
            "evaluation.endpoint_url='http://127.0.0.1/v1' and evaluation.endpoint_model='': set both, or neither",
        ),
        (
            endpoint_mistakes(EvaluationConfig(judge_url="a", judge_model="m")),
            "evaluation.judge_url='a' is not a URL",
        ),
    ],
)
def test_a_mistake_is_told_in_one_sentence(mistakes, message):
    (told,) = mistakes
    assert re.search(message, told)


@pytest.mark.parametrize(
    "mistakes",
    [
        compute(),
        compute(TE | {"fp8": Fp8.blockwise}, {"tensor": 2, "sequence": True}),
        training({}, TE | {"fp8": Fp8.tensorwise, "fp8_weights": True}),
        training({"packing": Packing.nemo, "tokens_per_microbatch": 512}),
        validation_mistakes(EvaluationConfig(every_steps=5, stop_at_pass_at_1=0.5), DataConfig(validation="v")),
        claim_mistakes(RewardConfig(consistency_weight=0.5, claim_pattern=PATTERN.claim_pattern)),
        own_function({"path": "reward.py", "name": "g"}),
        score_source(0.0),
        score_source(0.5, checkpoint="a"),
        score_source(0.5, url="https://127.0.0.1:8001/v1"),
        group(),
        held(),
        held(data="", reward=RewardConfig(), settings=HELD.changed(target_rate=0.0)),
        endpoint_mistakes(EvaluationConfig(endpoint_url="http://127.0.0.1/v1", endpoint_model="m")),
    ],
)
def test_what_fits_together_is_accepted(mistakes):
    assert list(mistakes) == []
