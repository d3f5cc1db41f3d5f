"""Splice a vision tower, an adapter and a language model, each a Hugging Face folder, into one InternVL folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer

from megatron_r1v2.models.architecture import R1V2Architecture, r1v2_architecture
from megatron_r1v2.models.hf_files import (
    DEFAULT_SHARD_BYTES,
    SafetensorsFolder,
    check_output,
    copy_companions,
    read_json,
    replacing_folder,
    with_dtype,
    write_json,
    write_safetensors,
)
from megatron_r1v2.models.hf_mapping import HF_EMBEDDING, HF_OUTPUT, canonical_hf_name, hf_leftovers

# Roles that transformers' InternVLProcessor looks for in the tokenizer, and the token of each.
_IMAGE_TOKENS: Mapping[str, str] = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
_VISION = "vision_tower."
_ADAPTER = "multi_modal_projector."
_LANGUAGE = "language_model."
# What belongs to a component's own file and not into a part of another configuration.
_NOT_IN_PARTS = ("architectures", "transformers_version", "torch_dtype", "dtype", "auto_map", "_name_or_path")


@dataclass(frozen=True)
class Components:
    """What the whole model is spliced from, and how."""

    vision: Path
    """Folder of an `internvl_vision` model, or of a whole `internvl` one, whose tower is taken."""
    language: Path
    """Folder of a causal language model with its tokenizer."""
    adapter: Path | None = None
    """Folder or safetensors file with `multi_modal_projector.*`; None: random."""
    downsample_ratio: float = 0.5
    """0.5 makes one image token of four patches."""
    max_tiles: int = 12
    """Tiles that the image processor cuts an image into at most."""
    dtype: torch.dtype | None = None
    """Dtype of the result; None: that of the components, which must agree."""
    seed: int = 0
    """Of a random adapter."""


def reassemble(
    components: Components,
    output: Path | str,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> R1V2Architecture:
    """Write one folder that transformers loads as InternVLForConditionalGeneration.

    The embedding grows only when the image tokens do not fit into it; new rows are the mean of the others.

    Args:
        components: what to splice.
        output: the new folder.
        overwrite: whether an existing `output` is replaced.
        max_shard_bytes: size of a safetensors file.

    Returns:
        The sizes of the result.

    Raises:
        ValueError: a component is missing something, has something else, or does not fit the others.
    """
    sources = [components.vision, components.language, *([components.adapter] if components.adapter else [])]
    check_output(output, sources=sources, overwrite=overwrite)
    with replacing_folder(output) as folder, ExitStack() as stack:
        copy_companions(components.language, folder)
        image_token_id, num_tokens = _add_image_tokens(components.language, folder)
        config = _config(components, image_token_id=image_token_id, num_tokens=num_tokens)
        architecture = r1v2_architecture(config)
        loader = _Loader(components, architecture, _open(components, stack))
        dtype = loader.dtype()
        write_safetensors(folder, loader.tensors(dtype), max_shard_bytes=max_shard_bytes)
        _write_processor(folder, config, components)
        write_json(folder / "config.json", with_dtype(config, [dtype]))
    return architecture


class _Loader:
    """Reads the tensors of the result, one at a time."""

    def __init__(
        self,
        components: Components,
        architecture: R1V2Architecture,
        opened: Mapping[str, tuple[SafetensorsFolder, str]],
    ) -> None:
        self._components = components
        self._architecture = architecture
        self._opened = opened
        unused, missing = hf_leftovers(architecture, opened)
        self._random = [name for name in missing if name.startswith(_ADAPTER)] if components.adapter is None else []
        missing = [name for name in missing if name not in self._random]
        if unused or missing:
            raise ValueError(
                f"the components do not make an InternVL model: {len(unused)} tensors have no place in it "
                f"{unused[:5]}, {len(missing)} are missing {missing[:5]}; check --vision, --adapter and --language"
            )
        self._tied = architecture.language.tied_embeddings

    def dtype(self) -> torch.dtype:
        """Return the dtype of the result."""
        if self._components.dtype is not None:
            return self._components.dtype
        found = {name.split(".")[0]: folder.tensor(stored).dtype for name, (folder, stored) in self._opened.items()}
        if len(set(found.values())) > 1:
            raise ValueError(f"the components differ in dtype: {found}; choose one with --dtype")
        return next(iter(found.values()))

    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield name and tensor."""
        for name in sorted([*self._opened, *self._random]):
            if name == HF_OUTPUT and self._tied:
                self._check_repeated_output()
                continue
            if name in self._opened:
                folder, stored = self._opened[name]
                tensor = folder.tensor(stored)
            else:
                tensor = self._random_adapter(name)
            if name in (HF_EMBEDDING, HF_OUTPUT):
                tensor = _grown(tensor, self._architecture.language.vocab_size)
            yield name, tensor.to(dtype)

    def _check_repeated_output(self) -> None:
        repeated, embedding = (
            self._opened[name][0].tensor(self._opened[name][1]) for name in (HF_OUTPUT, HF_EMBEDDING)
        )
        if not torch.equal(repeated, embedding):
            raise ValueError(
                f"{self._components.language} has tie_word_embeddings=true but lm_head.weight is not the embedding; "
                "set it to false in its config.json"
            )

    def _random_adapter(self, name: str) -> torch.Tensor:
        """Draw a parameter of the adapter as transformers initialises it; each has a seed of its own."""
        inputs, hidden = self._architecture.adapter_input_size, self._architecture.language.hidden_size
        layer, kind = name.removeprefix(_ADAPTER).split(".")
        if kind == "bias":
            return torch.zeros(inputs if layer == "layer_norm" else hidden)
        if layer == "layer_norm":
            return torch.ones(inputs)
        offset = {"linear_1": 0, "linear_2": 1}[layer]
        generator = torch.Generator().manual_seed(2 * self._components.seed + offset)
        return 0.02 * torch.randn(hidden, hidden if offset else inputs, generator=generator)


def _open(components: Components, stack: ExitStack) -> dict[str, tuple[SafetensorsFolder, str]]:
    """Return where each tensor of the result is: the folder and its name there."""
    found: dict[str, tuple[SafetensorsFolder, str]] = {}
    vision = stack.enter_context(SafetensorsFolder(components.vision))
    whole = read_json(components.vision / "config.json").get("model_type") == "internvl"
    for stored in vision.names():
        name = canonical_hf_name(stored) if whole else _VISION + stored
        if name.startswith(_VISION):
            found[name] = (vision, stored)
    if components.adapter is not None:
        adapter = stack.enter_context(SafetensorsFolder(components.adapter))
        for stored in adapter.names():
            if canonical_hf_name(stored).startswith(_ADAPTER):
                found[canonical_hf_name(stored)] = (adapter, stored)
    language = stack.enter_context(SafetensorsFolder(components.language))
    for stored in language.names():
        # Old Llama files hold the rotations too, which nobody reads: they follow from the configuration.
        if not stored.endswith(".rotary_emb.inv_freq"):
            found[_LANGUAGE + stored] = (language, stored)
    return found


def _config(components: Components, *, image_token_id: int, num_tokens: int) -> dict[str, Any]:
    vision = read_json(components.vision / "config.json")
    if vision.get("model_type") == "internvl":
        vision = vision["vision_config"]
    text = read_json(components.language / "config.json")
    vision, text = ({k: v for k, v in part.items() if k not in _NOT_IN_PARTS} for part in (vision, text))
    text["vocab_size"] = max(text["vocab_size"], num_tokens)
    config: dict[str, Any] = {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "vision_config": vision,
        "text_config": text,
        "image_token_id": image_token_id,
        "downsample_ratio": components.downsample_ratio,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": bool(text.get("tie_word_embeddings", False)),
    }
    architecture = r1v2_architecture(config)
    side = architecture.vision.image_size // architecture.vision.patch_size
    if (side * components.downsample_ratio) % 1:
        raise ValueError(
            f"downsample_ratio={components.downsample_ratio} does not fit the {side} x {side} patches of a tile; "
            "choose one that gives a whole number, such as 0.5 for an even side"
        )
    config["image_seq_length"] = architecture.tokens_per_tile
    return config


def _add_image_tokens(language: Path, folder: Path) -> tuple[int, int]:
    """Add the image tokens that the copied tokenizer lacks.

    Returns:
        The id of `<IMG_CONTEXT>`, and how many rows the embedding needs.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"{language} has no tokenizer.json; save its tokenizer there with "
            "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    # The file is edited, not saved by transformers: what a tokenizer class would change on the way stays as it is.
    tokenizer = Tokenizer.from_file(str(path))
    missing = [token for token in _IMAGE_TOKENS.values() if tokenizer.token_to_id(token) is None]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in missing])
    if missing:
        tokenizer.save(str(path))
    settings_path = folder / "tokenizer_config.json"
    settings = read_json(settings_path)
    settings.update(_IMAGE_TOKENS)
    if "added_tokens_decoder" in settings:
        for token in missing:
            entry = {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
            settings["added_tokens_decoder"][str(tokenizer.token_to_id(token))] = {**entry, "special": True}
    write_json(settings_path, settings)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    return vocabulary[_IMAGE_TOKENS["context_image_token"]], max(vocabulary.values()) + 1


def _grown(matrix: torch.Tensor, num_rows: int) -> torch.Tensor:
    missing = num_rows - matrix.shape[0]
    if missing <= 0:
        return matrix
    mean = matrix.float().mean(dim=0, keepdim=True).to(matrix.dtype)
    return torch.cat([matrix, mean.expand(missing, -1)])


def _write_processor(folder: Path, config: Mapping[str, Any], components: Components) -> None:
    vision = r1v2_architecture(config).vision
    side = vision.image_size
    own = Path(components.vision) / "preprocessor_config.json"
    stated = read_json(own) if own.is_file() else {}
    common = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        # A tower that was trained with other statistics says so in its own folder.
        "image_mean": list(stated.get("image_mean", vision.pixel_mean)),
        "image_std": list(stated.get("image_std", vision.pixel_std)),
        "processor_class": "InternVLProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": side, "width": side},
    }
    image = {"crop_to_patches": True, "min_patches": 1, "max_patches": components.max_tiles}
    write_json(
        folder / "preprocessor_config.json", {**common, **image, "image_processor_type": "GotOcr2ImageProcessor"}
    )
    write_json(folder / "video_preprocessor_config.json", {**common, "video_processor_type": "InternVLVideoProcessor"})
    processor = {"processor_class": "InternVLProcessor", "image_seq_length": config["image_seq_length"]}
    write_json(folder / "processor_config.json", processor)
