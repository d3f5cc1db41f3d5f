"""The sizes of a language model that a layout divides; plain numbers, so that each rule is met alone."""

from dataclasses import replace

import pytest

from megatron_r1v2.config.choices import Fp8
from megatron_r1v2.config.layout import LanguageSizes, UnevenSizes, check_fp8_shapes, check_layout

SIZES = LanguageSizes(heads=8, kv_heads=2, head_size=8, hidden=64, ffn=96, layers=6)
LAYOUT = {"tensor": 1, "pipeline": 1, "first_stage_layers": 0}
SHAPES = LanguageSizes(heads=8, kv_heads=2, head_size=16, hidden=128, ffn=256, layers=6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"tensor": 4}, None),
        ({"pipeline": 3}, None),
        ({"pipeline": 2, "first_stage_layers": 2}, None),
        ({"tensor": 3}, r"parallel.tensor=3 does not divide .* 8 attention heads .*: 1, 2, 4, 8"),
        ({"tensor": 4, "hidden": 66}, r"66 channels \(hidden_size\); values that do: 1, 2$"),
        ({"tensor": 4, "ffn": 98}, "98 feed-forward channels"),
        ({"tensor": 4, "kv_heads": 3}, "3 key-value heads .* do not divide each other"),
        ({"pipeline": 4}, "parallel.pipeline=4 does not divide the language model's 6 layers"),
        ({"first_stage_layers": 2}, "needs more than one pipeline stage"),
        ({"pipeline": 2, "first_stage_layers": 6}, "leaves none of the 6 layers"),
        ({"pipeline": 3, "first_stage_layers": 3}, "leaves 3 of 6 layers for 2 further stages"),
    ],
)
def test_a_layout_divides_the_model_or_names_what_it_does_not(changes, message):
    layout = {name: changes.get(name, value) for name, value in LAYOUT.items()}
    sizes = replace(SIZES, **{name: value for name, value in changes.items() if name not in LAYOUT})
    if message is None:
        check_layout(sizes, **layout)
        return
    with pytest.raises(UnevenSizes, match=message):
        check_layout(sizes, **layout)


@pytest.mark.parametrize(
    ("fp8", "sequence", "changes", "message"),
    [
        (Fp8.none, True, {"hidden": 3}, None),
        (Fp8.tensorwise, True, {}, None),
        (Fp8.blockwise, False, {}, None),
        (Fp8.tensorwise, False, {"hidden": 120}, r"multiple of 16, .* 120 channels \(hidden_size\)"),
        (Fp8.tensorwise, False, {"ffn": 200}, "has 100 feed-forward channels of a rank"),
        (Fp8.tensorwise, False, {"head_size": 12, "kv_heads": 0, "heads": 2}, "has 12 query channels of a rank"),
        (Fp8.tensorwise, False, {"head_size": 8, "heads": 4, "kv_heads": 1}, "24 query, key and value channels"),
        (Fp8.blockwise, True, {"ffn": 512}, "multiple of 128, .* has 64 query channels"),
    ],
)
def test_fp8_wants_multiples(fp8, sequence, changes, message):
    sizes = replace(SHAPES, **changes)
    if message is None:
        check_fp8_shapes(sizes, fp8=fp8, tensor=2, sequence=sequence)
        return
    with pytest.raises(UnevenSizes, match=message):
        check_fp8_shapes(sizes, fp8=fp8, tensor=2, sequence=sequence)
