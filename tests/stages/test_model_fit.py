"""The fit of a recipe to its model: its layout, its lengths, and a folder that can be read."""

import json
from dataclasses import replace

import pytest

from megatron_r1v2.checkpoint.hf.architecture import r1v2_architecture
from megatron_r1v2.config.choices import Fp8, Layers
from megatron_r1v2.config.recipes import EvaluateRecipe, GrpoRecipe, RewardModelRecipe
from megatron_r1v2.config.schema import EvaluationConfig
from megatron_r1v2.planning.known_models import KNOWN_MODELS
from megatron_r1v2.stages.model_fit import all_mistakes, fit_mistakes

QWQ = r1v2_architecture(KNOWN_MODELS["r1v2-38b"]).language
SHORT = {"data__max_prompt_tokens": 100, "generation__max_response_tokens": 100}


def recipe_with(kind=GrpoRecipe, **values):
    """Return the defaults of a stage with `section__key=value` changed."""
    recipe = kind()
    for name, value in values.items():
        section, key = name.split("__")
        recipe = recipe.changed(**{section: getattr(recipe, section).changed(**{key: value})})
    return recipe


def told(language=QWQ, **values):
    return list(fit_mistakes(recipe_with(**values), language))


@pytest.mark.parametrize(
    ("tensor", "pipeline", "first", "message"),
    [
        (8, 1, 0, None),
        (4, 4, 0, None),
        (2, 4, 4, None),
        (3, 1, 0, "parallel.tensor=3 does not divide the language model's 40 attention heads"),
        (1, 3, 0, "parallel.pipeline=3 does not divide the language model's 64 layers"),
        (1, 1, 4, "parallel.first_stage_layers=4 needs more than one pipeline stage"),
        (1, 4, 5, "parallel.first_stage_layers=5 leaves 59 of 64 layers for 3 further stages"),
        (1, 2, 64, "parallel.first_stage_layers=64 leaves none"),
    ],
)
def test_the_layout_must_fit_the_language_model(tensor, pipeline, first, message):
    found = told(parallel__tensor=tensor, parallel__pipeline=pipeline, parallel__first_stage_layers=first)
    assert len(found) == (message is not None)
    assert all(text.startswith(message) for text in found)


def test_all_that_does_not_fit_is_told():
    found = told(parallel__tensor=3, parallel__pipeline=3, data__max_prompt_tokens=131072)
    assert [text.split("=")[0] for text in found] == [
        "parallel.tensor",
        "parallel.pipeline",
        "data.max_prompt_tokens",
    ]


def test_key_value_heads_may_be_copied_but_not_cut():
    language = replace(QWQ, ffn_size=27640)
    assert told(language, parallel__tensor=40) == []  # each of the 8 on 5 ranks
    (cut,) = told(language, parallel__tensor=20)
    assert cut.startswith("parallel.tensor=20 and the language model's 8 key-value heads")


def test_ffn_and_hidden_size_must_divide_too():
    (found,) = told(replace(QWQ, ffn_size=27650), parallel__tensor=4)
    assert "27650 feed-forward channels" in found


def test_prompt_and_response_must_fit_the_positions():
    (found,) = told(data__max_prompt_tokens=131072 - 8192 + 1)
    assert "= 131073, but the model has 131072 positions" in found
    assert told(data__max_prompt_tokens=131072 - 8192) == []
    unread = recipe_with(RewardModelRecipe, data__max_prompt_tokens=131072)
    assert list(fit_mistakes(unread, QWQ)) == [], "a stage that generates nothing"


@pytest.mark.parametrize(
    ("tensor", "sequence", "fp8", "mistakes"),
    [
        (1, False, Fp8.tensorwise, 0),
        (8, True, Fp8.blockwise, 0),
        (8, True, Fp8.tensorwise, 0),
        (3, True, Fp8.blockwise, 1),  # of the layout: what 8 bits want of its ranks cannot be said
    ],
)
def test_fp8_fits_qwq_at_the_usual_layouts(tensor, sequence, fp8, mistakes):
    fp8_settings = {"model__layers": Layers.te, "model__fp8": fp8}
    found = told(**fp8_settings, parallel__tensor=tensor, parallel__sequence=sequence, **SHORT)
    assert len(found) == mistakes


def test_an_fp8_dimension_that_does_not_fit_is_named():
    narrow = replace(QWQ, ffn_size=8 * 100)
    (found,) = told(narrow, model__layers=Layers.te, model__fp8=Fp8.tensorwise, parallel__tensor=8, **SHORT)
    assert "multiple of 16, but the language model has 100 feed-forward channels" in found


def test_a_folder_of_a_model_is_read_and_one_of_another_kind_told(tmp_path):
    recipe = recipe_with(model__hf_path=str(tmp_path), data__train=str(tmp_path), parallel__tensor=3)
    assert "has no config.json" in "".join(all_mistakes(recipe))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert "config.json has model_type='bert', which is no InternVL" in "".join(all_mistakes(recipe))
    (tmp_path / "config.json").write_text(json.dumps(KNOWN_MODELS["r1v2-38b"]))
    (found,) = all_mistakes(recipe)
    assert found.startswith("parallel.tensor=3 does not divide")
    assert list(all_mistakes(recipe.changed(parallel=recipe.parallel.changed(tensor=4)))) == []


def test_files_and_sizes_are_told_together(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(KNOWN_MODELS["r1v2-38b"]))
    recipe = recipe_with(model__hf_path=str(tmp_path), data__train="gone", parallel__tensor=3)
    assert [text.split("=")[0] for text in all_mistakes(recipe)] == ["data.train", "parallel.tensor"]


def test_a_served_model_is_not_looked_for(tmp_path):
    served = EvaluationConfig(endpoint_url="http://127.0.0.1:8000/v1", endpoint_model="m", data=str(tmp_path))
    recipe = recipe_with(EvaluateRecipe, model__hf_path=str(tmp_path)).changed(evaluation=served)
    assert list(all_mistakes(recipe)) == []
