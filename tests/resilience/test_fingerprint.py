"""Equal settings give equal fingerprints, however they are written; others are named with both values."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_r1v2.resilience.fingerprint import Change, Fingerprint

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1, max_size=3), inner, max_size=3),
    max_leaves=8,
)
UNHURRIED = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
GROUPS = st.dictionaries(st.text("abc", min_size=1, max_size=3), VALUES, max_size=4)


def test_the_order_of_settings_and_tuples_change_nothing():
    first = Fingerprint.of(model={"layers": "te", "fp8": (1, 2)}, seed=7)
    second = Fingerprint.of(seed=7, model={"fp8": [1, 2], "layers": "te"})
    assert first == second
    assert hash(first) == hash(second)
    assert first.digest == second.digest
    assert len(first.digest) == 64
    assert first.changes_since(second) == []


def test_the_digest_is_that_of_the_canonical_json():
    """As sha256sum has it: what is stored today must be found by every later version."""
    fingerprint = Fingerprint.of(seed=7, model={"layers": "te"})
    assert fingerprint.canonical == '{"model":{"layers":"te"},"seed":7}'
    assert fingerprint.digest == "8f23e5b5465244c3eaf2566ee10cd46dfeebe2dc10b7dbef13f618c7678dc10a"


def test_a_difference_is_named_with_both_values():
    old = Fingerprint.of(generation={"temperature": 1.0, "n": 8, "stop": ["a"]}, data="digest", gone=1)
    new = Fingerprint.of(
        generation={"temperature": 0.7, "n": 8, "stop": ["b"]}, data="digest", added={"x": None, "y": 2}
    )
    changes = new.changes_since(old)
    assert [str(change) for change in changes] == [
        "added.y: None -> 2",
        "generation.stop: ['a'] -> ['b']",
        "generation.temperature: 1.0 -> 0.7",
        "gone: 1 -> None",
    ]
    assert changes[2] == Change("generation.temperature", 1.0, 0.7)


def test_an_empty_group_is_not_no_group():
    assert Fingerprint.of(model={}).changes_since(Fingerprint.of(model=None)) == [Change("model", None, {})]
    assert Fingerprint.of(model={"a": {}}).changes_since(Fingerprint.of(model={"a": {"b": 1}})) != []


def test_what_json_cannot_hold_is_refused():
    with pytest.raises(TypeError, match="not JSON serializable"):
        Fingerprint.of(model=object())


@UNHURRIED
@given(groups=GROUPS)
def test_what_is_stored_is_the_same_fingerprint_again(groups):
    fingerprint = Fingerprint.of(**groups)
    assert Fingerprint.of(**json.loads(json.dumps(fingerprint.values))) == fingerprint
    assert fingerprint.changes_since(fingerprint) == []


@UNHURRIED
@given(first=GROUPS, second=GROUPS)
def test_fingerprints_without_a_change_have_the_same_settings(first, second):
    old, new = Fingerprint.of(**first), Fingerprint.of(**second)
    names = [change.setting for change in new.changes_since(old)]
    assert names == [change.setting for change in old.changes_since(new)]
    if old == new:
        assert names == []
