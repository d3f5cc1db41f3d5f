"""Ranges, combinations, paths, and layouts that must fit the model."""

import json
import sys

import pytest
import torch

from megatron_r1v2.config import ranges
from megatron_r1v2.config.hallucination import check_calibration
from megatron_r1v2.config.load import settings_of
from megatron_r1v2.config.pairs import check_pairs
from megatron_r1v2.config.schema import Fp8, Layers, Packing, Part, Precision, RunRecipe, WandbMode
from megatron_r1v2.config.validate import (
    check_grpo,
    check_model_fits,
    check_mpo,
    check_ranges,
    check_stage,
    read_hf_config,
)

# The sizes of QwQ-32B.
QWQ = {
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "num_hidden_layers": 64,
    "max_position_embeddings": 131072,
}


def recipe_with(**values):
    """Return the defaults with `section__key=value` changed."""
    recipe = RunRecipe()
    for name, value in values.items():
        section, key = name.split("__")
        setattr(getattr(recipe, section), key, value)
    return recipe


def test_any_weight_is_something_to_learn_from():
    nothing = {"reward__answer_weight": 0.0, "reward__format_weight": 0.0}
    check_grpo(recipe_with(**nothing, reward__steps_weight=0.1))
    check_grpo(recipe_with(**nothing, reward__model_weight=0.1))


def test_the_defaults_are_valid():
    check_ranges(RunRecipe())
    check_grpo(RunRecipe())
    check_ranges(recipe_with(generation__max_response_tokens=32))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"parallel__tensor": 0}, "parallel.tensor=0 is out of range; accepted: 1 or more"),
        ({"buffer__target_effective_fraction": 1.5}, "accepted: 0 to 1"),
        ({"train__learning_rate": float("nan")}, "train.learning_rate=nan"),
        ({"train__learning_rate": -1.0}, "train.learning_rate=-1"),
        ({"generation__temperature": 0.0}, "generation.temperature=0.0 is out of range; accepted: more than 0"),
        ({"evaluation__top_p": 1.1}, "evaluation.top_p=1.1 is out of range"),
        ({"reward__answer_weight": -0.1}, "reward.answer_weight=-0.1"),
        ({"reward__model_weight": -1.0}, "reward.model_weight=-1.0"),
        ({"reward__model_scale": 0.0}, "reward.model_scale=0.0 is out of range; accepted: more than 0"),
        ({"reward__model_centre": float("nan")}, "reward.model_centre=nan"),
        ({"reward__numeric_tolerance": 1.5}, "reward.numeric_tolerance=1.5 is out of range; accepted: 0 to 1"),
        ({"reward__steps_wanted": 0}, "reward.steps_wanted=0"),
        ({"reward__consistency_weight": 0.5}, "reward.consistency_weight=0.5 with an empty reward.claim_pattern"),
        (
            {"reward__overlong_weight": 0.5, "generation__max_response_tokens": 32},
            "reward.overlong_buffer_tokens=1024 is more than generation.max_response_tokens=32",
        ),
        ({"train__adam_beta2": 1.0}, "train.adam_beta2=1"),
        ({"model__layers": Layers.te, "model__precision": Precision.fp32}, "model.layers=te with model.precision=fp32"),
        ({"model__fp8": Fp8.tensorwise}, "model.fp8=tensorwise needs TransformerEngine's layers"),
        (
            {"model__layers": Layers.te, "model__precision": Precision.bf16, "model__fp8_weights": True},
            "model.fp8_weights=true with model.fp8=none",
        ),
        (
            {
                "model__layers": Layers.te,
                "model__precision": Precision.bf16,
                "model__fp8": Fp8.blockwise,
                "generation__cuda_graphs": True,
            },
            "generation.cuda_graphs=true with model.fp8=blockwise",
        ),
        (
            {"train__packing": Packing.first_fit_decreasing},
            "train.packing=first_fit_decreasing with train.tokens_per_microbatch=0",
        ),
        ({"train__min_learning_rate": 1.0}, "train.min_learning_rate=1.0 is above"),
        ({"train__warmup_steps": 200}, "train.warmup_steps=200 is more than train.steps=100"),
        ({"train__parts": []}, "train.parts is empty"),
        ({"preference__beta": 0.0}, "preference.beta=0.0 is out of range; accepted: more than 0"),
        ({"preference__delta_momentum": 1.0}, "preference.delta_momentum=1 never forgets the start"),
        ({"preference__min_margin": float("nan")}, "preference.min_margin=nan is out of range"),
        ({"train__parts": [Part.adapter, Part.adapter]}, "names a part twice"),
        ({"run__output_dir": " "}, "run.output_dir is empty"),
        ({"generation__stop_tokens": []}, "generation.stop_tokens"),
        ({"logging__wandb": WandbMode.offline, "logging__wandb_project": ""}, "logging.wandb_project is empty"),
        ({"reward__claim_pattern": "(?P<name>a)"}, "has no group value"),
        ({"reward__claim_pattern": "a"}, "has no group name and value"),
        ({"reward__claim_pattern": "(?P<name>"}, "is not a regular expression"),
        ({"parallel__sequence": True}, "parallel.sequence=true .* parallel.tensor=1"),
        ({"evaluation__every_steps": 5}, "evaluation.every_steps=5 needs prompts: set data.validation"),
        ({"evaluation__stop_at_pass_at_1": 0.5}, "evaluation.stop_at_pass_at_1=0.5 is never looked at"),
    ],
)
def test_impossible_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        check_ranges(recipe_with(**values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"generation__top_p": 0.9}, "generation.top_p=0.9"),
        ({"generation__responses_per_prompt": 1}, "generation.responses_per_prompt=1"),
        ({"reward__answer_weight": 0.0, "reward__format_weight": 0.0}, "nothing to learn"),
        ({"train__updates_per_step": 1000}, "train.updates_per_step=1000 is more than the 512 responses"),
    ],
)
def test_grpo_refuses_what_it_cannot_learn_from(values, message):
    check_ranges(recipe_with(**values))
    with pytest.raises(ValueError, match=message):
        check_grpo(recipe_with(**values))


def test_mpo_needs_a_term():
    check_mpo(RunRecipe())
    names = ("preference_weight", "quality_weight", "generation_weight")
    for kept in names:
        check_mpo(recipe_with(**{f"preference__{name}": 0.0 for name in names if name != kept}))
    with pytest.raises(ValueError, match="preference.generation_weight are all 0: nothing to learn"):
        check_mpo(recipe_with(**{f"preference__{name}": 0.0 for name in names}))


@pytest.mark.parametrize(
    ("tensor", "pipeline", "first", "message"),
    [
        (8, 1, 0, None),
        (4, 4, 0, None),
        (2, 4, 4, None),
        (3, 1, 0, r"parallel.tensor=3 does not divide the language model's 40 attention heads.*1, 2, 4, 5, 8"),
        (1, 3, 0, "parallel.pipeline=3 does not divide the language model's 64 layers"),
        (1, 1, 4, "parallel.first_stage_layers=4 needs more than one pipeline stage"),
        (1, 4, 5, "parallel.first_stage_layers=5 leaves 59 of 64 layers for 3 further stages"),
        (1, 2, 64, "parallel.first_stage_layers=64 leaves none"),
    ],
)
def test_the_layout_must_fit_the_language_model(tensor, pipeline, first, message):
    hf_config = {"text_config": QWQ}
    recipe = recipe_with(parallel__tensor=tensor, parallel__pipeline=pipeline, parallel__first_stage_layers=first)
    if message is None:
        check_model_fits(recipe, hf_config)
        return
    with pytest.raises(ValueError, match=message):
        check_model_fits(recipe, hf_config)


def test_key_value_heads_may_be_copied_but_not_cut():
    text = QWQ | {"intermediate_size": 27640}
    check_model_fits(recipe_with(parallel__tensor=40), {"text_config": text})  # each of the 8 on 5 ranks
    with pytest.raises(ValueError, match="parallel.tensor=20 and the language model's 8 key-value heads"):
        check_model_fits(recipe_with(parallel__tensor=20), {"text_config": text})


def test_ffn_and_hidden_size_must_divide_too():
    recipe = recipe_with(parallel__tensor=4)
    with pytest.raises(ValueError, match="27650 feed-forward channels"):
        check_model_fits(recipe, {"text_config": QWQ | {"intermediate_size": 27650}})


def test_prompt_and_response_must_fit_the_positions():
    recipe = recipe_with(data__max_prompt_tokens=131072 - 8192 + 1)
    with pytest.raises(ValueError, match="= 131073, but the model has 131072 positions"):
        check_model_fits(recipe, {"text_config": QWQ})
    check_model_fits(recipe_with(data__max_prompt_tokens=131072 - 8192), {"text_config": QWQ})


def test_a_configuration_without_sizes_is_refused():
    with pytest.raises(ValueError, match="lacks hidden_size"):
        check_model_fits(RunRecipe(), {"text_config": {}})


def test_the_layout_of_chat_models_is_refused_with_the_command_that_converts_it():
    with pytest.raises(
        ValueError, match=r"checkpoint_tools.hf_to_hf --hf chat --output FOLDER, then set model.hf_path"
    ):
        check_model_fits(recipe_with(model__hf_path="chat"), {"llm_config": QWQ, "vision_config": {}})


def test_each_stage_needs_its_files(tmp_path):
    model, shards = tmp_path / "model", tmp_path / "shards"
    model.mkdir()
    with pytest.raises(ValueError, match="model.hf_path is not set; the grpo stage needs it"):
        check_stage(RunRecipe(), "grpo")
    with pytest.raises(ValueError, match="evaluation.data is not set; the evaluate stage needs it"):
        check_stage(recipe_with(model__hf_path=str(model)), "evaluate")
    recipe = recipe_with(model__hf_path=str(model), data__train=str(shards))
    with pytest.raises(ValueError, match="data.train='.*shards' is not a folder"):
        check_stage(recipe, "align")
    elsewhere = {"evaluation__endpoint_url": "http://127.0.0.1:8000/v1", "evaluation__endpoint_model": "served"}
    check_stage(
        recipe_with(evaluation__data=str(model), model__hf_path="gone", data__train="gone", **elsewhere), "evaluate"
    )
    with pytest.raises(ValueError, match="evaluation.data='gone' is not a folder"):
        check_stage(recipe_with(evaluation__data="gone", **elsewhere), "evaluate")
    shards.mkdir()
    with pytest.raises(ValueError, match=r"has no config.json; give the folder of a whole model"):
        check_stage(recipe, "align")
    (model / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="is not valid JSON"):
        read_hf_config(model)
    (model / "config.json").write_text(json.dumps({"text_config": QWQ}), encoding="utf-8")
    check_stage(recipe, "align")
    recipe.parallel.tensor = 3
    with pytest.raises(ValueError, match="parallel.tensor=3"):
        check_stage(recipe, "grpo")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_graphs_need_a_cuda_device(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"text_config": QWQ}), encoding="utf-8")
    recipe = recipe_with(model__hf_path=str(tmp_path), data__train=str(tmp_path), generation__cuda_graphs=True)
    with pytest.raises(ValueError, match="generation.cuda_graphs=true needs a CUDA device and there is none"):
        check_stage(recipe, "grpo")


def test_transformer_engine_must_be_installed(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"text_config": QWQ}), encoding="utf-8")
    recipe = recipe_with(model__hf_path=str(tmp_path), data__train=str(tmp_path), model__layers=Layers.te)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ValueError, match="model.layers=te needs TransformerEngine"):
        check_stage(recipe, "grpo")


@pytest.mark.parametrize(
    ("tensor", "sequence", "fp8", "dimension"),
    [
        (1, False, Fp8.tensorwise, None),
        (8, True, Fp8.blockwise, None),
        (8, True, Fp8.tensorwise, None),
        (5, True, Fp8.blockwise, "does not divide the language model"),
    ],
)
def test_fp8_fits_qwq_at_the_usual_layouts(tensor, sequence, fp8, dimension):
    recipe = recipe_with(
        model__layers=Layers.te,
        model__fp8=fp8,
        parallel__tensor=tensor,
        parallel__sequence=sequence,
        data__max_prompt_tokens=100,
        generation__max_response_tokens=100,
    )
    if dimension is None:
        check_model_fits(recipe, {"text_config": QWQ})
    else:
        with pytest.raises(ValueError, match=dimension):
            check_model_fits(recipe, {"text_config": QWQ})


def test_an_fp8_dimension_that_does_not_fit_is_named():
    recipe = recipe_with(
        model__layers=Layers.te,
        model__fp8=Fp8.tensorwise,
        parallel__tensor=8,
        data__max_prompt_tokens=100,
        generation__max_response_tokens=100,
    )
    narrow = {**QWQ, "intermediate_size": 8 * 100}
    with pytest.raises(ValueError, match=r"multiple of 16, but the language model has 100 feed-forward channels"):
        check_model_fits(recipe, {"text_config": narrow})


def test_every_checked_name_is_a_setting():
    names = {f"{section}.{key}" for section, kind in settings_of(RunRecipe).items() for key in settings_of(kind)}
    assert set(ranges.RANGES) <= names
    numbers = {
        f"{section}.{key}"
        for section, kind in settings_of(RunRecipe).items()
        for key, expected in settings_of(kind).items()
        if expected in (int, float)
    }
    assert numbers == set(ranges.RANGES) | set(ranges.POSITIVE), "a number without a range"


HELD = {
    "hallucination__target_rate": 0.2,
    "hallucination__every_steps": 5,
    "data__validation": "shards",
    "reward__claim_pattern": r"(?P<name>left) (?P<value>\d)",
}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data__validation": ""}, "hallucination.target_rate=0.2 needs a rate to hold: set data.validation"),
        ({"hallucination__every_steps": 0}, "hallucination.every_steps or evaluation.every_steps"),
        ({"reward__claim_pattern": ""}, "needs reward.claim_pattern"),
    ],
)
def test_holding_the_hallucination_rate_needs_a_measurement(values, message):
    check_calibration(recipe_with(**HELD), "model_weight", 0.5)
    evaluated = HELD | {"hallucination__every_steps": 0, "evaluation__every_steps": 5}
    check_calibration(recipe_with(**evaluated), "min_margin", 0.0)
    with pytest.raises(ValueError, match=message):
        check_calibration(recipe_with(**HELD | values), "model_weight", 0.5)
    check_calibration(recipe_with(**HELD | values | {"hallucination__target_rate": 0.0}), "model_weight", 0.5)


def test_holding_the_hallucination_rate_needs_something_to_move():
    recipe = recipe_with(**HELD, hallucination__min_model_weight=0.1, hallucination__max_margin=0.6)
    check_calibration(recipe, "model_weight", 0.11)
    check_calibration(recipe, "min_margin", 0.59)
    with pytest.raises(ValueError, match="lowers reward.model_weight, but it is 0.1 and"):
        check_calibration(recipe, "model_weight", 0.1)
    with pytest.raises(ValueError, match="raises preference.min_margin, but it is 0.6 and"):
        check_calibration(recipe, "min_margin", 0.6)


def test_pairs_need_a_place_and_something_to_compare(tmp_path):
    check_pairs(recipe_with(pairs__output=str(tmp_path / "new")))
    with pytest.raises(ValueError, match="exists already; choose another folder or delete it first"):
        check_pairs(recipe_with(pairs__output=str(tmp_path)))
    with pytest.raises(ValueError, match="responses_per_prompt=1 leaves nothing to compare"):
        check_pairs(recipe_with(pairs__output="new", generation__responses_per_prompt=1))
    alone = {"pairs__output": "new", "pairs__max_pairs_per_prompt": 0}
    check_pairs(recipe_with(**alone, generation__responses_per_prompt=1))
    with pytest.raises(ValueError, match="are both 0: there would be no pairs"):
        check_pairs(recipe_with(**alone, pairs__dropout_ntp_fraction=0.0))
