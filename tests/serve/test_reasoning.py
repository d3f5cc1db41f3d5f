"""Reasoning and answer apart: any stream of parts gives what the whole text gives."""

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1v2.serve.reasoning import ReasoningSplit

END = "</t>"


def read(parts, ends=END):
    split = ReasoningSplit(ends)
    told = [split.push(part, is_last=place == len(parts) - 1) for place, part in enumerate(parts)]
    return told, split.has_ended


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(st.text(alphabet="a</t>", max_size=5), min_size=1, max_size=8))
def test_parts_give_what_the_whole_text_gives(parts):
    told, has_ended = read(parts)
    reasoning, found, answer = "".join(parts).partition(END)
    assert "".join(one for one, _ in told) == reasoning
    assert "".join(one for _, one in told) == answer
    assert has_ended == bool(found)


def test_what_may_begin_the_end_is_held_back_and_given_when_it_does_not():
    told, _ = read(["so <", "/", "b> and </", "t>", "8"])
    assert told == [("so ", ""), ("", ""), ("</b> and ", ""), ("", ""), ("", "8")]


def test_only_the_first_end_counts_and_without_one_to_look_for_all_is_the_answer():
    assert read(["a</t>b</t>c"])[0] == [("a", "b</t>c")]
    assert read(["a</t>", "b"], ends="") == ([("", "a</t>"), ("", "b")], True)
