"""The checks at the start of a command: files, libraries, devices, and sizes that must fit the model."""

import json
import sys

import pytest
import torch

from megatron_r1v2.config.choices import Fp8, Layers
from megatron_r1v2.config.recipes import AlignRecipe, EvaluateRecipe, GrpoRecipe, PairsRecipe, ServeRecipe
from megatron_r1v2.config.schema import EvaluationConfig
from megatron_r1v2.config.validate import check_model_fits, check_start, read_hf_config

# The sizes of QwQ-32B.
QWQ = {
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "num_hidden_layers": 64,
    "max_position_embeddings": 131072,
}


def recipe_with(kind=GrpoRecipe, **values):
    """Return the defaults of a stage with `section__key=value` changed."""
    recipe = kind()
    for name, value in values.items():
        section, key = name.split("__")
        recipe = recipe.changed(**{section: getattr(recipe, section).changed(**{key: value})})
    return recipe


def test_each_stage_needs_its_files(tmp_path):
    model, shards = tmp_path / "model", tmp_path / "shards"
    model.mkdir()
    with pytest.raises(ValueError, match="model.hf_path is not set; the grpo stage needs it"):
        check_start(GrpoRecipe())
    with pytest.raises(ValueError, match="evaluation.data is not set; the evaluate stage needs it"):
        check_start(recipe_with(EvaluateRecipe, model__hf_path=str(model)))
    recipe = recipe_with(AlignRecipe, model__hf_path=str(model), data__train=str(shards))
    with pytest.raises(ValueError, match="data.train='.*shards' is not a folder"):
        check_start(recipe)
    served = EvaluationConfig(endpoint_url="http://127.0.0.1:8000/v1", endpoint_model="served", data=str(model))
    elsewhere = recipe_with(EvaluateRecipe, model__hf_path="gone", data__train="gone").changed(evaluation=served)
    check_start(elsewhere)
    with pytest.raises(ValueError, match="evaluation.data='gone' is not a folder"):
        check_start(elsewhere.changed(evaluation=served.changed(data="gone")))
    shards.mkdir()
    with pytest.raises(ValueError, match=r"has no config.json; give the folder of a whole model"):
        check_start(recipe)
    (model / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="is not valid JSON"):
        read_hf_config(model)
    (model / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"is not valid JSON of a model \(a list\)"):
        read_hf_config(model / "config.json")
    damaged = {**QWQ, "hidden_size": "5120"}, {**QWQ, "head_dim": []}, {**QWQ, "num_attention_heads": 0}
    for text in damaged:  # refused by name where the model is read
        check_model_fits(recipe, {"text_config": text})
    (model / "config.json").write_text(json.dumps({"text_config": QWQ}), encoding="utf-8")
    check_start(recipe)
    check_start(recipe_with(ServeRecipe, model__hf_path=str(model), data__train="gone"))
    with pytest.raises(ValueError, match="parallel.tensor=3"):
        check_start(recipe.changed(parallel=recipe.parallel.changed(tensor=3)))


def test_pairs_need_a_place_that_is_free(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"text_config": QWQ}), encoding="utf-8")
    recipe = recipe_with(
        PairsRecipe, model__hf_path=str(tmp_path), data__train=str(tmp_path), run__output_dir=str(tmp_path / "new")
    )
    check_start(recipe)
    with pytest.raises(ValueError, match="exists already; choose another folder or delete it first"):
        check_start(recipe.changed(run=recipe.run.changed(output_dir=str(tmp_path))))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_graphs_need_a_cuda_device(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"text_config": QWQ}), encoding="utf-8")
    recipe = recipe_with(model__hf_path=str(tmp_path), data__train=str(tmp_path), generation__cuda_graphs=True)
    with pytest.raises(ValueError, match="generation.cuda_graphs=true needs a CUDA device and there is none"):
        check_start(recipe)


def test_transformer_engine_must_be_installed(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"text_config": QWQ}), encoding="utf-8")
    recipe = recipe_with(model__hf_path=str(tmp_path), data__train=str(tmp_path), model__layers=Layers.te)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ValueError, match="model.layers=te needs TransformerEngine"):
        check_start(recipe)


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


def test_sizes_that_are_left_out_are_checked_when_the_model_is_built():
    """Their class's defaults are transformers' business, which would cost seconds here."""
    check_model_fits(
        recipe_with(parallel__tensor=7), {key: value for key, value in QWQ.items() if key != "hidden_size"}
    )


def test_the_layout_of_chat_models_is_checked_too():
    with pytest.raises(ValueError, match=r"parallel.tensor=7"):
        check_model_fits(recipe_with(parallel__tensor=7), {"llm_config": QWQ, "vision_config": {}})


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


def test_own_reward_functions_need_their_files(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"text_config": QWQ}), encoding="utf-8")
    path = tmp_path / "reward.py"
    recipe = recipe_with(
        model__hf_path=str(tmp_path),
        data__train=str(tmp_path),
        reward__functions=[{"path": str(path), "name": "f"}],
    )
    with pytest.raises(ValueError, match=r"reward.functions\[0\].path='.*reward.py' is not a file"):
        check_start(recipe)
    path.touch()
    check_start(recipe)
