"""The origin of the sizes of a plan: known models, files, folders, and words for what is missing."""

import json

import pytest

from megatron_r1v2.checkpoint.hf.architecture import r1v2_architecture
from megatron_r1v2.planning.known_models import KNOWN_MODELS, find_hf_config

CONFIG = {"model_type": "internvl", "text_config": {"hidden_size": 7}}


def test_the_known_38b_model_has_the_published_sizes():
    model = r1v2_architecture(KNOWN_MODELS["r1v2-38b"])
    vision, language = model.vision, model.language
    assert (vision.num_layers, vision.hidden_size, vision.num_heads, vision.ffn_size) == (45, 3200, 25, 12800)
    assert (vision.head_size, vision.num_patches, vision.qk_norm, vision.qkv_bias) == (128, 1024, True, False)
    assert (language.num_layers, language.hidden_size, language.ffn_size) == (64, 5120, 27648)
    assert (language.num_heads, language.num_kv_heads, language.head_size) == (40, 8, 128)
    assert (language.vocab_size, language.qkv_bias, language.tied_embeddings) == (152064, True, False)
    assert (model.tokens_per_tile, model.adapter_input_size, model.image_token_id) == (256, 12800, 151671)
    assert (vision.norm_epsilon, language.norm_epsilon, language.rope_theta) == (1e-6, 1e-5, 1e6)
    assert language.max_positions == 131072


def test_a_known_name_wins_over_the_recipe():
    assert find_hf_config("nowhere", "r1v2-38b") is KNOWN_MODELS["r1v2-38b"]


def test_a_file_and_a_folder_are_read_and_the_recipe_stands_in_for_nothing(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    assert find_hf_config("nowhere", str(path)) == CONFIG
    assert find_hf_config("nowhere", str(tmp_path)) == CONFIG
    assert find_hf_config(str(tmp_path), "") == CONFIG


def test_what_is_missing_or_broken_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no config.json at model.hf_path='nowhere'; give --hf-config: .*r1v2-38b"):
        find_hf_config("nowhere", "")
    with pytest.raises(ValueError, match="no config.json at --hf-config="):
        find_hf_config("nowhere", str(tmp_path))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        find_hf_config("nowhere", str(tmp_path / "broken.json"))
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        find_hf_config("nowhere", str(tmp_path / "bytes.json"))
