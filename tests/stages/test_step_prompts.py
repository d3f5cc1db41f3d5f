"""The prompts of a step are distinct, also where two epochs meet, and beside those that the step has already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_r1v2.stages.session import open_session
from megatron_r1v2.stages.step_prompts import check_enough_samples, in_groups, next_distinct
from tests.stages.runs import recipe_for
from tests.stages.scripted import make_prompt


class Repeating:
    """A stream that reads the same few prompts again and again."""

    def __init__(self, keys: str) -> None:
        self.keys = keys
        self.read = 0

    def next(self, count: int) -> list[Any]:
        found = [make_prompt(self.keys[(self.read + index) % len(self.keys)], tiles=0) for index in range(count)]
        self.read += count
        return found


def test_a_prompt_that_comes_twice_is_read_past() -> None:
    stream: Any = Repeating("aabbc")
    assert [prompt.key for prompt in next_distinct(stream, 3)] == ["a", "b", "c"]
    assert [prompt.key for prompt in next_distinct(stream, 1, besides=["a"])] == ["b"]


def test_a_data_set_that_is_too_small_is_told_with_both_numbers() -> None:
    stream: Any = Repeating("abc")
    with pytest.raises(ValueError, match=r"only 3 distinct prompts but train.prompts_per_step=4; lower"):
        next_distinct(stream, 4)
    with pytest.raises(ValueError, match=r"only 2 distinct prompts beside the 1 of earlier rounds .*=3; lower"):
        next_distinct(stream, 3, besides=["a"])


def test_prompts_of_a_step_are_distinct_over_the_border_of_two_epochs(root: Path, tmp_path: Path) -> None:
    with open_session(recipe_for(root, tmp_path / "run"), stage="grpo", shown=()) as session:
        seen = []
        for _ in range(8):
            keys = [prompt.key for prompt in next_distinct(session.stream, 11)]
            assert len(set(keys)) == 11
            seen += keys
        assert len(set(seen)) == 16
        assert len(next_distinct(session.stream, 16)) == 16
        with pytest.raises(ValueError, match=r"only 16 distinct prompts but train.prompts_per_step=17"):
            next_distinct(session.stream, 17)


def test_a_data_set_that_cannot_fill_a_step_is_refused_before_the_first(root: Path, tmp_path: Path) -> None:
    recipe = recipe_for(root, tmp_path / "run", ("train.prompts_per_step=17",))
    with (
        pytest.raises(ValueError, match=r"only 16 distinct prompts but train.prompts_per_step=17"),
        open_session(recipe, stage="grpo", shown=()),
    ):
        pass


def test_samples_that_are_left_out_do_not_count(root: Path, tmp_path: Path) -> None:
    data = recipe_for(root, tmp_path / "run").data
    check_enough_samples(data, 14, left_out=2)
    with pytest.raises(ValueError, match=r"only 14 distinct prompts but train.prompts_per_step=15"):
        check_enough_samples(data, 15, left_out=2)


def test_a_pass_in_groups_has_every_prompt_once_in_order() -> None:
    prompts = [make_prompt(key, tiles=0) for key in "abcde"]
    groups = list(in_groups(iter(prompts), 2))
    assert [[prompt.key for prompt in group] for group in groups] == [["a", "b"], ["c", "d"], ["e"]]
    assert list(in_groups([], 2)) == []
