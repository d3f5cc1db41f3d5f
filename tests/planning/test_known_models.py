"""The origin of the sizes of a plan: known models, files, folders, and words for what is missing."""

import json
import math
from dataclasses import replace

import pytest

from megatron_r1v2.checkpoint.hf.architecture import r1v2_architecture
from megatron_r1v2.config.load import load_recipe_as
from megatron_r1v2.config.recipes import GrpoRecipe
from megatron_r1v2.planning.command import main
from megatron_r1v2.planning.hardware import HARDWARE
from megatron_r1v2.planning.known_models import KNOWN_MODELS, find_hf_config
from megatron_r1v2.planning.parameters import whole_model_counts
from megatron_r1v2.planning.plan import Cluster, make_plan
from tests.checkpoint.hf.test_config import convert
from tests.checkpoint.hf.test_shapes import transformers_shapes
from tests.checkpoint.published_folders import write_tiny_published

CLUSTER = Cluster(gpus=1, gpus_per_node=8, gpu_memory_gib=80, reserve_gib=4, hardware=HARDWARE["h100"])

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


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("internvl3-1b", 938_193_024),
        ("internvl3-2b", 2_088_957_440),
        ("internvl3-8b", 7_944_373_760),
        ("internvl3-9b", 9_141_824_512),
        ("internvl3-14b", 15_117_256_704),
        ("internvl3-38b", 38_388_164_992),
        ("internvl3-78b", 78_408_318_336),
        ("internvl2.5-38b", 38_388_164_992),
        ("r1v2-38b", 38_392_158_592),
    ],
)
def test_a_known_model_has_the_parameters_of_its_configuration(name, parameters):
    architecture = r1v2_architecture(KNOWN_MODELS[name])
    assert sum(whole_model_counts(architecture).values()) == parameters
    assert sum(math.prod(shape) for shape in transformers_shapes(KNOWN_MODELS[name]).values()) == parameters
    assert architecture.tokens_per_tile == 256


def test_the_help_names_every_known_model(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = "".join(capsys.readouterr().out.split())
    assert [name for name in KNOWN_MODELS if name not in text] == []


def test_folders_of_the_chat_layout_give_the_same_plan(tmp_path):
    """A config.json of OpenGVLab's or Skywork's, which needs no tokenizer beside it."""
    write_tiny_published(tmp_path / "chat", "internvl")
    convert(tmp_path / "chat", tmp_path / "out", "transformers")
    (tmp_path / "bare.json").write_text((tmp_path / "chat" / "config.json").read_text())
    recipe = load_recipe_as(GrpoRecipe, None, ("data.max_prompt_tokens=100", "generation.max_response_tokens=100"))
    sizes = [
        make_plan(recipe, find_hf_config("nowhere", str(tmp_path / name)), CLUSTER).architecture
        for name in ("chat", "out", "bare.json")
    ]
    assert len({replace(size, image_token_id=0) for size in sizes}) == 1


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
