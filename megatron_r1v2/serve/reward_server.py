"""Skywork-VL-Reward as it was released, Qwen2.5-VL and a value head, behind /pooling and /classify as vLLM has them."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from megatron_r1v2.checkpoint.hf.folders import SafetensorsFolder, read_json
from megatron_r1v2.serve.messages import Turn, read_messages
from megatron_r1v2.serve.web import BODIES_AT_ONCE, RequestError, check_key, web_app
from megatron_r1v2.serve.web import read_json as read_body

HEAD_FILE = "value_head.safetensors"
HEAD_WEIGHT, HEAD_BIAS = "v_head.summary.weight", "v_head.summary.bias"
ARCHITECTURE = "qwen2_5_vl"
IMAGE_TOKEN, IMAGE_START, IMAGE_END = "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"


class SkyworkReward:
    """score = w . h + b at the last token of the templated conversation, h after the final norm."""

    def __init__(self, folder: Path | str, *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> None:
        """Load the folder; safetensors only, and no code that it brings along.

        Args:
            dtype: of the model; the head computes in float32.

        Raises:
            ValueError: the folder is not such a checkpoint.
        """
        self.folder = Path(folder)
        kind = read_json(self.folder / "config.json").get("model_type")
        if kind != ARCHITECTURE:
            raise ValueError(f"{folder}: config.json has model_type={kind!r}; this server loads {ARCHITECTURE!r}")
        self.weight_1H, self.bias_1 = (tensor.to(device) for tensor in _read_head(self.folder / HEAD_FILE))
        local = {"local_files_only": True, "trust_remote_code": False}
        options = {"dtype": dtype, "use_safetensors": True, **local}
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(str(folder), **options)
        hidden_size = model.config.text_config.hidden_size
        if self.weight_1H.shape != (1, hidden_size):
            raise ValueError(
                f"{folder}: {HEAD_WEIGHT} is {list(self.weight_1H.shape)} and the hidden size is {hidden_size}; "
                "the head is of another model"
            )
        self.max_tokens = int(model.config.text_config.max_position_embeddings)
        self._model = model.model.to(device).eval()  # without the language model's output layer
        self._tokenizer = AutoTokenizer.from_pretrained(str(folder), **local)
        if not self._tokenizer.chat_template:
            raise ValueError(f"{folder}: the tokenizer has no chat template; copy chat_template.json(jinja) beside it")
        self._images = AutoImageProcessor.from_pretrained(str(folder), **local)
        self._image_id = int(self._tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
        self._lock = threading.Lock()

    @torch.inference_mode()
    def score(self, turns: Sequence[Turn]) -> tuple[float, int]:
        """Return the raw score of the last turn of a conversation, and the number of tokens that were read.

        Raises:
            RequestError: the last turn is not the assistant's, or there are too many tokens.
        """
        if turns[-1].role != "assistant":
            raise RequestError(f"the last message must be the assistant's, which is scored; got {turns[-1].role!r}")
        inputs = self._inputs(turns)
        tokens = int(inputs["input_ids"].shape[1])
        if tokens > self.max_tokens:
            raise RequestError(f"the conversation has {tokens} tokens; accepted: at most {self.max_tokens}", 413)
        with self._lock:  # one forward pass at a time: two would only share the device, and its memory
            inputs = {name: tensor.to(self._model.device) for name, tensor in inputs.items()}
            hidden_H = self._model(**inputs, use_cache=False).last_hidden_state[0, -1].float()
        return float(self.weight_1H[0] @ hidden_H + self.bias_1[0]), tokens

    def _inputs(self, turns: Sequence[Turn]) -> dict[str, torch.Tensor]:
        """Template, tokenize and cut the images; each image token is repeated as often as its image has patches."""
        images = [part for turn in turns for part in turn.parts if not isinstance(part, str)]
        messages = [{"role": turn.role, "content": [_template_part(part) for part in turn.parts]} for turn in turns]
        text = self._tokenizer.apply_chat_template(messages, tokenize=False)
        if text.count(IMAGE_TOKEN) != len(images):
            made = f"made {text.count(IMAGE_TOKEN)} {IMAGE_TOKEN} of {len(images)} images"
            raise RequestError(f"the chat template of {self.folder.name} {made}; images belong into user messages")
        vision: dict[str, torch.Tensor] = {}
        if images:
            cut = self._images(images=images, return_tensors="pt")
            vision = {"pixel_values": cut["pixel_values"], "image_grid_thw": cut["image_grid_thw"]}
            counts = (cut["image_grid_thw"].prod(dim=1) // self._images.merge_size**2).tolist()
            head, *rest = text.split(IMAGE_TOKEN)
            text = head + "".join(IMAGE_TOKEN * count + piece for count, piece in zip(counts, rest, strict=True))
        ids = torch.tensor([self._tokenizer.encode(text, add_special_tokens=False)])
        if images:
            vision["mm_token_type_ids"] = (ids == self._image_id).int()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **vision}


def _template_part(part: str | Image.Image) -> dict[str, str]:
    if not isinstance(part, str):
        return {"type": "image"}
    for token in (IMAGE_TOKEN, IMAGE_START, IMAGE_END):
        # A response may spell anything; it must not become the place of an image that is not there.
        part = part.replace(token, f"{token[0]} {token[1:]}")
    return {"type": "text", "text": part}


def _read_head(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    if not path.is_file():
        raise ValueError(f"{path} is missing; copy the folder of Skywork-VL-Reward again, with its value head")
    with SafetensorsFolder(path) as head:
        if head.names() != sorted((HEAD_WEIGHT, HEAD_BIAS)):
            raise ValueError(f"{path} holds {head.names()}; a value head has {HEAD_WEIGHT} and {HEAD_BIAS}")
        weight_1H, bias_1 = head.tensor(HEAD_WEIGHT).float(), head.tensor(HEAD_BIAS).float()
    if weight_1H.dim() != 2 or bias_1.shape != (1,):
        raise ValueError(f"{path}: weight {list(weight_1H.shape)}, bias {list(bias_1.shape)}; expected [1, H] and [1]")
    return weight_1H, bias_1


def reward_app(scorer: SkyworkReward, *, max_body_mib: float, api_key: str = "") -> Starlette:
    """Return the ASGI application.

    Args:
        api_key: that clients must send; empty: none.
    """
    name = scorer.folder.name
    # Held until the score is there: the requests behind wait unread, which costs no memory.
    bodies = asyncio.Semaphore(BODIES_AT_ONCE)

    async def answer(request: Request, prefix: str, item_of: Callable[[float], Mapping[str, object]]) -> JSONResponse:
        check_key(request, api_key)
        async with bodies:
            content = await read_body(request)
            if content.get("use_activation"):
                raise RequestError("use_activation=true: this server gives raw scores only; send false")
            if content.get("model") not in (None, name):
                raise RequestError(f"model={content['model']!r} is not here; this server has {name!r}", 404)
            # Decoding images takes a while too: neither may hold up the event loop, which answers /health.
            turns = await run_in_threadpool(read_messages, content.get("messages"))
            score, tokens = await run_in_threadpool(scorer.score, turns)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
        frame = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": "list", "created": int(time.time())}
        return JSONResponse({**frame, "model": name, "data": [item_of(score)], "usage": usage})

    async def pooling(request: Request) -> JSONResponse:
        return await answer(request, "pool", lambda score: {"index": 0, "object": "pooling", "data": [score]})

    async def classify(request: Request) -> JSONResponse:
        item = {"index": 0, "label": "LABEL_0", "num_classes": 1}
        return await answer(request, "classify", lambda score: {**item, "probs": [score]})

    async def health(_: Request) -> JSONResponse:
        return JSONResponse({"status": "ok", "model": name})

    routes = [
        Route("/pooling", pooling, methods=["POST"]),
        Route("/classify", classify, methods=["POST"]),
        Route("/health", health, methods=["GET"]),
    ]
    return web_app(routes, max_body_mib=max_body_mib)
