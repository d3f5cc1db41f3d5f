"""The statistics of pixels that a folder's image processor amounts to, with transformers' processor as the oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor

from megatron_r1v2.checkpoint.hf.processor import pixel_statistics, stated_processor
from megatron_r1v2.resilience.files import write_json

STATED = {
    "image_processor_type": "GotOcr2ImageProcessor",
    "do_resize": False,
    "crop_to_patches": False,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.5, 0.6, 0.7],
}
CHANGES = {
    "as it is": {},
    "no mean": {"image_mean": None},
    "no deviation": {"image_std": None},
    "not normalized": {"do_normalize": False},
    "normalized by default": {"do_normalize": None, "do_rescale": None, "rescale_factor": None},
    "another range": {"rescale_factor": 1 / 127.5},
    "pixels of 255": {"do_rescale": False, "image_mean": [120, 110, 100], "image_std": [50, 60, 70]},
    "neither": {"do_rescale": False, "do_normalize": False},
}


@pytest.mark.parametrize("place", ["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize("change", CHANGES)
def test_pixels_come_out_as_transformers_processor_has_them(tmp_path: Path, change: str, place: str) -> None:
    stated = {key: value for key, value in (STATED | CHANGES[change]).items() if value is not None}
    nested = place == "processor_config.json"
    content = {"processor_class": "InternVLProcessor", "image_processor": stated} if nested else stated
    write_json(tmp_path / place, content)
    tiles = torch.randint(0, 256, (1, 3, 8, 8), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    theirs = AutoImageProcessor.from_pretrained(tmp_path)
    expected = theirs(images=list(tiles), return_tensors="pt", input_data_format="channels_first")["pixel_values"]
    found = pixel_statistics(tmp_path)
    assert found is not None
    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in found)
    torch.testing.assert_close((tiles / 255 - mean) / std, expected.double(), rtol=1e-5, atol=1e-5)


def test_the_nested_settings_come_first_and_nothing_is_no_processor(tmp_path: Path) -> None:
    assert pixel_statistics(tmp_path) is None
    write_json(tmp_path / "preprocessor_config.json", STATED)
    assert pixel_statistics(tmp_path) == ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    write_json(tmp_path / "processor_config.json", {"image_processor": STATED | {"image_mean": [0.9, 0.8, 0.7]}})
    assert stated_processor(tmp_path)["image_mean"] == [0.9, 0.8, 0.7]
    assert pixel_statistics(tmp_path) == ((0.9, 0.8, 0.7), (0.5, 0.6, 0.7))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"image_std": [0.5, 0.0, 0.5]}, r"image_std=.*accepted: above 0"),
        ({"image_mean": [0.5, 0.5]}, r"image_mean=.*three numbers"),
        ({"image_mean": "0.5"}, r"image_mean=.*three numbers"),
        ({"image_mean": [True, 0.5, 0.5]}, r"image_mean=.*three numbers"),
        ({"rescale_factor": 0}, r"rescale_factor=0 .*above 0"),
        ({"rescale_factor": "1/255"}, r"rescale_factor='1/255'"),
    ],
)
def test_what_is_no_statistic_is_refused_in_words(tmp_path: Path, change: dict, told: str) -> None:
    write_json(tmp_path / "preprocessor_config.json", STATED | change)
    with pytest.raises(ValueError, match=told):
        pixel_statistics(tmp_path)
