"""Folders as people have them, generated: what transformers loads, we load with the same logits, or refuse in words.

transformers is the oracle, for the chat layouts with the same tensors under its own names. A folder's config.json is
complete or lacks keys, its rotations stand in either place and are of any kind, its embeddings are tied or not,
whatever the tensors say.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from megatron_r1v2.checkpoint.hf.config import read_hf_architecture
from megatron_r1v2.checkpoint.hf.refusals import Kind, Unsupported
from megatron_r1v2.checkpoint.hf.weights import check_hf_tensors, load_hf_weights
from megatron_r1v2.config.layout import UnevenSizes
from megatron_r1v2.config.schema import ParallelConfig
from megatron_r1v2.models.r1v2 import build_r1v2
from megatron_r1v2.models.settings import ComputeSettings
from megatron_r1v2.parallel import groups
from tests.checkpoint.published_folders import (
    first_pixel_shuffle,
    oracle_config,
    published_config,
    write_published_folder,
)
from tests.ranks import run_ranks
from tests.tiny_hf import tiny_hf_model, tiny_vision_config

HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
ROPES: tuple[dict[str, Any], ...] = (
    {},
    {"rope_theta": 5000.5},
    {"rope_theta": 1e6, "rope_scaling": None},
    {"rope_theta": 1e6, "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}},
    {"rope_theta": 1e4, "rope_scaling": {"factor": 2.0, "type": "dynamic"}},
    {"rope_scaling": {"type": "linear", "factor": 1.0}},
    {"rope_scaling": {"type": "linear", "factor": 3.0}, "rope_theta": 500},
    {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, "rope_theta": 1e4},
    {"rope_parameters": {"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e5}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        "rope_theta": 1e4,
    },
    {"rope_scaling": {"rope_type": "longrope", "factor": 2.0, "long_factor": [1.0] * 12, "short_factor": [1.0] * 12}},
)
# Keys that not every folder has: they come last where keys are counted, so that the others have the same numbers.
NOT_IN_ALL = {
    "attention_bias",
    "head_dim",
    "layer_types",
    "max_window_layers",
    "mlp_bias",
    "pretraining_tp",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
    "use_sliding_window",
}
TEXTS = (Qwen2Config, Qwen3Config, LlamaConfig)


Parts = tuple[InternVLVisionConfig, Any]
Layout = Literal["transformers", "chat"]


@dataclass(frozen=True)
class Case:
    """One generated folder, the seed that made it, and the same model as transformers has it."""

    folder: Path
    seed: int
    oracle: Path | None
    """None: nothing of transformers is this model."""
    pixel_shuffle: str = "v2"


def write_case(folder: Path, seed: int) -> Case:
    """Write a folder: a model that transformers saves, then a config.json and tensors as some tool left them."""
    draw = random.Random(seed)
    vision, text = draw_parts(draw)
    tiny_hf_model(folder, vision=vision, text=text, seed=seed)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change_config(config, draw, seed)
    path.write_text(json.dumps(config))
    change_tensors(folder / "model.safetensors", draw, seed)
    return Case(folder, seed, folder)


def write_chat_case(folder: Path, seed: int) -> Case:
    """Write a folder as OpenGVLab or Skywork has it, changed in the same ways, and transformers' model of it beside."""
    draw = random.Random(seed)
    vision, text = draw_parts(draw)
    oracle, published = folder / "oracle", folder / "published"
    tiny_hf_model(oracle, vision=vision, text=text, seed=seed)
    change_tensors(oracle / "model.safetensors", draw, seed)
    config = published_config(draw.choice(("internvl", "skywork")), vision, text)
    config["ps_version"] = draw.choice(("v1", "v2", "v2"))
    change_config(config, draw, seed)
    write_published_folder(published, config, oracle)
    found = oracle_config(config)
    if found is None:
        return Case(published, seed, None)
    (oracle / "config.json").write_text(json.dumps(found[0]))
    return Case(published, seed, oracle, found[1])


def draw_parts(draw: random.Random) -> Parts:
    """Draw a vision tower and a language model."""
    kind = draw.choice(TEXTS)
    heads = draw.choice((2, 4))
    text = kind(
        vocab_size=draw.choice((300, 302)),
        hidden_size=96,
        intermediate_size=draw.choice((128, 192)),
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=draw.choice((2, heads)),
        head_dim=24,
        max_position_embeddings=draw.choice((64, 2048)),
        rms_norm_eps=draw.choice((1e-5, 1e-6)),
        bos_token_id=None,
        tie_word_embeddings=draw.random() < 0.4,
    )
    return tiny_vision_config(draw.choice(("300m", "6b")), heads=draw.choice((2, 4))), text


def change_config(config: dict[str, Any], draw: random.Random, seed: int) -> None:
    """Change the rotations; then every second seed loses a key, each of them in turn, and the others change ties."""
    language = config["text_config" if "text_config" in config else "llm_config"]
    if draw.random() < 0.7:
        for key in ("rope_parameters", "rope_theta", "rope_scaling"):
            language.pop(key, None)
        language.update(json.loads(json.dumps(draw.choice(ROPES))))
    if seed % 2:
        parts = (config, language, config["vision_config"])
        keys = sorted(((n < 2 and key in NOT_IN_ALL, n, key) for n, part in enumerate(parts) for key in part))
        _, n, key = keys[seed // 2 % len(keys)]
        del parts[n][key]
        return
    for level in (config, language):
        said = draw.choice((True, False, None, "as it is"))
        if said != "as it is":
            level.pop("tie_word_embeddings", None)
            if said is not None:
                level["tie_word_embeddings"] = said


def change_tensors(path: Path, draw: random.Random, seed: int) -> None:
    """Change which of embedding and output matrix are there, and whether they are equal, where no key is lost."""
    tensors = load_file(path)
    change = draw.choice(("none", "none", "repeat", "differ", "head only", "no head")) if not seed % 2 else "none"
    if change in ("repeat", "differ", "head only"):
        tensors.setdefault(HEAD, tensors[EMBEDDING].clone())
    if change == "differ":
        tensors[HEAD] = tensors[HEAD] * 1.5
    if change == "head only":
        tensors.pop(EMBEDDING)
    if change == "no head":
        tensors.pop(HEAD, None)
    save_file(tensors, path, {"format": "pt"})


def inputs(image_token: int, tokens_per_tile: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens [1, S] with the places of one tile among them, and the tile [1, 3, side, side]."""
    generator = torch.Generator().manual_seed(5)
    token_ids = torch.randint(0, 250, (1, tokens_per_tile + 24), generator=generator)
    token_ids[0, 2 : 2 + tokens_per_tile] = image_token
    return token_ids, torch.randint(0, 256, (1, 3, side, side), generator=generator, dtype=torch.uint8)


def transformers_logits(case: Case) -> torch.Tensor | None:
    """Return what transformers computes, or None where it does not load the folder whole.

    A tensor that is missing would be drawn at random there; one that is too many is left out with a warning.
    """
    folder = case.oracle
    if folder is None:
        return None
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            skeleton = InternVLForConditionalGeneration(config)
    except Exception:  # whatever it raises, it does not load
        return None
    shapes = {name: value.shape for name, value in skeleton.state_dict().items()}
    stored = {saved_to_inside(name): value.shape for name, value in load_file(folder / "model.safetensors").items()}
    ties = {"lm_head.weight", "model.language_model.embed_tokens.weight"}
    lacking = shapes.keys() - stored.keys()
    if lacking and not (config.tie_word_embeddings and lacking < ties):
        return None
    if any(shapes[name] != stored[name] for name in shapes.keys() & stored.keys()):
        return None
    if config.image_token_id >= config.text_config.vocab_size:
        return None  # it loads, and has no embedding for the token of an image
    model = InternVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    if case.pixel_shuffle == "v1":
        model.model.pixel_shuffle = first_pixel_shuffle
    side, patch = config.vision_config.image_size[0], config.vision_config.patch_size[0]
    tokens_per_tile = int((side // patch * config.downsample_ratio) ** 2)
    token_ids, tiles = inputs(config.image_token_id, tokens_per_tile, side)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        return model(input_ids=token_ids, pixel_values=(tiles / 255 - mean) / std).logits


def saved_to_inside(name: str) -> str:
    """Return a parameter's name in transformers' model from that in its files."""
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    if name.startswith("language_model.model."):
        return "model.language_model." + name.removeprefix("language_model.model.")
    return f"model.{name}"


def our_logits(folders: list[Path], parallel: ParallelConfig) -> list[torch.Tensor | ValueError]:
    """Return for each folder what our model computes, or why it is refused."""
    context = groups.initialize(parallel, seed=1)
    results: list[torch.Tensor | ValueError] = []
    for folder in folders:
        try:
            architecture, layout = read_hf_architecture(folder)
            check_hf_tensors(folder, architecture, layout)
            settings = ComputeSettings(tensor=parallel.tensor)
            model = build_r1v2(architecture, settings, groups=context.groups, device=context.device)
            load_hf_weights(model, folder, context, layout=layout)
        except ValueError as error:
            results.append(error)
            continue
        token_ids, tiles = inputs(
            architecture.image_token_id, architecture.tokens_per_tile, architecture.vision.image_size
        )
        with torch.no_grad():
            part = model.eval()(token_ids, torch.arange(token_ids.shape[1])[None], tiles_TCHW=tiles)
        pieces = [torch.empty_like(part) for _ in range(parallel.tensor)]
        torch.distributed.all_gather(pieces, part.contiguous(), group=context.groups.tp)
        results.append(torch.cat(pieces, dim=-1)[..., : architecture.language.vocab_size])
    return results


def compare(folder: Path, layout: Layout, seeds: range) -> dict[str, int]:
    """Compare generated folders, at TP1 and TP2; count how they ended."""
    write = write_case if layout == "transformers" else write_chat_case
    cases = [write(folder / str(seed), seed) for seed in seeds]
    expected = [transformers_logits(case) for case in cases]
    folders = [case.folder for case in cases]
    one = run_ranks(1, our_logits, folders, ParallelConfig(), timeout=3000)[0]
    two = run_ranks(2, our_logits, folders, ParallelConfig(tensor=2), timeout=3000)[0]
    counts = {"equal": 0, "refused by both": 0, "refused by us": 0}
    faults = []
    for case, theirs, *ours in zip(cases, expected, one, two, strict=True):
        faults += [f"seed {case.seed}: {fault}" for got in ours if (fault := fault_of(got, theirs))]
        kind = "refused by both" if theirs is None else "refused by us" if isinstance(ours[0], ValueError) else "equal"
        counts[kind] += 1
        shutil.rmtree(folder / str(case.seed))
    assert not faults, "\n".join(faults)
    print(f"{layout}, seeds {seeds.start} to {seeds.stop - 1}: {counts}")
    return counts


def fault_of(got: torch.Tensor | ValueError, theirs: torch.Tensor | None) -> str | None:
    """Return what is wrong with our logits, or with our refusal, given what transformers computes."""
    if theirs is None:
        return None if isinstance(got, ValueError) else "transformers does not load it, and we do"
    if isinstance(got, ValueError):
        # Sizes that the layout of this test does not divide are refused by what checks the layout.
        return None if isinstance(got, Unsupported | UnevenSizes) and got.kind in get_args(Kind) else str(got)
    difference = float((got - theirs).abs().max() / theirs.abs().max())
    return None if difference < 1e-4 else f"logits differ by {difference}"


@pytest.mark.parametrize("layout", ["transformers", "chat"])
def test_folders_mean_what_they_mean_to_transformers(tmp_path, layout):
    counts = compare(tmp_path, layout, range(0, 168, 7))
    assert counts["equal"] >= 8, counts


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["transformers", "chat"])
@pytest.mark.parametrize("first", range(0, 240, 60))
def test_hundreds_of_folders_mean_what_they_mean_to_transformers(tmp_path, layout, first):
    counts = compare(tmp_path, layout, range(first, first + 60))
    assert counts["equal"] >= 20, counts
