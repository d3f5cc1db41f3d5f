"""The model's own tokenizer and chat template, which every special id comes from."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_r1v2.data.samples import IMAGE_PLACEHOLDER, THINK, THINK_END, SampleError, count_placeholders

IMAGE_START = "<img>"
IMAGE_CONTEXT = "<IMG_CONTEXT>"
IMAGE_END = "</img>"
# Answers are made of them, so they stay text even where a tokenizer marks them as special.
_REASONING = (THINK, THINK_END)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a local HF folder with transformers.

    Raises:
        OSError, ValueError, KeyError, TypeError: as transformers raises them, for files that are missing or damaged.
    """
    # transformers looks for the tokenizer's class in config.json too. It knows no `skywork_chat` or `internvl_chat`,
    # and warns that the model "can yield errors". But we read that model ourselves: only this message is left out.
    log = logging.getLogger("transformers.configuration_utils")
    log.addFilter(_is_not_about_the_model_type)
    try:
        # Nothing is downloaded, and no code of a checkpoint runs.
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    finally:
        log.removeFilter(_is_not_about_the_model_type)


def _is_not_about_the_model_type(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("You are using a model of type")


class ChatTokenizer:
    """A tokenizer with a chat template, from a local HF folder.

    Raises:
        ValueError: the folder, its tokenizer or its chat template is missing.
    """

    def __init__(self, hf_path: str | Path) -> None:
        folder = Path(hf_path)
        if not folder.is_dir():
            raise ValueError(f"tokenizer folder {str(hf_path)!r} does not exist; give the folder of the HF model")
        try:
            self._tokenizer = load_tokenizer(folder)
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder}: no tokenizer can be loaded from it: {error}") from error
        if not self._tokenizer.chat_template:
            raise ValueError(f"{folder}: the tokenizer has no chat template; add chat_template.jinja of the model")
        self._folder = folder

    @property
    def vocab_size(self) -> int:
        """Return the number of tokens, added ones included; the model's embedding may have more rows."""
        return len(self._tokenizer)

    @functools.cached_property
    def image_token_id(self) -> int:
        """Return the id of `<IMG_CONTEXT>`."""
        return self.token_id(IMAGE_CONTEXT)

    @property
    def pad_id(self) -> int:
        """Return the id of the padding token."""
        pad = self._tokenizer.pad_token_id
        if pad is None:
            raise ValueError(f"{self._folder}: the tokenizer has no pad token; set pad_token in tokenizer_config.json")
        return int(pad)

    @functools.cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """Return the tokens that no text may contain: of images, and of the beginnings and ends of turns and texts."""
        # A model may have more special tokens, such as "<ref>" and "<box>" of its training data. These are plain text.
        template, turns = str(self._tokenizer.chat_template), self._written_turns()
        ends = {self._tokenizer.bos_token, self._tokenizer.eos_token, self._tokenizer.pad_token}
        ends.update(self._tokenizer.convert_ids_to_tokens(list(self.end_ids)))
        marks = []
        for token in self._tokenizer.added_tokens_decoder.values():
            text = str(token)
            # DeepSeek's marks of a turn are added tokens with special=false: a turn has them, whatever is said in it.
            of_turn = not text.isspace() and not text[:1].isalnum() and text in turns
            if of_turn or (token.special and (text in template or text in ends)):
                marks.append(text)
        marks = [text for text in marks if text not in _REASONING]
        return tuple(dict.fromkeys((IMAGE_START, IMAGE_CONTEXT, IMAGE_END, *marks)))

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Return the ids of control tokens and of all others that the tokenizer marks as special."""
        added = self._tokenizer.added_tokens_decoder.items()
        return frozenset(number for number, token in added if token.special or str(token) in self.control_tokens)

    def special_ids_of(self, texts: Sequence[str]) -> frozenset[int]:
        """Return the ids of those texts that are special tokens."""
        added = self._tokenizer.added_tokens_decoder
        return frozenset(number for number in self.special_ids if str(added[number]) in texts)

    @property
    def digest(self) -> str:
        """Return a digest of what makes ids of texts: the vocabulary, the chat template, the ends of responses."""
        parts = [self._tokenizer.get_vocab(), self._tokenizer.chat_template, self.end_ids]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @functools.cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Return the ids that end a response by generation_config.json; where it names none, the tokenizer's own end.

        Raises:
            ValueError: the file is damaged.
        """
        path = self._folder / "generation_config.json"
        try:
            stated = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(stated, dict):
            raise ValueError(f"{path} is not valid JSON: it holds a {type(stated).__name__}, not an object")
        named = stated.get("eos_token_id")
        ids = named if isinstance(named, list) else [] if named is None else [named]
        if not all(type(number) is int and number >= 0 for number in ids):
            raise ValueError(f"{path} has eos_token_id={str(named)[:200]}; accepted: a token's id, or a list of them")
        own = self._tokenizer.eos_token_id
        # Ids beyond the tokenizer are never drawn.
        known = [number for number in ids if number < self.vocab_size]
        return tuple(known or ([] if own is None else [int(own)]))

    def token_id(self, text: str) -> int:
        """Return the id of a text that is one token, such as "<|im_end|>".

        Raises:
            ValueError: the tokenizer splits the text into more or fewer than one token.
        """
        ids = self._encode(text)
        if len(ids) != 1:
            raise ValueError(f"{self._folder}: {text!r} must be one token of the tokenizer, it is {len(ids)}: {ids}")
        return ids[0]

    def stop_ids(self, texts: Sequence[str]) -> list[int]:
        """Return the ids of the tokens that end a response: those given, then those of the model's folder.

        Args:
            texts: `generation.stop_tokens`.

        Raises:
            ValueError: a text is not exactly one token, or there is no token at all.
        """
        try:
            ids = [self.token_id(text) for text in texts]
        except ValueError as error:
            raise ValueError(f"generation.stop_tokens={list(texts)}: {error}") from error
        if not (ids := list(dict.fromkeys((*ids, *self.end_ids)))):
            raise ValueError(
                f"generation.stop_tokens is empty, and neither generation_config.json nor the tokenizer of "
                f"{self._folder} names a token that ends a response; name one, such as '<|im_end|>'"
            )
        return ids

    def turn_end(self, texts: Sequence[str]) -> str:
        """Return the token that a given response is taught to end with.

        Args:
            texts: `generation.stop_tokens`, whose first is taken; none: the tokenizer's own end where that ends a
                response, else the first token that does.
        """
        own, ids = self._tokenizer.eos_token_id, self.stop_ids(texts)
        end = own if own in ids and not texts else ids[0]
        return str(self._tokenizer.convert_ids_to_tokens(end))

    def describe_ends(self, ids: Sequence[int]) -> str:
        """Return a sentence about the tokens that end a response."""
        named = ", ".join(f"{self._tokenizer.convert_ids_to_tokens(number)} ({number})" for number in ids)
        own, number = self._tokenizer.eos_token, self._tokenizer.eos_token_id
        advice = f"; {own} ({number}) does not, unless generation.stop_tokens names it"
        return f"a response ends with {named}{'' if number is None or number in ids else advice}"

    def encode_prompt(
        self,
        messages: Sequence[Mapping[str, str]],
        tiles_per_image: Sequence[int],
        tokens_per_tile: int,
        *,
        key: str = "",
    ) -> list[int]:
        """Template and tokenize a prompt up to the beginning of the response.

        Each `<image>` becomes `<img>`, `<IMG_CONTEXT>` x tiles x tokens_per_tile, `</img>`.

        Args:
            tiles_per_image: the tiles of each image, thumbnail included, in order of appearance.
            tokens_per_tile: the image tokens of one tile (256 for 448 pixels).
            key: the sample's key, for errors.

        Raises:
            SampleError: placeholders and images differ in number, or a text contains a control token.
            ValueError: the chat template changes the messages.
        """
        placeholders = count_placeholders(messages)
        if placeholders != len(tiles_per_image):
            raise SampleError(
                f"sample {key!r}: the messages have {placeholders} {IMAGE_PLACEHOLDER} "
                f"and there are {len(tiles_per_image)} images"
            )
        tiles = iter(tiles_per_image)
        expanded = []
        for message in messages:
            # A control token in a text would end the turn, or stand for an image that does not exist.
            self._refuse(message["content"], self.control_tokens, key)
            text, *rest = message["content"].split(IMAGE_PLACEHOLDER)
            for piece in rest:
                text += IMAGE_START + IMAGE_CONTEXT * (next(tiles) * tokens_per_tile) + IMAGE_END + piece
            expanded.append({**message, "content": text})
        # The template adds its special tokens as text, so encoding must not add others.
        prompt = self._tokenizer.apply_chat_template(expanded, tokenize=False, add_generation_prompt=True)
        ids = self._encode(prompt)
        if tiles_per_image:
            # Otherwise a template that trims or drops contents would surface as a shape error deep in the model.
            wanted, got = sum(tiles_per_image) * tokens_per_tile, ids.count(self.image_token_id)
            if got != wanted:
                raise ValueError(
                    f"sample {key!r}: the templated prompt has {got} {IMAGE_CONTEXT} tokens where its images need "
                    f"{wanted}; the chat template of {self._folder} does not keep the contents as they are"
                )
        return ids

    @functools.cached_property
    def opens_think(self) -> bool:
        """Return whether the template begins each response with `<think>`."""
        question = [{"role": "user", "content": "a"}]
        prompt = self._tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        return str(prompt).rstrip().endswith(THINK)

    def without_second_think(self, text: str) -> str:
        """Return a response without the `<think>` at its beginning that the template gives already."""
        rest = text.lstrip().removeprefix(THINK)
        return rest.removeprefix("\n") if self.opens_think and text.lstrip().startswith(THINK) else text

    def encode_response(self, text: str, end_token: str, *, key: str = "") -> list[int]:
        """Tokenize a reference response and its end token; a `<think>` that the template gives is not given twice.

        Args:
            text: the response, without the end-of-turn token.
            end_token: the token that ends a response: the first of generation.stop_tokens.
            key: the sample's key, for errors.

        Returns:
            Token ids, the last that of `end_token`.

        Raises:
            SampleError: the text contains the end token or another control token.
            ValueError: `end_token` is not one token.
        """
        self._refuse(text, (*self.control_tokens, end_token), key)
        text = self.without_second_think(text)
        return [*self._encode(text), self.token_id(end_token)]

    def encode_text(self, text: str) -> list[int]:
        """Tokenize a response of a model, without an end token."""
        # Control tokens are allowed here and become one token each, as the model sampled them.
        return self._encode(text)

    def without_control(self, text: str) -> str:
        """Return a text without control tokens, and without those that taking one out puts together."""
        while found := [token for token in self.control_tokens if token in text]:
            for token in found:
                text = text.replace(token, "")
        return text

    def is_same_as(self, other: ChatTokenizer) -> bool:
        """Return whether two tokenizers have the same vocabulary, special tokens and chat template."""
        return all(
            getattr(self._tokenizer, name) == getattr(other._tokenizer, name)
            for name in ("chat_template", "pad_token", "eos_token")
        ) and dict(self._tokenizer.get_vocab()) == dict(other._tokenizer.get_vocab())

    def decode(self, ids: Sequence[int], keep_special: bool = True) -> str:
        """Decode token ids to text, with or without the special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=not keep_special))

    def _written_turns(self) -> str:
        """Return plain turns as the chat template writes them."""
        system, user, answer = ({"role": role, "content": "a"} for role in ("system", "user", "assistant"))
        written = ""
        for messages in ([user, answer, user], [system, user]):
            # A template may refuse a role or an order; the prompts of a run have those that it takes.
            with suppress(TemplateError):
                written += str(self._tokenizer.apply_chat_template(messages, tokenize=False))
        return written

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    @staticmethod
    def _refuse(text: str, forbidden: Sequence[str], key: str) -> None:
        for token in forbidden:
            if token in text:
                raise SampleError(
                    f"sample {key!r}: the text contains {token!r}, which the model would read as a token of its own; "
                    f"mark images by {IMAGE_PLACEHOLDER} and leave control tokens to the template"
                )
