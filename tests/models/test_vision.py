"""InternViT against transformers, both families, and pixel shuffle by hand."""

import pytest
import torch

from megatron_r1v2.models.architecture import VisionArchitecture
from megatron_r1v2.models.vision import padded_heads, pixel_shuffle
from tests.models.parity import MEAN, STD, difference, gradient_differences, model_pair, random_tiles
from tests.tiny_hf import tiny_vision_config

VARIANTS = {
    "300m": {"family": "300m"},
    "6b": {"family": "6b"},
    "6b, 5 heads": {"family": "6b", "vision": tiny_vision_config("6b", heads=5, head_size=8, layers=3)},
}


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory, context):
    return model_pair(tmp_path_factory.mktemp("vision"), context, **VARIANTS[request.param])


def test_patch_features_and_gradients_are_those_of_transformers(pair):
    ours, theirs = pair
    tiles_TCHW = random_tiles(3)
    got_TPE = ours.vision(tiles_TCHW)
    expected_TPE = theirs.model.vision_tower((tiles_TCHW / 255 - MEAN) / STD).last_hidden_state[:, 1:]
    assert difference(got_TPE, expected_TPE) < 1e-5
    direction_TPE = torch.randn(got_TPE.shape, generator=torch.Generator().manual_seed(1))
    for model, output in ((ours, got_TPE), (theirs, expected_TPE)):
        model.zero_grad(set_to_none=True)
        (output * direction_TPE).sum().backward()
    differences = gradient_differences(ours, theirs, ["vision"])
    assert len(differences) > 20
    assert max(differences.values()) < 1e-4, differences


@pytest.mark.parametrize(("height", "width"), [(48, 48), (16, 16), (32, 64)])
def test_positions_of_other_grids_are_resized_bicubically(pair, height, width):
    ours, theirs = pair
    tiles_TCHW = random_tiles(2, height, width)
    with torch.no_grad():
        got = ours.vision(tiles_TCHW)
        expected = theirs.model.vision_tower((tiles_TCHW / 255 - MEAN) / STD).last_hidden_state[:, 1:]
    assert got.shape[1] == height * width // 16
    assert difference(got, expected) < 1e-5


def test_a_tile_does_not_see_the_others_of_its_batch(pair):
    ours, _ = pair
    tiles_TCHW = random_tiles(3)
    with torch.no_grad():
        together, alone = ours.vision(tiles_TCHW), ours.vision(tiles_TCHW[1:2])
    assert difference(together[1:2], alone) < 1e-5


def test_pixel_shuffle_by_hand():
    """Each token joins a square of four patches; v2 leaves tokens in reading order, v1 in reading order of columns."""
    patches_TPE = torch.arange(16.0).repeat_interleave(2).view(1, 16, 2)  # patch p has channels (p, p)
    square = [(0, 1, 4, 5), (2, 3, 6, 7), (8, 9, 12, 13), (10, 11, 14, 15)]
    tokens = torch.tensor(square).float().repeat_interleave(2, dim=1)
    v2 = pixel_shuffle(patches_TPE, ratio=0.5, version="v2")
    v1 = pixel_shuffle(patches_TPE, ratio=0.5, version="v1")
    assert torch.equal(v2, tokens[None])
    assert torch.equal(v1, tokens[[0, 2, 1, 3]][None])


@pytest.mark.parametrize("side", [4, 6, 32])
def test_pixel_shuffle_v2_is_that_of_transformers(pair, side):
    _, theirs = pair
    features_TPE = torch.randn(2, side * side, 8)
    expected = theirs.model.pixel_shuffle(features_TPE.view(2, side, side, 8), scale_factor=0.5).flatten(1, 2)
    assert torch.equal(pixel_shuffle(features_TPE, ratio=0.5, version="v2"), expected)


@pytest.mark.parametrize(("tensor_size", "heads"), [(1, 25), (2, 26), (4, 28), (5, 25), (8, 32)])
def test_heads_are_padded_to_a_multiple_of_the_ranks(tensor_size, heads):
    architecture = VisionArchitecture(
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
    )
    assert padded_heads(architecture, tensor_size) == heads
