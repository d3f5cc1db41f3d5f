"""Parameter counts at the real size, and of layouts."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_r1v2.checkpoint.hf.architecture import r1v2_architecture
from megatron_r1v2.config.schema import Part
from megatron_r1v2.planning.known_models import KNOWN_MODELS
from megatron_r1v2.planning.parameters import (
    Layout,
    language_layer_weights,
    stage_parameters,
    trained_parameters,
    whole_model_counts,
)
from tests.planning.plans import SMALL

# InternViT-6B-448px-V2_5 and QwQ-32B, as their config.json files have it.
SKYWORK_R1V2_38B = {
    "model_type": "internvl",
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "downsample_ratio": 0.5,
    "image_token_id": 151671,
    "tie_word_embeddings": False,
    "vision_config": {
        "model_type": "internvl_vision",
        "hidden_act": "gelu",
        "hidden_size": 3200,
        "num_hidden_layers": 45,
        "num_attention_heads": 25,
        "intermediate_size": 12800,
        "image_size": 448,
        "patch_size": 14,
        "norm_type": "rms_norm",
        "layer_norm_eps": 1e-6,
        "attention_bias": False,
        "use_qk_norm": True,
    },
    "text_config": {
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": 5120,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "intermediate_size": 27648,
        "vocab_size": 152064,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-5,
    },
}


@pytest.mark.parametrize("hf_config", [SKYWORK_R1V2_38B, KNOWN_MODELS["r1v2-38b"]], ids=["written here", "known"])
def test_the_38b_model_has_the_published_number_of_parameters(hf_config):
    counts = whole_model_counts(r1v2_architecture(hf_config))
    assert counts == {Part.vision: 5_536_496_000, Part.adapter: 91_786_240, Part.language: 32_763_876_352}
    assert sum(counts.values()) == 38_392_158_592


def test_stages_and_tensor_ranks_hold_the_model_and_the_zero_heads():
    architecture = r1v2_architecture(SKYWORK_R1V2_38B)
    layout = Layout(tensor=8, pipeline=4, first_stage_layers=10)
    stages = [stage_parameters(architecture, layout, stage) for stage in range(4)]
    split = [parameter for stage in stages for parameter in stage if parameter.name.endswith("linear_qkv.weight")]
    vision = sum(parameter.numel for parameter in split if parameter.part is Part.vision)
    language = sum(parameter.numel for parameter in split if parameter.part is Part.language)
    assert 8 * vision == 45 * 3200 * 3 * 32 * 128  # 25 heads became 32
    assert 8 * language == 64 * 5120 * (40 + 2 * 8) * 128
    layers = [
        len({parameter.name.split(".")[3] for parameter in stage if ".layers." in parameter.name}) for stage in stages
    ]
    assert layers[1:] == [18, 18, 18]
    assert {parameter.part for parameter in stages[1]} == {Part.language}


def test_a_small_model_is_counted_by_hand():
    counts = whole_model_counts(SMALL)
    # Class token, positions, patches; two layers of scales and norms, qkv and projection, MLP, norms of q and k.
    tower = 8 + 5 * 8 + (3 * 2 * 2 * 8 + 8) + 2 * (4 * 8 + 4 * 8 * 8 + 8 + 2 * 8 * 16 + 16 + 8 + 2 * 8)
    adapter = 2 * 32 + 32 * 16 + 16 + 16 * 16 + 16
    layer = 2 * 16 + 16 * 16 + (16 + 2 * 8) * 17 + 3 * 16 * 32
    assert counts == {Part.vision: tower, Part.adapter: adapter, Part.language: 2 * 64 * 16 + 4 * layer + 16}
    assert language_layer_weights(SMALL.language) == 16 * 16 + (16 + 2 * 8) * 16 + 3 * 16 * 32


def test_only_the_parameters_of_the_parts_that_train_are_trained():
    parameters = stage_parameters(SMALL, Layout(), 0)
    trained = trained_parameters(parameters, [Part.adapter])
    names = ["norm.weight", "norm.bias", "linear_fc1.weight", "linear_fc1.bias", "linear_fc2.weight", "linear_fc2.bias"]
    assert [parameter.name for parameter in trained] == [f"adapter.{name}" for name in names]
    assert trained_parameters(parameters, []) == []
    assert trained_parameters(parameters, list(Part)) == parameters


def test_tied_embeddings_are_one_tensor_or_a_copy_on_the_last_stage():
    tied = replace(SMALL, language=replace(SMALL.language, tied_embeddings=True))

    names = ("language.embedding.word_embeddings.weight", "language.output_layer.weight")

    def embeddings(stage, **layout):
        parameters = stage_parameters(tied, Layout(**layout), stage)
        return [(parameter.shape, parameter.own_bucket) for parameter in parameters if parameter.name in names]

    assert embeddings(0) == [((64, 16), False)]
    assert embeddings(0, pipeline=2) == embeddings(1, pipeline=2) == [((64, 16), True)]
    assert embeddings(0, tensor=3) == [((22, 16), False)], "64 words and two more in three parts"


def test_a_reward_model_has_a_score_in_place_of_the_output_layer():
    for layout in (Layout(), Layout(tensor=2, pipeline=2)):
        last = layout.pipeline - 1
        plain, scores = (stage_parameters(SMALL, layout, last, scores=scores) for scores in (False, True))
        assert [each.name for each in plain if each not in scores] == ["language.output_layer.weight"]
        assert [(each.name, each.shape, each.part) for each in scores if each not in plain] == [
            ("score.weight", (1, 16), Part.score)
        ]
    first = stage_parameters(SMALL, Layout(pipeline=2), 0, scores=True)
    assert first == stage_parameters(SMALL, Layout(pipeline=2), 0)
    tied = replace(SMALL, language=replace(SMALL.language, tied_embeddings=True))
    assert not any(each.own_bucket for each in stage_parameters(tied, Layout(pipeline=2), 0, scores=True))


def test_a_layout_is_one_rank_unless_it_says_more():
    assert Layout().ranks == 1
    assert Layout(tensor=2, pipeline=3, data=4).ranks == 24
    assert [Layout(pipeline=2, first_stage_layers=1).layers_of_stage(SMALL, stage) for stage in (0, 1)] == [1, 3]
    with pytest.raises(ValueError, match="parallel.tensor=3"):
        Layout(tensor=3).check(SMALL)


def test_planning_starts_without_torch_and_megatron_core():
    code = (
        "import json, sys, megatron_r1v2.planning.command;"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    modules = json.loads(
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    )
    assert not {"torch", "megatron", "transformers"} & set(modules)
