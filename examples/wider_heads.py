"""An exported folder with wider heads that computes the same, for vLLM on a CPU.

Its kernels take heads of 32, 64 and more channels, and the demo's have 24. Channels of zero are added to the heads and,
as Qwen2 has hidden = heads x channels, to the hidden states. A width is also in the scale of the attention, in the mean
of the norms and in the frequencies of the rotation: query, weights and epsilon of the norms, and theta make up for it.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


def widen_heads(folder: Path, output: Path, head_size: int) -> None:
    """Write a Qwen2 export in the layout of transformers with heads of `head_size` channels.

    Raises:
        ValueError: it is of another kind, in several files, or its heads are wider.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = config["text_config"]
    heads, hidden = text["num_attention_heads"], text["hidden_size"]
    narrow = hidden // heads
    single = (folder / "model.safetensors").is_file()
    plain = text.get("rope_parameters", {}).get("rope_type") == "default"
    if text["model_type"] != "qwen2" or not (single and plain) or narrow > head_size or hidden % heads:
        raise ValueError(f"{folder}: only a Qwen2 export of one file, with plain RoPE and heads up to {head_size}")
    shutil.copytree(folder, output, ignore=shutil.ignore_patterns("*.safetensors", "checkpoint_manifest.json"))
    wider = _Wider(narrow, head_size, hidden, heads * head_size)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: wider.change(name, tensor) for name, tensor in tensors.items()}, output / "model.safetensors")
    text["hidden_size"] = heads * head_size
    text["rms_norm_eps"] *= hidden / text["hidden_size"]
    text["rope_parameters"]["rope_theta"] **= head_size / narrow
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class _Wider:
    def __init__(self, narrow: int, head_size: int, hidden: int, wider_hidden: int) -> None:
        self.narrow, self.head_size, self.hidden, self.wider_hidden = narrow, head_size, hidden, wider_hidden

    def change(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the wider model."""
        module, kind = name.split(".")[-2:]
        if "vision" in name:
            return tensor
        if "multi_modal_projector" in name:
            # Between its two layers it is as wide as the hidden states, and gelu(0) = 0.
            tensor = self._hidden(tensor, 0) if module.startswith("linear") else tensor
            return self._hidden(tensor, 1) if (module, kind) == ("linear_2", "weight") else tensor
        if module in ("q_proj", "k_proj", "v_proj"):
            tensor = self._heads(tensor, 0) if kind == "bias" else self._hidden(self._heads(tensor, 0), 1)
            # softmax(q k / sqrt(channels))
            return tensor * math.sqrt(self.head_size / self.narrow) if module == "q_proj" else tensor
        if module == "o_proj":
            return self._hidden(self._heads(tensor, 1), 0)
        if module == "down_proj":
            return self._hidden(tensor, 0)
        if tensor.dim() == 1:
            # x / sqrt(mean(x^2) + epsilon), the mean over more channels.
            return self._hidden(tensor, 0) * math.sqrt(self.hidden / self.wider_hidden)
        return self._hidden(tensor, 1)

    def _hidden(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return _with_zeros(tensor, dim, self.wider_hidden - self.hidden)

    def _heads(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        # The rotation turns a channel of the first half with that of the second: each half gets its own zeros.
        halves = tensor.unflatten(dim, (-1, self.narrow // 2))
        return _with_zeros(halves, dim + 1, (self.head_size - self.narrow) // 2).flatten(dim, dim + 1)


def _with_zeros(tensor: torch.Tensor, dim: int, count: int) -> torch.Tensor:
    shape = list(tensor.shape)
    shape[dim] = count
    return torch.cat([tensor, tensor.new_zeros(shape)], dim).contiguous()
