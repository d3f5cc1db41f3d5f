"""YAML as recipes are written in it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1v2.config.yaml_files import parse_yaml, read_yaml_mapping, to_yaml

SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=12))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1e30", 1e30),
        ("1.5", 1.5),
        (".5", 0.5),
        ("-2.", -2.0),
        (".inf", float("inf")),
        ("7", 7),
        ("e5", "e5"),
        ("1e", "1e"),
        ("2026-01-31", "2026-01-31"),
        ("true", True),
        ("[a, 1]", ["a", 1]),
        ("", None),
    ],
)
def test_values(text, value):
    assert parse_yaml(text) == value
    assert type(parse_yaml(text)) is type(value)


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=6), VALUES, max_size=4))
def test_what_is_written_is_read_back(values):
    assert parse_yaml(to_yaml(values)) == values


@pytest.mark.parametrize("text", ["{a: 1", "a: {b: 1, b: 2}", "a: *nowhere", "[" * 5000, "\x00"])
def test_what_is_not_yaml_is_a_value_error(text):
    with pytest.raises(ValueError, match="(?s)."):
        parse_yaml(text)


def test_files(tmp_path):
    path = tmp_path / "a.yaml"
    with pytest.raises(ValueError, match=r"'.*a.yaml' is not a file; give the path of a YAML recipe"):
        read_yaml_mapping(path, what="names to values")
    path.write_text("")
    assert read_yaml_mapping(path, what="names to values") == {}
    path.write_text("a: {b: 1}\n3: c")
    assert read_yaml_mapping(path, what="names to values") == {"a": {"b": 1}, "3": "c"}
    path.write_text("- 1")
    with pytest.raises(ValueError, match=r"a.yaml must map names to values, got a list"):
        read_yaml_mapping(path, what="names to values")
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"a.yaml is not valid YAML"):
        read_yaml_mapping(path, what="names to values")
