"""Sizes that follow from others, by hand for Skywork-R1V2-38B."""

from __future__ import annotations

from dataclasses import replace

from megatron_r1v2.models.architecture import (
    FUSED_NORM_NAMES,
    LanguageArchitecture,
    R1V2Architecture,
    VisionArchitecture,
)

SKYWORK_R1V2 = R1V2Architecture(
    vision=VisionArchitecture(
        hidden_size=3200,
        num_layers=45,
        num_heads=25,
        ffn_size=12800,
        image_size=448,
        patch_size=14,
        norm="rms_norm",
        norm_epsilon=1e-6,
        qkv_bias=False,
        qk_norm=True,
    ),
    language=LanguageArchitecture(
        "qwen2", 5120, 64, 40, 8, 128, 27648, 152064, 131072, 1e6, 1e-5, qkv_bias=True, qk_norm=False,
        tied_embeddings=False,
    ),
    image_token_id=151667,
    downsample_ratio=0.5,
)  # fmt: skip


def test_a_tile_has_1024_patches_and_becomes_256_tokens():
    assert SKYWORK_R1V2.vision.num_patches == 32 * 32
    assert SKYWORK_R1V2.tokens_per_tile == 256


def test_four_patches_join_their_channels_in_an_image_token():
    assert SKYWORK_R1V2.adapter_input_size == 4 * 3200


def test_the_ratio_decides_how_many_patches_join():
    whole = replace(SKYWORK_R1V2, downsample_ratio=1.0)
    assert (whole.tokens_per_tile, whole.adapter_input_size) == (1024, 3200)
    quarter = replace(SKYWORK_R1V2, downsample_ratio=0.25)
    assert (quarter.tokens_per_tile, quarter.adapter_input_size) == (64, 16 * 3200)


def test_heads_of_the_vision_tower_share_its_channels():
    assert SKYWORK_R1V2.vision.head_size == 128


def test_pixels_are_normalised_by_imagenet_unless_a_checkpoint_says_otherwise():
    assert SKYWORK_R1V2.vision.pixel_mean == (0.485, 0.456, 0.406)
    assert SKYWORK_R1V2.vision.pixel_std == (0.229, 0.224, 0.225)
    assert SKYWORK_R1V2.pixel_shuffle == "v2"


def test_the_names_of_fused_norms_belong_to_the_linear_that_follows():
    assert FUSED_NORM_NAMES["input_layernorm."] + "weight" == "self_attention.linear_qkv.layer_norm_weight"
    assert FUSED_NORM_NAMES["pre_mlp_layernorm."] + "weight" == "mlp.linear_fc1.layer_norm_weight"
