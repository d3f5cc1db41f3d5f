"""Refusals: the closed list of what transformers loads and this package does not, and folders that are no model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch

from megatron_r1v2.config.validate import download_hint

Kind = Literal[
    "quantized weights",
    "LoRA adapters",
    "pickled weights",
    "two sets of weights",
    "mixed dtypes",
    "superfluous tensors",
    "model family",
    "mixture of experts",
    "rotations",
    "sliding window",
    "biases",
    "activation",
    "vision settings",
    "resized positions",
    "uneven sizes",
    "image token",
]
"""Everything else that is refused is refused by transformers too; docs/checkpoints.md says what to do about each."""
_QUANTIZED = {
    "awq": "AWQ",
    "gptq": "GPTQ",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "compressed-tensors": "compressed-tensors",
    "bitsandbytes": "bitsandbytes",
}
# Endings of tensor names that only these kinds of folders have.
_QUANTIZED_NAMES = {
    ".qweight": "AWQ or GPTQ",
    ".qzeros": "AWQ or GPTQ",
    ".weight_scale_inv": "FP8",
    ".weight_scale": "FP8",
    ".weight_packed": "compressed-tensors",
}
_LORA_NAMES = (".lora_A.", ".lora_B.", ".lora_A.weight", ".lora_B.weight")


class Unsupported(ValueError):
    """A model that transformers loads and this package does not."""

    def __init__(self, kind: Kind, sentence: str) -> None:
        super().__init__(kind, sentence)
        self.kind = kind

    def __str__(self) -> str:
        return str(self.args[1])


def check_folder(folder: Path | str) -> None:
    """Refuse a path that is not there, and a folder of LoRA adapters.

    Raises:
        ValueError: with the command that downloads the model, where the path looks like its name on the hub.
    """
    path = Path(folder)
    if not path.exists():
        hint = download_hint(folder) or "; give the folder of a Hugging Face checkpoint"
        raise ValueError(f"{folder} is missing{hint}")
    if (path / "adapter_config.json").is_file():
        raise Unsupported(
            "LoRA adapters",
            f"{folder} holds LoRA adapters (adapter_config.json); merge them into their base model first, with "
            "peft's merge_and_unload() and save_pretrained()",
        )


def check_config(config: Mapping[str, object], folder: Path | str) -> None:
    """Refuse quantized weights by what config.json says of them.

    Raises:
        Unsupported: with the kind of quantization.
    """
    parts = (config, *(config.get(key) for key in ("llm_config", "text_config", "vision_config")))
    for part in parts:
        stated = part.get("quantization_config") if isinstance(part, Mapping) else None
        if stated:
            method = stated.get("quant_method") if isinstance(stated, Mapping) else stated
            raise _quantized(folder, _QUANTIZED.get(str(method), str(method)[:40]), "quantization_config")


def check_tensors(dtypes: Mapping[str, torch.dtype], folder: Path | str) -> None:
    """Refuse quantized weights and LoRA adapters by the names and dtypes of their tensors.

    Raises:
        Unsupported: with what they are.
    """
    for name, dtype in dtypes.items():
        for ending, kind in _QUANTIZED_NAMES.items():
            if name.endswith(ending):
                raise _quantized(folder, kind, name)
        if dtype.is_floating_point and dtype.itemsize == 1:
            raise _quantized(folder, "FP8", f"{name} is {dtype}")
        if any(mark in name for mark in _LORA_NAMES):
            raise Unsupported(
                "LoRA adapters",
                f"{folder} holds LoRA adapters ({name}); merge them into their base model first, with peft's "
                "merge_and_unload() and save_pretrained()",
            )


def _quantized(folder: Path | str, kind: str, found: str) -> Unsupported:
    return Unsupported(
        "quantized weights",
        f"{folder} holds weights quantized by {kind} ({found}), which are not read; give the folder of the model "
        "before quantization, in bf16, fp16 or fp32",
    )
