from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_r1v2.config.schema import DataConfig
from megatron_r1v2.data import shards
from megatron_r1v2.data.prompts import PromptBuilder
from megatron_r1v2.data.samples import DataError, encode_record, parse_sample
from megatron_r1v2.data.stream import PromptStream, read_shards
from megatron_r1v2.data.tokenizer import ChatTokenizer
from megatron_r1v2.types import Prompt
from tests.ranks import run_ranks
from tests.tiny import tiny_png, tiny_sample, tiny_shards, tiny_tokenizer

TILE, TOKENS = 32, 4
Parts = dict[str, bytes]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> ChatTokenizer:
    return ChatTokenizer(tokenizer_folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("data") / "train", 37)


def stream(folder: Path, tokenizer: ChatTokenizer, *, seed: int = 0, **changes: Any) -> PromptStream:
    config = DataConfig(**changes)
    return PromptStream(folder, builder(tokenizer, config).build, settings=config, seed=seed)


def builder(tokenizer: ChatTokenizer, config: DataConfig | None = None) -> PromptBuilder:
    return PromptBuilder(settings=config or DataConfig(), tokenizer=tokenizer, tile_size=TILE, tokens_per_tile=TOKENS)


def read_prompts(folder: Path, tokenizer: ChatTokenizer, **arguments: Any) -> list[Prompt]:
    return list(read_shards(folder, builder(tokenizer).build, **arguments))


def keys(source: PromptStream, count: int) -> list[str]:
    return [prompt.key for prompt in source.next(count)]


def damaged_shards(folder: Path, count: int, damage: Callable[[int, Parts], Parts]) -> Path:
    """Write samples whose files went through `damage`, as a disk or another program may leave them."""
    folder.mkdir()
    with webdataset.ShardWriter(
        str(folder / "shard-%06d.tar"), maxcount=10, encoder=False, mtime=0, verbose=0
    ) as writer:
        for index in range(count):
            sample = tiny_sample(index)
            parts = damage(index, {"json": encode_record(sample), **sample.images})
            writer.write({"__key__": sample.key, **parts})
    shards._prepare_for_energon(folder)
    return folder


def test_a_prompt_has_all_that_the_model_needs(folder: Path, tokenizer: ChatTokenizer) -> None:
    prompt = read_prompts(folder, tokenizer, count=13)[12]
    sample = tiny_sample(12)
    assert (prompt.key, prompt.answer, prompt.answer_type) == (sample.key, sample.answer, "numeric")
    assert (prompt.facts, prompt.response, prompt.messages) == (sample.facts, sample.response, sample.messages)
    assert prompt.tiles_TCHW.shape == (3, 3, TILE, TILE)
    assert prompt.modality == "image"
    assert prompt.token_ids.count(tokenizer.image_token_id) == 3 * TOKENS
    assert tokenizer.decode(prompt.token_ids).endswith("<|im_start|>assistant\n<think>\n")


def test_every_epoch_has_every_sample_once_in_a_new_order(folder: Path, tokenizer: ChatTokenizer) -> None:
    source = stream(folder, tokenizer)
    epochs = [keys(source, 37) for _ in range(3)]
    everything = {f"digits-{index:04d}" for index in range(37)}
    assert all(set(epoch) == everything for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert source.samples_read == 111
    # Not merely shards in another order: neighbours on disk are rarely neighbours in an epoch.
    neighbours = [int(b[-4:]) - int(a[-4:]) == 1 for a, b in zip(epochs[0], epochs[0][1:], strict=False)]
    assert sum(neighbours) < 8


def test_order_depends_on_the_seed_alone(folder: Path, tokenizer: ChatTokenizer) -> None:
    expected = keys(stream(folder, tokenizer, seed=5), 50)
    assert keys(stream(folder, tokenizer, seed=6), 50) != expected
    torch.manual_seed(99)
    other = stream(folder, tokenizer, seed=5, shuffle=True)
    assert [key for count in (1, 7, 0, 30, 12) for key in keys(other, count)] == expected


def test_reading_leaves_the_global_generator_alone(folder: Path, tokenizer: ChatTokenizer) -> None:
    before = torch.get_rng_state()
    stream(folder, tokenizer).next(40)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_shuffle_keeps_the_order_of_the_shards(folder: Path, tokenizer: ChatTokenizer) -> None:
    got = keys(stream(folder, tokenizer, shuffle=False), 40)
    assert got == [f"digits-{index % 37:04d}" for index in range(40)]


@settings(max_examples=15, deadline=None)
@given(before=st.integers(0, 80), after=st.integers(1, 80), shuffle=st.booleans())
def test_resume_continues_exactly(
    folder: Path, tokenizer: ChatTokenizer, before: int, after: int, shuffle: bool
) -> None:
    first = stream(folder, tokenizer, shuffle=shuffle)
    first.next(before)
    state = first.state_dict()
    expected = keys(first, after)
    second = stream(folder, tokenizer, shuffle=shuffle)
    second.next(3)  # a stream in use can be set back, too
    second.load_state_dict(state)
    assert second.samples_read == before
    assert keys(second, after) == expected


def resume(folder: Path, tokenizer_folder: Path, state: Path) -> tuple[list[str], int, int]:
    source = stream(folder, ChatTokenizer(tokenizer_folder), seed=3, max_corrupt_fraction=0.2)
    source.load_state_dict(torch.load(state, weights_only=True))
    return keys(source, 60), source.samples_read, source.corrupt


def test_resume_in_another_process(tmp_path: Path, tokenizer_folder: Path, tokenizer: ChatTokenizer) -> None:
    def damage(index: int, parts: Parts) -> Parts:
        return {**parts, "0.png": b"broken"} if index == 4 else parts

    folder = damaged_shards(tmp_path / "data", 20, damage)
    source = stream(folder, tokenizer, seed=3, max_corrupt_fraction=0.2)
    for _ in range(5):
        source.next(7)
    torch.save(source.state_dict(), tmp_path / "state.pt")
    expected = (keys(source, 60), source.samples_read, source.corrupt)
    assert run_ranks(1, resume, folder, tokenizer_folder, tmp_path / "state.pt") == [expected]


def test_a_position_in_other_data_is_refused(tmp_path: Path, folder: Path, tokenizer: ChatTokenizer) -> None:
    state = stream(folder, tokenizer).state_dict()
    with pytest.raises(ValueError, match=r"shards was .*shard-000003.* when it was saved"):
        stream(tiny_shards(tmp_path / "other", 5), tokenizer).load_state_dict(state)
    with pytest.raises(ValueError, match=r"run\.seed was 0 when it was saved and is 1 now"):
        stream(folder, tokenizer, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match=r"data\.shuffle was True"):
        stream(folder, tokenizer, shuffle=False).load_state_dict(state)


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_sample_that_was_taken_out_does_not_end_the_run(
    tmp_path: Path, folder: Path, tokenizer: ChatTokenizer, shuffle: bool
) -> None:
    begun = stream(folder, tokenizer, shuffle=shuffle)
    first = keys(begun, 10)
    state = begun.state_dict()
    fewer = tiny_shards(tmp_path / "fewer", 36)
    goes_on = stream(fewer, tokenizer, shuffle=shuffle)
    message = goes_on.load_state_dict(state)
    assert message is not None
    assert f"{fewer} has 36 samples, and had 37 when the run was saved" in message
    assert goes_on.samples_read == 10
    rest = keys(goes_on, 10)
    assert len({*rest, *keys(goes_on, 26)}) == 36 if shuffle else rest == [f"digits-{n:04d}" for n in range(10, 20)]
    assert not shuffle or rest != first
    # And again: its own position is one like any other.
    again = stream(fewer, tokenizer, shuffle=shuffle)
    assert again.load_state_dict(goes_on.state_dict()) is None
    assert keys(again, 40) == keys(goes_on, 40)
    with pytest.raises(ValueError, match=r"shards was"):
        stream(folder, tokenizer, shuffle=shuffle).load_state_dict(again.state_dict())


def long_shards(folder: Path, count: int, long: int) -> Path:
    """Write samples of which every third, the first `long` of them, has a long question."""
    text = "<image>\n" + "left + right? " * 40
    messages = ({"role": "user", "content": text},)
    samples = [
        tiny_sample(n, messages=messages) if n % 3 == 0 and n // 3 < long else tiny_sample(n) for n in range(count)
    ]
    shards.write_shards(samples, folder, 10)
    return folder


def test_prompts_that_are_too_long_are_left_out_and_counted(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    folder = long_shards(tmp_path / "long", 12, 2)
    settings = {"max_prompt_tokens": 150, "too_long": "skip", "max_corrupt_fraction": 0.0}
    source = stream(folder, tokenizer, **settings)
    assert sorted({*keys(source, 10)}) == [f"digits-{n:04d}" for n in range(12) if n not in (0, 3)]
    assert source.left_out <= 2
    keys(source, 10)
    assert (source.left_out, source.corrupt) == (source.samples_read - 20, 0)
    again = stream(folder, tokenizer, **settings)
    again.load_state_dict(source.state_dict())
    assert again.left_out == source.left_out
    kept = [p.key for p in read_shards(folder, builder(tokenizer, DataConfig(**settings)).build, count=10)]
    assert len(kept) == 10
    with pytest.raises(DataError, match=r"digits-000[03].*data\.max_prompt_tokens is 150"):
        keys(stream(folder, tokenizer, max_prompt_tokens=150), 12)


def test_a_data_set_of_which_all_is_too_long_does_not_read_for_ever(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    source = stream(long_shards(tmp_path / "long", 1, 1), tokenizer, max_prompt_tokens=150, too_long="skip")
    with pytest.raises(DataError, match="none of the 1 samples can be used: of 1 read, 1 are longer than"):
        source.next(1)


def without_answer(parts: Parts) -> Parts:
    return {**parts, "json": parts["json"].replace(b'"answer":', b'"anwser":')}


DAMAGES: dict[str, Callable[[Parts], Parts]] = {
    "undecodable image": lambda parts: {**parts, "0.png": b"not a png"},
    "truncated image": lambda parts: {**parts, "0.png": parts["0.png"][:-200]},
    "empty image": lambda parts: {**parts, "0.png": b""},
    "bad JSON": lambda parts: {**parts, "json": b'{"schema": 1'},
    "missing image": lambda parts: {"json": parts["json"]},
    "missing JSON": lambda parts: {"0.png": parts["0.png"]},
    "schema": without_answer,
    "image token in the text": lambda parts: {**parts, "json": parts["json"].replace(b"left +", b"<IMG_CONTEXT>")},
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_corrupt_samples_are_skipped_and_counted(
    tmp_path: Path, tokenizer: ChatTokenizer, damage: Callable[[Parts], Parts]
) -> None:
    folder = damaged_shards(tmp_path / "data", 30, lambda index, parts: damage(parts) if index == 13 else parts)
    source = stream(folder, tokenizer, max_corrupt_fraction=0.05)
    for _ in range(2):
        assert sorted(keys(source, 29)) == [f"digits-{index:04d}" for index in range(30) if index != 13]
    source.next(29)
    assert source.corrupt in (2, 3)
    assert source.samples_read == 87 + source.corrupt
    assert source.state_dict()["tally"]["keys"] == ["digits-0013"]
    assert len(read_prompts(folder, tokenizer, max_corrupt_fraction=0.05)) == 29


def test_one_corrupt_sample_in_many_does_not_stop_even_when_it_is_first(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    def damage(index: int, parts: Parts) -> Parts:
        return {**parts, "0.png": b""} if index == 0 else parts

    folder = damaged_shards(tmp_path / "data", 120, damage)
    assert len(stream(folder, tokenizer, shuffle=False).next(119)) == 119


@pytest.mark.parametrize(("count", "fraction"), [(1, 0.01), (12, 0.01), (12, 1.0)])
def test_a_data_set_with_nothing_usable_stops(
    tmp_path: Path, tokenizer: ChatTokenizer, count: int, fraction: float
) -> None:
    folder = damaged_shards(tmp_path / "data", count, lambda index, parts: {**parts, "0.png": b"x"})
    message = rf"{count} of {count} samples read are corrupt.*max_corrupt_fraction = {fraction}.*digits-0000"
    with pytest.raises(ValueError, match=message):
        stream(folder, tokenizer, shuffle=False, max_corrupt_fraction=fraction).next(1)


def test_too_many_corrupt_samples_stop(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    def damage(index: int, parts: Parts) -> Parts:
        return {**parts, "0.png": b"x"} if index % 10 == 0 else parts

    folder = damaged_shards(tmp_path / "data", 150, damage)
    source = stream(folder, tokenizer, max_corrupt_fraction=0.05)
    with pytest.raises(ValueError, match=r"of 100 samples read are corrupt"):
        source.next(150)
    assert source.samples_read == 100
    assert len(stream(folder, tokenizer, max_corrupt_fraction=0.2).next(150)) == 150


def test_a_shard_cut_off_is_an_error_at_the_start_and_on_the_way(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    folder = tiny_shards(tmp_path / "data", 20)
    source = stream(folder, tokenizer, shuffle=False)
    source.next(2)
    shard = folder / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2 + 700])
    with pytest.raises(ValueError, match="a shard cannot be read"):
        source.next(18)
    with pytest.raises(ValueError, match="truncated"):
        stream(folder, tokenizer)


def test_a_prompt_that_is_too_long_names_the_setting(folder: Path, tokenizer: ChatTokenizer) -> None:
    length = len(stream(folder, tokenizer).next(1)[0].token_ids)
    with pytest.raises(ValueError, match=rf"digits-\d+.*{length} tokens.*data\.max_prompt_tokens is {length - 1}"):
        stream(folder, tokenizer, max_prompt_tokens=length - 1).next(1)
    stream(folder, tokenizer, max_prompt_tokens=length).next(1)


def test_several_images_and_none(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    wide = tiny_png(1, width=400, height=32)
    several = tiny_sample(
        0,
        messages=({"role": "user", "content": "<image><image><image> which?"},),
        images={"0.png": wide, "1.png": tiny_png(2, width=32), "2.png": wide},
    )
    text = tiny_sample(1, messages=({"role": "user", "content": "1 + 1?"},), images={})
    shards.write_shards([several, text], tmp_path / "data")
    first, second = read_prompts(tmp_path / "data", tokenizer)
    # 12 tiles for three images are 4 each: the wide ones are 4x1 and a thumbnail, the square one is one tile.
    assert first.tiles_TCHW.shape[0] == 5 + 1 + 5
    assert first.token_ids.count(tokenizer.image_token_id) == 11 * TOKENS
    assert second.modality == "text"
    assert second.tiles_TCHW.shape == (0, 3, TILE, TILE)
    assert second.tiles_TCHW.dtype == torch.uint8


def test_evaluation_order_is_fixed_and_can_be_cut(folder: Path, tokenizer: ChatTokenizer) -> None:
    def read(count: int) -> list[str]:
        return [prompt.key for prompt in read_prompts(folder, tokenizer, count=count)]

    assert read(0) == [f"digits-{index:04d}" for index in range(37)]
    assert read(5) == read(0)[:5]
    with pytest.raises(ValueError, match="37 usable samples, 38 were asked for"):
        read(38)


def test_images_other_than_png(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(tiny_png(3))).save(buffer, "JPEG")
    shards.write_shards([tiny_sample(0, images={"0.jpg": buffer.getvalue()})], tmp_path / "data")
    assert stream(tmp_path / "data", tokenizer).next(1)[0].tiles_TCHW.shape[0] == 3


def test_samples_come_as_the_shards_hold_them_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    folder = tiny_shards(tmp_path / "data", 25)
    samples = list(read_shards(folder, parse_sample))
    assert samples == [tiny_sample(index) for index in range(25)]


def test_a_corrupt_record_is_no_sample(tmp_path: Path) -> None:
    def damage(index: int, parts: Parts) -> Parts:
        return parts | ({"json": b"{"} if index == 3 else {})

    broken = damaged_shards(tmp_path / "broken", 12, damage)
    assert [sample.key[-2:] for sample in read_shards(broken, parse_sample)] == [
        f"{index:02d}" for index in range(12) if index != 3
    ]
