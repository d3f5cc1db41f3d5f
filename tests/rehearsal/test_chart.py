"""The chart of memory over the step."""

import xml.etree.ElementTree as ElementTree

import pytest

from megatron_r1v2.rehearsal.chart import memory_chart
from megatron_r1v2.rehearsal.ledger import CATEGORIES, Sample

GIB = 2**30
SAMPLES = [
    Sample("load", {"parameters": 2 * GIB}),
    Sample("update", {"parameters": 2 * GIB, "activations": 6 * GIB}),
    Sample("update", {"parameters": 2 * GIB}),
]


def test_it_stacks_all_categories_and_names_phases():
    drawing = ElementTree.fromstring(memory_chart("a <run>", SAMPLES, 16 * GIB))
    kinds = [element.tag.rpartition("}")[2] for element in drawing]
    assert kinds.count("polygon") == len(CATEGORIES)
    texts = [element.text for element in drawing if element.text]
    assert "a <run>" in texts
    assert [text for text in texts if text in ("load", "update")] == ["load", "update"]
    assert "16.0 GiB, what tensors may take" in texts


def test_the_height_of_a_layer_is_its_size():
    drawing = ElementTree.fromstring(memory_chart("run", SAMPLES, 8 * GIB))
    polygons = [element for element in drawing if element.tag.endswith("polygon")]
    ys = [float(point.split(",")[1]) for point in polygons[CATEGORIES.index("activations")].get("points").split()]
    # Upper edge of three moments, then the lower edge backwards: nothing, six of eight GiB, nothing.
    heights = [low - high for high, low in zip(ys[:3], reversed(ys[3:]), strict=True)]
    assert heights[0] == heights[2] == 0
    assert heights[1] == pytest.approx(0.75 * (420 - 40 - 90), abs=0.2)


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="nothing to draw"):
        memory_chart("run", [], GIB)
