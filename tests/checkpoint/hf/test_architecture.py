"""The sizes come from config.json; what the model does not compute is refused by name."""

import json

import pytest
import torch
from transformers import InternVLConfig, Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from megatron_r1v2.checkpoint.hf.architecture import language_architecture, r1v2_architecture, vision_architecture
from megatron_r1v2.checkpoint.hf.refusals import Unsupported
from megatron_r1v2.models.rotary import rotary_frequencies
from tests.tiny_hf import tiny_hf_model, tiny_text_config, tiny_vision_config


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("config")
    tiny_hf_model(folder)
    return json.loads((folder / "config.json").read_text())


def changed(hf: dict, path: str, value) -> dict:
    copy = json.loads(json.dumps(hf))
    *parents, last = path.split(".")
    inner = copy
    for name in parents:
        inner = inner[name]
    inner[last] = value
    return copy


def test_sizes_of_a_whole_model(hf):
    found = r1v2_architecture(hf)
    assert (found.vision.num_patches, found.vision.head_size, found.vision.image_size) == (64, 16, 32)
    assert (found.tokens_per_tile, found.adapter_input_size) == (16, 256)
    assert found.image_token_id == hf["image_token_id"]
    assert (found.language.hidden_size, found.language.num_kv_heads, found.language.head_size) == (96, 2, 24)
    assert found.pixel_shuffle == "v2"


def test_sizes_of_skywork_r1v2():
    """InternViT-6B and QwQ-32B: 256 tokens a tile, 12800 channels into the adapter."""
    vision = tiny_vision_config("6b", heads=25, head_size=128, layers=45, image_size=448, patch=14).to_dict()
    text = tiny_text_config(vocab_size=152064, hidden=5120, layers=64, heads=40, kv_heads=8).to_dict()
    whole = {
        "model_type": "internvl",
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "downsample_ratio": 0.5,
        "image_token_id": 151667,
        "vision_config": vision,
        "text_config": text,
    }
    found = r1v2_architecture(whole)
    assert (found.tokens_per_tile, found.adapter_input_size) == (256, 12800)
    assert (found.vision.qk_norm, found.vision.qkv_bias, found.vision.norm) == (True, False, "rms_norm")
    assert (found.language.head_size, found.language.num_kv_heads) == (128, 8)


def test_the_two_families_of_internvit():
    small, large = (vision_architecture(tiny_vision_config(family).to_dict()) for family in ("300m", "6b"))
    assert (small.norm, small.qkv_bias, small.qk_norm) == ("layer_norm", True, False)
    assert (large.norm, large.qkv_bias, large.qk_norm) == ("rms_norm", False, True)


@pytest.mark.parametrize("value", [True, False])
def test_embeddings_are_tied_as_the_whole_model_says(hf, value):
    """transformers ties by the outer setting, true where it is left out; the inner one may say something else."""
    whole = changed(changed(hf, "tie_word_embeddings", value), "text_config.tie_word_embeddings", not value)
    assert r1v2_architecture(whole).language.tied_embeddings is value
    inner = changed(whole, "text_config.tie_word_embeddings", value)
    del inner["tie_word_embeddings"]
    assert r1v2_architecture(inner).language.tied_embeddings is True


def test_keys_that_are_left_out_take_the_defaults_of_transformers():
    found = r1v2_architecture({"model_type": "internvl"})
    whole = InternVLConfig()
    assert found.vision.hidden_size == whole.vision_config.hidden_size == 1024
    assert (found.vision.norm, found.vision.qk_norm, found.vision.qkv_bias) == ("layer_norm", False, False)
    assert found.language.vocab_size == whole.text_config.vocab_size
    assert (found.image_token_id, found.downsample_ratio) == (whole.image_token_id, 0.5)


def test_reading_leaves_the_configuration_as_it_is(hf):
    read = changed(hf, "text_config.rope_scaling", {"type": "dynamic", "factor": 2.0})
    before = json.dumps(read, sort_keys=True)
    r1v2_architecture(read)
    assert json.dumps(read, sort_keys=True) == before


@pytest.mark.parametrize(
    ("rope", "kind", "theta", "settings"),
    [
        ({"rope_scaling": None, "rope_theta": 7.5}, "default", 7.5, {}),
        ({"rope_scaling": {"factor": 2.0, "type": "dynamic"}, "rope_theta": 5.0}, "dynamic", 5.0, {"factor": 2.0}),
        ({"rope_scaling": {"type": "linear", "factor": 1}}, "default", 10000.0, {}),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "linear", 10000.0, {"factor": 4.0}),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "yarn",
            10000.0,
            {"factor": 4.0, "original_max_position_embeddings": 96},
        ),
    ],
)
def test_rotations_are_found_where_transformers_finds_them(hf, rope, kind, theta, settings):
    text = {key: value for key, value in hf["text_config"].items() if key not in ("rope_parameters", "rope_theta")}
    found = language_architecture({**text, "max_position_embeddings": 96, **rope})
    assert (found.rope_type, found.rope_theta, dict(found.rope_parameters)) == (kind, theta, settings)


_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}


@pytest.mark.parametrize(
    "text",
    [
        {"rope_parameters": _YARN | {"factor": 0.5}},
        {"rope_parameters": _YARN | {"factor": None}},
        {"rope_parameters": _YARN | {"truncate": None}},
        {"rope_parameters": _YARN | {"truncate": 0}},
        {"rope_parameters": _YARN | {"truncate": True}},
        {"rope_parameters": _YARN | {"mscale": 0, "mscale_all_dim": 0}},
        {"rope_parameters": _YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}},
        {"rope_parameters": _YARN | {"beta_fast": 0, "beta_slow": 0}},
        {"rope_parameters": _YARN | {"beta_fast": None, "attention_factor": None}},
        {"rope_parameters": _YARN | {"attention_factor": 2}},
        {"rope_parameters": _YARN, "original_max_position_embeddings": 64},
        {"rope_parameters": _YARN, "rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_theta": 700.5},
        {"rope_parameters": {"rope_type": "linear", "factor": 3}, "original_max_position_embeddings": 64},
        {"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2.0}},
    ],
)
def test_odd_rotations_turn_as_those_of_transformers(hf, text):
    text = {**hf["text_config"], "max_position_embeddings": 96, **text}
    frequencies, factor = rotary_frequencies(language_architecture(text))
    theirs = Qwen2RotaryEmbedding(Qwen2Config.from_dict(json.loads(json.dumps(text))))
    assert torch.equal(frequencies, theirs.inv_freq)
    assert factor == theirs.attention_scaling


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ({"rope_parameters": _YARN | {"attention_factor": 0}}, "attention_factor=0 is not accepted"),
        ({"rope_parameters": _YARN | {"rope_theta": -5.0}}, "rope_theta=-5.0 is not accepted"),
        ({"rope_parameters": {"full_attention": _YARN}}, "settings for 'full_attention' alone"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=.*sliding_attention.*not supported"),
    ],
)
def test_settings_that_transformers_loads_and_we_do_not_are_on_the_list(hf, text, told):
    with pytest.raises(Unsupported, match=told):
        language_architecture({**hf["text_config"], **text})


@pytest.mark.parametrize(
    "text",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": None}},
        {"rope_parameters": {"rope_type": "linear", "factor": None}},
        {"rope_parameters": {"rope_type": "dynamic", "factor": None}},
        {"rope_parameters": _YARN, "original_max_position_embeddings": None},
    ],
)
def test_a_null_that_transformers_does_not_take_is_refused(hf, text):
    with pytest.raises(ValueError, match=r"None"):
        language_architecture({**hf["text_config"], **text})


def test_rope_is_read_from_both_places(hf):
    new = dict(hf["text_config"], rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    old = {key: value for key, value in hf["text_config"].items() if key != "rope_parameters"} | {"rope_theta": 5e5}
    assert language_architecture(new).rope_theta == 1e6
    assert language_architecture(old).rope_theta == 5e5


def test_a_head_size_that_is_not_the_quotient_is_kept(hf):
    assert language_architecture(hf["text_config"] | {"head_dim": 32}).head_size == 32
    assert language_architecture(hf["text_config"] | {"head_dim": None}).head_size == 24


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("model_type", "llava", "model_type='llava' of the model"),
        ("projector_hidden_act", "relu", "projector_hidden_act='relu' of the adapter"),
        ("vision_feature_layer", -2, "vision_feature_layer=-2"),
        ("vision_feature_select_strategy", "full", "vision_feature_select_strategy='full'"),
        ("vision_config.model_type", "siglip", "model_type='siglip' of the vision tower"),
        ("vision_config.hidden_act", "quick_gelu", "hidden_act='quick_gelu' of the vision tower"),
        ("vision_config.use_mean_pooling", False, "use_mean_pooling"),
        ("vision_config.image_size", [448, 224], "vision_config.image_size=.* not square"),
        ("vision_config.patch_size", [14, 7], "vision_config.patch_size=.* not square"),
        ("text_config.model_type", "mamba", "model_type='mamba' of the language model.*'qwen2'"),
        ("text_config.hidden_act", "gelu", "hidden_act='gelu' of the language model"),
        ("text_config.use_sliding_window", True, "use_sliding_window"),
        ("text_config.rope_parameters", {"rope_type": "proportional"}, "'proportional'.*accepted: 'default'"),
        (
            "text_config.rope_parameters",
            {"rope_type": "yarn"},
            "is refused by transformers: .Missing.*factor",
        ),
        ("text_config.rope_parameters", {"rope_type": "yarn", "factor": -1}, "factor=-1 is not accepted"),
        ("text_config.num_hidden_layers", -3, "num_hidden_layers. .-3. must be equal"),
        ("vision_config.num_hidden_layers", -3, "vision_config.num_hidden_layers='-3' is not accepted"),
        ("text_config.hidden_size", "96", "text_config is refused by transformers"),
        ("text_config", [1], r"text_config='\[1\]'; accepted: a mapping"),
        ("vision_config", "x", "vision_config='x'; accepted: a mapping"),
        ("vision_config.num_attention_heads", 7, "hidden_size=64 is not a multiple of num_attention_heads=7"),
        ("text_config.num_key_value_heads", 3, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ("text_config.num_attention_heads", 4000, "gives a head 0 channels .*num_attention_heads=4000"),
        ("text_config.head_dim", 7, "requires an even rotary dimension"),
        ("image_token_id", 5000, "image_token_id=5000 is outside the vocabulary"),
        ("downsample_ratio", 0.3, "downsample_ratio=0.3 does not divide"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(hf, path, value, named):
    with pytest.raises(ValueError, match=named):
        r1v2_architecture(changed(hf, path, value))
