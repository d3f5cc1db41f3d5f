"""Samples as prompts, and prompts whose images are taken away."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image

from megatron_r1v2.config.schema import DataConfig
from megatron_r1v2.data.prompts import PromptBuilder, PromptTooLong, without_images
from megatron_r1v2.data.samples import encode_record
from megatron_r1v2.data.tokenizer import ChatTokenizer
from tests.tiny import tiny_sample, tiny_tokenizer


def test_a_prompt_without_its_images_is_the_question_alone_and_goes_on_from_the_prefix(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(tiny_tokenizer(tmp_path))
    picture = io.BytesIO()
    Image.new("RGB", (96, 32)).save(picture, format="PNG")
    content = "<image>\nWhat is left + right? <image>"
    sample = tiny_sample(
        17,
        messages=({"role": "user", "content": content},),
        images={"0.png": picture.getvalue(), "1.png": picture.getvalue()},
    )
    builder = PromptBuilder(settings=DataConfig(), tokenizer=tokenizer, tile_size=32, tokens_per_tile=4)
    prompt = builder.build(sample.key, {"json": encode_record(sample), **sample.images})
    assert prompt.tiles_TCHW.shape[0] == 8
    prefix = tokenizer.encode_response("left 7, ", "<|im_end|>")[:-1]
    blind = without_images(prompt, tokenizer, prefix=prefix)
    assert tokenizer.decode(blind.token_ids) == (
        "<|im_start|>user\nWhat is left + right? <|im_end|>\n<|im_start|>assistant\n<think>\nleft 7, "
    )
    assert blind.token_ids[-len(prefix) :] == tuple(prefix)
    assert (blind.modality, blind.answer, blind.facts) == ("text", prompt.answer, prompt.facts)
    assert blind.key != prompt.key
    assert blind.tiles_TCHW.shape == (0, 3, 32, 32)
    assert blind.tiles_TCHW.dtype == torch.uint8
    # It travels between ranks: without the tiles it came from.
    assert len(pickle.dumps(blind)) < prompt.tiles_TCHW.numel()


def test_a_prompt_that_is_too_long_is_refused_left_out_or_cut_into_fewer_tiles(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(tiny_tokenizer(tmp_path))
    picture = io.BytesIO()
    Image.new("RGB", (128, 96)).save(picture, format="PNG")
    content = "<image>\nWhat is left + right? <image>"
    sample = tiny_sample(
        17,
        messages=({"role": "user", "content": content},),
        images={"0.png": picture.getvalue(), "1.png": picture.getvalue()},
    )

    def build(**settings: object) -> tuple[int, int] | None:
        builder = PromptBuilder(
            settings=DataConfig(max_tiles=12, **settings), tokenizer=tokenizer, tile_size=32, tokens_per_tile=10
        )
        prompt = builder.build(sample.key, {"json": encode_record(sample), **sample.images})
        sizes = [(128, 96), (128, 96)]
        if prompt is None:
            with pytest.raises(PromptTooLong):
                builder.measure(sample.key, sample.messages, sizes)
            return None
        length = builder.measure(sample.key, sample.messages, sizes)
        assert length.tokens == len(prompt.token_ids)
        assert length.tiles == prompt.tiles_TCHW.shape[0]
        return length.tokens, length.tiles

    whole = build()
    assert whole is not None
    tokens, tiles = whole
    assert build(too_long="fewer_tiles", max_prompt_tokens=tokens) == whole
    for mode in ("error", "skip", "fewer_tiles"):
        assert build(too_long=mode, max_prompt_tokens=tokens) == whole
    with pytest.raises(PromptTooLong, match=rf"{tokens} tokens \({tiles} tiles of 10\).*is {tokens - 1}; raise it"):
        build(max_prompt_tokens=tokens - 1)
    assert build(too_long="skip", max_prompt_tokens=tokens - 1) is None
    reduced = build(too_long="fewer_tiles", max_prompt_tokens=tokens - 1)
    assert reduced is not None
    assert reduced[0] < tokens
    assert reduced[1] < tiles
    least = tokens - 10 * tiles + 20
    assert build(too_long="fewer_tiles", max_prompt_tokens=least) == (least, 2)
    with pytest.raises(PromptTooLong, match=rf"sample '{sample.key}': the prompt has {tokens} tokens"):
        build(too_long="fewer_tiles", max_prompt_tokens=least - 1)
