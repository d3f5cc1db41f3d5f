"""Prompts: samples checked, tiled, templated and tokenized for one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image

from megatron_r1v2.config.choices import TooLong
from megatron_r1v2.config.schema import DataConfig
from megatron_r1v2.data.images import count_tiles, decode_image, tile_image, tile_limit
from megatron_r1v2.data.samples import IMAGE_PLACEHOLDER, DataError, ShardSample, parse_sample
from megatron_r1v2.data.tokenizer import ChatTokenizer
from megatron_r1v2.types import Preference, Prompt


@dataclass(frozen=True)
class PromptLength:
    """The length of a prompt, image tokens included."""

    tokens: int
    tiles: int
    max_tiles: int
    """The most tiles of each image, thumbnail not counted."""


class PromptTooLong(DataError):
    """A prompt is longer than data.max_prompt_tokens, and cannot be made shorter."""


class PromptBuilder:
    """Builder of prompts for one model.

    Args:
        tile_size: the pixels along each side of a tile: the model's image size.
    """

    def __init__(self, *, settings: DataConfig, tokenizer: ChatTokenizer, tile_size: int, tokens_per_tile: int) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._tile_size = tile_size
        self._tokens_per_tile = tokens_per_tile

    @property
    def tokenizer(self) -> ChatTokenizer:
        """Return the tokenizer."""
        return self._tokenizer

    def build(self, key: str, parts: Mapping[str, bytes]) -> Prompt | None:
        """Check, decode, tile, template and tokenize one sample.

        Args:
            parts: the contents of its files by name without the key.

        Returns:
            The prompt, or None where it is too long and data.too_long=skip.

        Raises:
            SampleError: the sample is corrupt.
            PromptTooLong: the prompt is longer than data.max_prompt_tokens, and is not to be skipped.
        """
        sample = parse_sample(key, parts)
        images = [decode_image(data, f"{key}.{name}") for name, data in sample.images.items()]
        try:
            token_ids, tiles_TCHW = self.encode(key, sample.messages, images)
        except PromptTooLong:
            if self._settings.too_long is TooLong.skip:
                return None
            raise
        return Prompt(
            key=key,
            messages=sample.messages,
            token_ids=token_ids,
            tiles_TCHW=tiles_TCHW,
            answer=sample.answer,
            answer_type=sample.answer_type,
            images=tuple(sample.images.values()),
            facts=sample.facts,
            alternatives=sample.alternatives,
            tolerances=sample.tolerances,
            metadata=sample.metadata,
            response=sample.response,
            preference=_preference(sample),
        )

    def encode(
        self, key: str, messages: Sequence[Mapping[str, str]], images: Sequence[Image.Image]
    ) -> tuple[tuple[int, ...], torch.Tensor]:
        """Tile, template and tokenize messages and their images.

        Args:
            key: the name of the prompt in an error.
            messages: chat messages with an "<image>" for each image.
            images: the images in order of appearance.

        Returns:
            Token ids, and all tiles as uint8 [T, 3, height, width].

        Raises:
            SampleError: placeholders and images differ in number, or a text contains a control token.
            PromptTooLong: the prompt is longer than data.max_prompt_tokens.
        """
        token_ids, length = self._fit(key, messages, [image.size for image in images])
        tiles = [tile_image(image, tile_size=self._tile_size, max_tiles=length.max_tiles) for image in images]
        return tuple(token_ids), torch.cat(tiles) if tiles else self._no_tiles()

    def measure(
        self, key: str, messages: Sequence[Mapping[str, str]], sizes: Sequence[tuple[int, int]]
    ) -> PromptLength:
        """Return the length that a prompt will have.

        Args:
            sizes: width and height of each image.

        Raises:
            SampleError: placeholders and images differ in number, or a text contains a control token.
            PromptTooLong: the prompt is longer than data.max_prompt_tokens.
        """
        return self._fit(key, messages, sizes)[1]

    def _fit(
        self, key: str, messages: Sequence[Mapping[str, str]], sizes: Sequence[tuple[int, int]]
    ) -> tuple[list[int], PromptLength]:
        """Tokenize a prompt, with as many tiles as it may have."""
        # Images share the tiles of a prompt, so that many images do not make it too long.
        limit = tile_limit(self._settings.max_tiles, max(1, len(sizes)))
        most, fewer = self._settings.max_prompt_tokens, self._settings.too_long is TooLong.fewer_tiles
        tiles = self._count_tiles(sizes, limit)
        token_ids = self._tokenizer.encode_prompt(messages, tiles, self._tokens_per_tile, key=key)
        text_tokens = len(token_ids) - sum(tiles) * self._tokens_per_tile
        for max_tiles in range(limit, 0, -1) if fewer else (limit,):
            fitting = self._count_tiles(sizes, max_tiles)
            if text_tokens + sum(fitting) * self._tokens_per_tile <= most:
                if fitting != tiles:
                    token_ids = self._tokenizer.encode_prompt(messages, fitting, self._tokens_per_tile, key=key)
                return token_ids, PromptLength(len(token_ids), sum(fitting), max_tiles)
        raise PromptTooLong(
            f"sample {key!r}: the prompt has {len(token_ids)} tokens ({sum(tiles)} tiles of "
            f"{self._tokens_per_tile}), data.max_prompt_tokens is {most}; "
            "raise it, lower data.max_tiles, set data.too_long to skip or fewer_tiles, or take the sample out"
        )

    def _count_tiles(self, sizes: Sequence[tuple[int, int]], max_tiles: int) -> list[int]:
        return [count_tiles(size, tile_size=self._tile_size, max_tiles=max_tiles) for size in sizes]

    def _no_tiles(self) -> torch.Tensor:
        return torch.zeros(0, 3, self._tile_size, self._tile_size, dtype=torch.uint8)


def without_images(prompt: Prompt, tokenizer: ChatTokenizer, *, prefix: Sequence[int]) -> Prompt:
    """Return a prompt without its images that ends with the beginning of a response.

    Returns:
        A prompt with a key of its own, so that its responses are sampled independently.
    """
    messages = tuple(
        {
            **message,
            "content": message["content"].replace(f"{IMAGE_PLACEHOLDER}\n", "").replace(IMAGE_PLACEHOLDER, ""),
        }
        for message in prompt.messages
    )
    template = tokenizer.encode_prompt(messages, (), 0, key=prompt.key)
    return replace(
        prompt,
        key=f"{prompt.key}/without-images",
        messages=messages,
        token_ids=(*template, *prefix),
        # Not a view of the tiles: pickled between ranks, a view would take all of them along.
        tiles_TCHW=prompt.tiles_TCHW.new_zeros((0, *prompt.tiles_TCHW.shape[1:])),
    )


def _preference(sample: ShardSample) -> Preference | None:
    if sample.chosen is None or sample.rejected is None:
        return None
    return Preference(sample.chosen, sample.rejected, sample.margin, sample.source or "")
