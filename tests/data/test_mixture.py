"""Several data sets in one stream: exact shares, exact on resume, keys that name their set."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1v2.config.schema import DataConfig, DataSource
from megatron_r1v2.data.mixture import (
    MixtureStream,
    check_shares,
    num_in_shares,
    num_train_samples,
    open_train,
    read_train,
    share_metrics,
    source_names,
)
from megatron_r1v2.data.samples import parse_sample
from megatron_r1v2.data.shards import write_shards
from megatron_r1v2.data.stream import PromptStream
from megatron_r1v2.data.tokenizer import ChatTokenizer
from tests.data.test_stream import builder
from tests.stages.scripted import make_prompt
from tests.tiny import tiny_sample, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return ChatTokenizer(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("sets")
    made = [root / "digits", root / "more" / "digits", root / "text"]
    for folder, count in zip(made, (12, 7, 5), strict=True):
        write_shards([tiny_sample(index) for index in range(count)], folder, 4)
    return made


def config(folders: list[Path], weights: tuple[float, ...], **values: object) -> DataConfig:
    entries = [{"path": str(folder), "weight": weight} for folder, weight in zip(folders, weights, strict=False)]
    return DataConfig(train=entries, **values)


def stream(folders: list[Path], weights: tuple[float, ...], tokenizer: ChatTokenizer) -> MixtureStream:
    given_config = config(folders, weights)
    opened = open_train(given_config, builder(tokenizer, given_config), seed=3)
    assert isinstance(opened, MixtureStream)
    return opened


def keys(source: MixtureStream, count: int) -> list[str]:
    return [prompt.key for prompt in source.next(count)]


def test_a_name_is_that_of_the_folder_numbered_where_two_have_the_same(folders: list[Path]) -> None:
    assert source_names([DataSource(path=str(folder)) for folder in folders]) == ["digits-1", "digits-2", "text"]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        # A number must not make the name of another set, whose keys would be taken for the same prompts.
        (("a/digits", "b/digits", "c/digits-1"), ["digits-2", "digits-3", "digits-1"]),
        (("c/digits-2", "a/digits", "b/digits"), ["digits-2", "digits-1", "digits-3"]),
        (("a/", "b/a/", "x/.."), ["a-1", "a-2", Path.cwd().name]),
        ((".", "x"), [Path.cwd().name, "x"]),
    ],
)
def test_no_two_sets_have_one_name_and_each_has_one(paths: tuple[str, ...], names: list[str]) -> None:
    assert source_names([DataSource(path=path) for path in paths]) == names


def test_every_prompt_has_the_name_of_its_set_in_its_key(folders: list[Path], tokenizer) -> None:
    prompts = stream(folders, (1, 1, 1), tokenizer).next(24)
    assert {prompt.key.partition(":")[0] for prompt in prompts} == {"digits-1", "digits-2", "text"}
    assert all(prompt.key.startswith(f"{prompt.data_set}:digits-") for prompt in prompts)
    # An epoch of each set has its samples once, though the sets have the same keys.
    assert len({prompt.key for prompt in prompts if prompt.data_set == "text"}) == 5


@given(weights=st.lists(st.integers(1, 20), min_size=2, max_size=3), counts=st.lists(st.integers(1, 9), max_size=6))
@settings(max_examples=25, deadline=None)
def test_after_every_prompt_each_set_is_within_one_of_its_share(folders, tokenizer, weights, counts) -> None:
    source, drawn = stream(folders, tuple(weights), tokenizer), Counter[str]()
    for count in counts:
        for _ in range(count):
            (prompt,) = source.next(1)
            drawn[prompt.data_set] += 1
            for name, weight in zip(source.names, weights, strict=True):
                share = Fraction(weight, sum(weights)) * sum(drawn.values())
                assert abs(drawn[name] - share) < len(weights)
    # And exactly at it after a whole round of the weights.
    whole = stream(folders, tuple(weights), tokenizer)
    totals = Counter(prompt.data_set for prompt in whole.next(sum(weights)))
    assert totals == dict(zip(whole.names, weights, strict=True))


@given(before=st.integers(0, 40), after=st.integers(1, 30))
@settings(max_examples=10, deadline=None)
def test_a_resumed_mixture_goes_on_exactly(folders, tokenizer, before: int, after: int) -> None:
    source = stream(folders, (3, 1, 2), tokenizer)
    keys(source, before)
    state = source.state_dict()
    expected = keys(source, after)
    resumed = stream(folders, (3, 1, 2), tokenizer)
    assert resumed.load_state_dict(state) is None
    assert keys(resumed, after) == expected
    assert (resumed.samples_read, resumed.corrupt, resumed.left_out) == (before + after, 0, 0)


def test_another_mixture_is_refused_with_both(folders: list[Path], tokenizer) -> None:
    state = stream(folders, (3, 1), tokenizer).state_dict()
    for weights, now in (((3, 2), "digits-1 x 3, digits-2 x 2"), ((3, 1, 1), "digits-1 x 3, digits-2 x 1, text x 1")):
        with pytest.raises(ValueError, match=rf"was digits-1 x 3, digits-2 x 1 when it was saved and is {now} now"):
            stream(folders, weights, tokenizer).load_state_dict(state)
    settings_of_one = DataConfig(train=str(folders[0]))
    one = open_train(settings_of_one, builder(tokenizer, settings_of_one), seed=3)
    assert isinstance(one, PromptStream)
    with pytest.raises(ValueError, match="was one data set when it was saved"):
        stream(folders, (3, 1), tokenizer).load_state_dict(one.state_dict())
    with pytest.raises(
        ValueError, match=r"data.train was digits-1 x 3, digits-2 x 1 when it was saved and is .*/digits"
    ):
        one.load_state_dict(state)


def test_one_pass_has_the_keys_of_the_stream(folders: list[Path], tokenizer) -> None:
    mixed = config(folders, (1, 1))
    read = [sample.key for sample in read_train(mixed, parse_sample)]
    assert len(read) == num_train_samples(mixed) == 19
    assert set(read) == set(keys(stream(folders, (1, 1), tokenizer), 40))
    alone = DataConfig(train=str(folders[2]))
    assert next(sample.key for sample in read_train(alone, parse_sample)) == "digits-0000"


def test_the_smallest_set_for_its_weight_bounds_the_prompts() -> None:
    assert num_in_shares([12, 7], [1, 1]) == 14
    assert num_in_shares([12, 7], [1, 3]) == 9
    assert num_in_shares([5], [2]) == 5


def test_a_set_that_is_smaller_than_its_share_of_a_step_is_named(folders: list[Path]) -> None:
    mixed = config(folders, (1, 3))
    check_shares(mixed, 8)
    with pytest.raises(
        ValueError, match=r"data.train\[1\] \(.*more/digits\) has 7 samples, .*=12 is 9 \(weight 3 of 4"
    ):
        check_shares(mixed, 12)
    check_shares(DataConfig(train=str(folders[2])), 99)


@pytest.mark.parametrize(("weights", "distinct"), [((1, 1), 14), ((1, 3), 9), ((12, 7), 19), ((100, 1), 12)])
def test_the_smallest_set_for_its_weight_bounds_the_prompts_of_a_step(folders, tokenizer, weights, distinct) -> None:
    mixed = stream(folders, weights, tokenizer)
    assert mixed.num_distinct == distinct
    assert len(set(keys(mixed, distinct))) == distinct, "the shares hold without a prompt that comes twice"
    alone = DataConfig(train=str(folders[2]))
    assert open_train(alone, builder(tokenizer, alone), seed=3).num_distinct == 5


def test_the_shares_of_a_step() -> None:
    prompts = [replace(make_prompt(key, tiles=0), data_set=name) for key, name in zip("abcd", "xxxy", strict=True)]
    assert share_metrics(prompts) == {"data/share/x": 0.75, "data/share/y": 0.25}
    assert share_metrics([make_prompt("a", tiles=0)]) == {}
