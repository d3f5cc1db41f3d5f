"""HF -> model -> HF with real models over real process groups."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_r1v2.checkpoint.hf.architecture import r1v2_architecture
from megatron_r1v2.checkpoint.hf.weights import check_hf_tensors, load_hf_weights
from megatron_r1v2.config.schema import ParallelConfig
from megatron_r1v2.models.r1v2 import build_r1v2
from megatron_r1v2.models.settings import ComputeSettings
from tests.checkpoint.hf.test_mapping import VARIANTS
from tests.parallel_layouts import start_layout
from tests.ranks import run_ranks
from tests.tiny_hf import InternVLForConditionalGeneration, tiny_hf_model
from tests.whole_weights import gather_hf_weights


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("hf")
    for name, variant in VARIANTS.items():
        # bfloat16 for one: what the real checkpoints have, and gloo must carry it.
        tiny_hf_model(root / name, dtype=torch.bfloat16 if name == "6b" else torch.float32, **variant)
    return {name: str(root / name) for name in VARIANTS}


def start(folder: str, *, tensor: int, pipeline: int, dtype: torch.dtype | None = None):
    context = start_layout(ParallelConfig(tensor=tensor, pipeline=pipeline))
    config = json.loads((Path(folder) / "config.json").read_text())
    dtype = dtype or getattr(torch, config["dtype"])
    settings = ComputeSettings(tensor=tensor, pipeline=pipeline, dtype=dtype)
    model = build_r1v2(r1v2_architecture(config), settings, groups=context.groups, device=context.device)
    return model, context


def round_trip(folders: dict[str, str], layouts: list[tuple[int, int]]) -> list[str]:
    """Return what differs, on the main rank; nothing elsewhere."""
    wrong = []
    for tensor, pipeline in layouts:
        for variant, folder in folders.items():
            model, context = start(folder, tensor=tensor, pipeline=pipeline)
            for parameter in model.parameters():
                parameter.data.fill_(float("nan"))  # what is not filled cannot look right
            load_hf_weights(model, folder, context)
            assert not any(parameter.isnan().any() for parameter in model.parameters())
            exported = gather_hf_weights(model, context)
            if context.is_main:
                wrong += compare(load_file(f"{folder}/model.safetensors"), exported, f"{variant} {tensor}x{pipeline}")
    return wrong


def compare(expected: dict, got: dict, where: str) -> list[str]:
    names = [f"{where}: {name} missing or extra" for name in expected.keys() ^ got.keys()]
    return names + [
        f"{where}: {name}"
        for name in expected.keys() & got.keys()
        if got[name].dtype != expected[name].dtype or not torch.equal(got[name], expected[name])
    ]


@pytest.mark.parametrize(
    ("world_size", "layouts"),
    [(1, [(1, 1)]), (2, [(2, 1), (1, 2)]), pytest.param(4, [(2, 2)], marks=pytest.mark.slow)],
)
def test_round_trip_is_bit_exact(folders, world_size, layouts):
    chosen = folders if world_size < 4 else {name: folders[name] for name in ("6b-odd", "300m-tied")}
    assert run_ranks(world_size, round_trip, chosen, layouts)[0] == []


def differences_to_transformers(folders: dict[str, str]) -> dict[str, float]:
    """Return, for each variant, max |ours - theirs| / max |theirs| of the logits of a prompt with two tiles."""
    found = {}
    for name, folder in folders.items():
        theirs = InternVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        ours, context = start(folder, tensor=1, pipeline=1, dtype=torch.float32)
        load_hf_weights(ours, folder, context)
        generator = torch.Generator().manual_seed(0)
        tiles_TCHW = torch.randint(0, 256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8)
        token_ids_BS = torch.randint(0, 250, (1, 50), generator=generator)
        token_ids_BS[0, 3:35] = theirs.config.image_token_id
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        with torch.no_grad():
            expected = theirs(input_ids=token_ids_BS, pixel_values=(tiles_TCHW / 255 - mean) / std).logits
            got = ours(token_ids_BS, torch.arange(50)[None], tiles_TCHW=tiles_TCHW)
        found[name] = float((got - expected).abs().max() / expected.abs().max())
    return found


def test_loaded_weights_compute_what_transformers_computes(folders):
    """A round trip cannot see two tensors of equal shape that change places both ways; the logits can."""
    (found,) = run_ranks(1, differences_to_transformers, folders)
    assert max(found.values()) < 1e-5, found


def refusals(folder: str, broken: dict[str, str]) -> dict[str, str]:
    model, context = start(folder, tensor=1, pipeline=1)
    messages = {}
    for name, path in broken.items():
        try:
            load_hf_weights(model, path, context)
        except ValueError as error:
            messages[name] = str(error)
    narrow, context = start(folder, tensor=1, pipeline=1, dtype=torch.bfloat16)
    try:
        load_hf_weights(narrow, folder, context)
    except ValueError as error:
        messages["narrow"] = str(error)
    load_hf_weights(narrow, folder, context, cast=True)
    wide, context = start(broken["bf16"], tensor=1, pipeline=1, dtype=torch.float32)
    load_hf_weights(wide, broken["bf16"], context)
    return messages


def test_folders_that_do_not_fit_are_refused(folders, tmp_path):
    source = Path(folders["300m-tied"])
    tensors = load_file(source / "model.safetensors")
    embedding = tensors["language_model.model.embed_tokens.weight"]
    bias = "vision_tower.encoder.layer.1.attention.v_proj.bias"
    norm = "language_model.model.norm.weight"
    variants = {
        "missing": {name: value for name, value in tensors.items() if name != bias},
        "extra": tensors | {"language_model.model.layers.2.mlp.up_proj.weight": embedding.clone()},
        "shape": tensors | {norm: tensors[norm][:-1].clone()},
        "untied": tensors | {"language_model.lm_head.weight": embedding + 1},
        "repeated": tensors | {"language_model.lm_head.weight": embedding.clone()},
        "bf16": {name: value.bfloat16() for name, value in tensors.items()},
    }
    for name, content in variants.items():
        (tmp_path / name).mkdir()
        save_file(content, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_bytes((source / "config.json").read_bytes())
    broken = {name: str(tmp_path / name) for name in variants}
    messages = run_ranks(1, refusals, str(source), broken)[0]
    assert set(messages) == {"missing", "extra", "shape", "untied", "narrow"}
    assert bias in messages["missing"]
    assert "layers.2.mlp.up_proj.weight" in messages["extra"]
    assert norm in messages["shape"]
    assert "[95]" in messages["shape"]
    assert "tie_word_embeddings" in messages["untied"]
    assert "model.precision" in messages["narrow"]


def test_a_configuration_without_sizes_is_refused_before_a_model_is_built(folders):
    """transformers' default is a language model of seven billion parameters."""
    folder = folders["300m-tied"]
    config = json.loads((Path(folder) / "config.json").read_text())
    check_hf_tensors(folder, r1v2_architecture(config), "transformers")
    del config["text_config"]
    with pytest.raises(ValueError, match=r"360 tensors that the folder lacks: "):
        check_hf_tensors(folder, r1v2_architecture(config), "transformers")
