"""Made rows as long as a recipe allows, as a data set on disk, and the model folder to go with a configuration."""

from __future__ import annotations

import io
import json
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerFast

from megatron_r1v2.checkpoint.hf.folders import INDEX_NAME
from megatron_r1v2.config.schema import DataConfig
from megatron_r1v2.data.prompts import PromptBuilder
from megatron_r1v2.data.samples import IMAGE_PLACEHOLDER, ShardSample
from megatron_r1v2.data.shards import write_shards
from megatron_r1v2.data.tokenizer import ChatTokenizer

LONG = "rehearsed-long"
"""In the keys of rows of full length, which have an image; the others are short text."""
SHORT = "rehearsed-short"
ANSWER = "8"
MARGIN = 1e6
"""Above every preference.min_margin."""
RIGHT_END = "</think>\\boxed{8}"
WRONG_END = "</think>\\boxed{7}"

_UNIT = " a"
_SHARD_BYTES = 4 * 1000**3
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>")
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
_COMPANIONS = (*_TOKENIZER_FILES, "chat_template*", "processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class RowWriter:
    """Writes rows for one model and one recipe."""

    tokenizer: ChatTokenizer
    settings: DataConfig
    tile_size: int
    tokens_per_tile: int
    max_response_tokens: int
    end_token: str

    def write(self, folder: Path, *, long: int, short: int, steps: int = 1) -> None:
        """Write a data set: for each step long rows first, then short ones."""
        write_shards(self._rows(long, short, steps), folder)

    def _rows(self, long: int, short: int, steps: int) -> Iterator[ShardSample]:
        content, image = self._longest_prompt()
        responses = {end: self._longest_response(end) for end in (RIGHT_END, WRONG_END)}
        for step in range(steps):
            for index in range(long):
                yield _sample(f"{LONG}-{step}-{index}", content, responses, {"0.png": image})
            for index in range(short):
                yield _sample(f"{SHORT}-{step}-{index}", "What is 3 + 5?", {end: end for end in responses}, {})

    def _longest_prompt(self) -> tuple[str, bytes]:
        """Return the text and the picture of a prompt with the most tiles, as long as the limit."""
        limit = self.settings.max_prompt_tokens
        for tiles in range(min(self.settings.max_tiles, max(1, limit // self.tokens_per_tile)), 0, -1):
            # A row of tiles has an aspect ratio that no smaller grid has.
            picture = Image.new("RGB", (tiles * self.tile_size, self.tile_size), (40, 90, 160))
            content = f"{IMAGE_PLACEHOLDER}\n"
            if self._prompt_tokens(content, picture) <= limit:
                return content + self._filled(content, picture), _png(picture)
        raise ValueError(
            f"data.max_prompt_tokens={limit} holds no image: one tile takes {self.tokens_per_tile} tokens and the "
            "template some more; raise it"
        )

    def _filled(self, content: str, picture: Image.Image) -> str:
        """Return the text behind the picture that fills the prompt."""
        return fill_up(lambda text: self._prompt_tokens(content + text, picture), self.settings.max_prompt_tokens)

    def _prompt_tokens(self, content: str, picture: Image.Image) -> int:
        unlimited = self.settings.changed(max_prompt_tokens=2**31)
        builder = PromptBuilder(
            settings=unlimited,
            tokenizer=self.tokenizer,
            tile_size=self.tile_size,
            tokens_per_tile=self.tokens_per_tile,
        )
        return len(builder.encode("rehearsed", ({"role": "user", "content": content},), [picture])[0])

    def _longest_response(self, end: str) -> str:
        def length(text: str) -> int:
            return len(self.tokenizer.encode_response(text + end, self.end_token))

        return fill_up(length, self.max_response_tokens) + end


def _png(picture: Image.Image) -> bytes:
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    return encoded.getvalue()


def fill_up(length: Callable[[str], int], limit: int) -> str:
    """Return a text of which a length is as near to a limit as words allow, and not above.

    Args:
        length: of a text, in tokens; about proportional to the text.
    """
    count = 0
    for _ in range(8):
        one = max(1, length(_UNIT * (count + 1)) - length(_UNIT * count))
        missing = limit - length(_UNIT * count)
        if 0 <= missing < one:
            break
        count = max(0, count + missing // one)
    while count and length(_UNIT * count) > limit:
        count -= 1
    # Where a word is two tokens, one may be left.
    return _UNIT * count + ("!" if length(_UNIT * count + "!") <= limit else "")


def _sample(key: str, content: str, responses: Mapping[str, str], images: dict[str, bytes]) -> ShardSample:
    return ShardSample(
        key=key,
        messages=({"role": "user", "content": content},),
        answer=ANSWER,
        answer_type="numeric",
        images=images,
        response=responses[RIGHT_END],
        chosen=responses[RIGHT_END],
        rejected=responses[WRONG_END],
        margin=MARGIN,
    )


def write_model_folder(folder: Path, config: Mapping[str, object], beside: Path | None) -> None:
    """Write a folder of a model whose weights are not here: headers true to the configuration, no bytes behind them.

    Args:
        config: as transformers' InternVL has it.
        beside: a folder with the model's tokenizer; None or without one: a tokenizer of single bytes is made.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    _write_hollow_weights(folder, config)
    if beside is not None:
        for path in (path for pattern in _COMPANIONS for path in beside.glob(pattern)):
            shutil.copy(path, folder / path.name)
    if not any(folder.glob("tokenizer*")):
        image_id = config["image_token_id"]
        assert isinstance(image_id, int)
        _write_byte_tokenizer(folder, image_id)


def _write_hollow_weights(folder: Path, config: Mapping[str, object]) -> None:
    """Write safetensors files that are all hole behind their headers: they take no room on the disk."""
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(InternVLConfig.from_dict(dict(config)))
    tensors = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.get("tie_word_embeddings", True) is True:
        tensors = {name: shape for name, shape in tensors.items() if not name.endswith("lm_head.weight")}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in tensors.items():
        if size > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += 2 * torch.Size(shape).numel()
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_hollow_file(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _write_hollow_file(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)


def _write_byte_tokenizer(folder: Path, image_id: int) -> None:
    """Write a tokenizer of single bytes whose <IMG_CONTEXT> has the id that the configuration says."""
    vocabulary = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    fillers = image_id - len(vocabulary) - len(_SPECIAL)
    if fillers < 0:
        raise ValueError(
            f"image_token_id={image_id} leaves no room for the {len(vocabulary) + len(_SPECIAL)} tokens of a made "
            "tokenizer; give --hf-config a folder with the model's own"
        )
    vocabulary |= {f"unused{number}": len(vocabulary) + number for number in range(fillers)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in (*_SPECIAL, "<IMG_CONTEXT>")])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in ("<think>", "</think>")])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=_CHAT_TEMPLATE
    )
    wrapped.save_pretrained(str(folder))
