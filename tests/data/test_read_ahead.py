"""Reading ahead: order, position and counts of a stream that reads when it is asked; errors where they belong."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_r1v2.config.schema import DataConfig
from megatron_r1v2.data.prompts import PromptBuilder
from megatron_r1v2.data.read_ahead import ReadAhead
from megatron_r1v2.data.samples import DataError
from megatron_r1v2.data.stream import PromptStream
from megatron_r1v2.data.tokenizer import ChatTokenizer
from tests.tiny import tiny_shards, tiny_tokenizer

SAMPLES = 11


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return ChatTokenizer(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("data") / "train", SAMPLES)


def plain(folder: Path, tokenizer: ChatTokenizer, **changes: object) -> PromptStream:
    config = DataConfig(**changes)
    builder = PromptBuilder(settings=config, tokenizer=tokenizer, tile_size=32, tokens_per_tile=4)
    return PromptStream(folder, builder.build, settings=config, seed=3)


def keys(source: PromptStream | ReadAhead, count: int) -> list[str]:
    return [prompt.key for prompt in source.next(count)]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.booleans()), min_size=1, max_size=5))
def test_order_position_and_counts_are_those_without_reading_ahead(
    folder: Path, tokenizer: ChatTokenizer, steps: list[tuple[int, int, bool]]
) -> None:
    """Each step reads some prompts ahead, resumes elsewhere or not, and asks for some."""
    expected, source = plain(folder, tokenizer), ReadAhead(plain(folder, tokenizer))
    for ahead, asked, resumes in steps:
        with source.reading(ahead):
            pass
        assert source.samples_read == expected.samples_read, "what was read ahead has not been given out"
        assert (source.corrupt, source.left_out) == (expected.corrupt, expected.left_out)
        if resumes:
            state = source.state_dict()
            source = ReadAhead(plain(folder, tokenizer))
            source.load_state_dict(state)
        assert keys(source, asked) == keys(expected, asked)


def test_the_thread_reads_while_the_block_runs_and_ends_with_it(folder: Path, tokenizer: ChatTokenizer) -> None:
    stream = plain(folder, tokenizer)
    source = ReadAhead(stream)
    with source.reading(SAMPLES):
        assert any(thread.name.startswith("read-ahead") for thread in threading.enumerate())
    assert not any(thread.name.startswith("read-ahead") for thread in threading.enumerate())
    assert (stream.samples_read, source.samples_read) == (SAMPLES, 0)
    with source.reading(5):  # the others are not given out yet
        pass
    assert stream.samples_read == SAMPLES


def test_an_error_in_the_block_ends_the_reading_and_loses_nothing(folder: Path, tokenizer: ChatTokenizer) -> None:
    expected, source = plain(folder, tokenizer), ReadAhead(plain(folder, tokenizer))
    with pytest.raises(RuntimeError, match="abandoned"), source.reading(10_000):
        raise RuntimeError("abandoned")
    assert source.samples_read == 0
    assert keys(source, 7) == keys(expected, 7)


def test_an_error_of_the_data_is_raised_where_the_prompts_are_asked_for(folder: Path, tokenizer: ChatTokenizer) -> None:
    source = ReadAhead(plain(folder, tokenizer, max_prompt_tokens=8))
    with source.reading(3):
        pass
    assert source.samples_read == 0
    with pytest.raises(DataError, match=r"max_prompt_tokens is 8"):
        source.next(3)
