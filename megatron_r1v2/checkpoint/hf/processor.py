"""The image processor that a folder describes, and the statistics that its pixels are normalized by."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeGuard

from megatron_r1v2.checkpoint.hf.folders import read_json

Colours = tuple[float, float, float]
# Of CLIP, which transformers' image processors have where their file leaves them out.
_MEAN: Colours = (0.48145466, 0.4578275, 0.40821073)
_STD: Colours = (0.26862954, 0.26130258, 0.27577711)


def stated_processor(folder: Path | str) -> dict[str, object]:
    """Return the settings of a folder's image processor; empty where it has none.

    transformers 5 writes them into processor_config.json, and reads those first; older ones stand in
    preprocessor_config.json.
    """
    folder = Path(folder)
    if (folder / "processor_config.json").is_file():
        nested = read_json(folder / "processor_config.json").get("image_processor")
        if isinstance(nested, dict):
            return nested
    path = folder / "preprocessor_config.json"
    return read_json(path) if path.is_file() else {}


def pixel_statistics(folder: Path | str) -> tuple[Colours, Colours] | None:
    """Return mean and standard deviation of each colour, for pixels from 0 to 1; None: no processor is described.

    Raises:
        ValueError: a setting is not what transformers takes.
    """
    stated = {key: value for key, value in stated_processor(folder).items() if value is not None}
    if not stated:
        return None
    mean, std = _colours(stated, "image_mean", _MEAN, folder), _colours(stated, "image_std", _STD, folder)
    if min(std) <= 0:
        raise ValueError(
            f"{folder}: image_std={stated['image_std']!r} of the image processor is not accepted; accepted: above 0"
        )
    if stated.get("do_normalize") is False:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    factor = stated.get("rescale_factor", 1 / 255) if stated.get("do_rescale") is not False else 1.0
    if not _is_number(factor) or factor <= 0:
        raise ValueError(
            f"{folder}: rescale_factor={repr(factor)[:200]} of the image processor is not accepted; accepted: above 0"
        )
    # A processor that scales pixels to another range has its statistics in that range.
    one = 255 * factor
    return _divided(mean, one), _divided(std, one)


def _divided(values: Colours, by: float) -> Colours:
    red, green, blue = values
    return red / by, green / by, blue / by


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _colours(stated: Mapping[str, object], key: str, default: Colours, folder: Path | str) -> Colours:
    values = stated.get(key, default)
    if _is_number(values):
        values = (values, values, values)
    if not (isinstance(values, (list, tuple)) and all(map(_is_number, values)) and len(values) == 3):
        raise ValueError(
            f"{folder}: {key}={str(values)[:200]!r} of the image processor is not accepted; accepted: three numbers, "
            "one a colour"
        )
    red, green, blue = (float(value) for value in values)
    return red, green, blue
