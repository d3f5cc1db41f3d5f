"""Splicing components: the result is what plain transformers loads, made of the components' own tensors."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoTokenizer, GenerationConfig

from checkpoint_tools import hf_to_hf, hf_to_megatron, megatron_to_hf
from megatron_r1v2.checkpoint.conversion import RunOptions
from megatron_r1v2.checkpoint.hf.companions import Components
from megatron_r1v2.checkpoint.hf.folders import read_json
from megatron_r1v2.checkpoint.hf.refusals import Unsupported
from megatron_r1v2.checkpoint.manifest import MANIFEST, Manifest
from megatron_r1v2.checkpoint.splicing import reassemble as splice
from megatron_r1v2.resilience.files import write_json
from tests.checkpoint.chat_reference import write_chat_folder
from tests.tiny_hf import InternVLForConditionalGeneration, tiny_hf_language, tiny_hf_model, tiny_hf_vision


def reassemble(components: Components, output: Path, *, overwrite: bool = False, **options):
    return splice(components, output, options=RunOptions(quiet=True, overwrite=overwrite), **options)


@pytest.fixture
def components(tmp_path) -> Components:
    tiny_hf_vision(tmp_path / "vision", "6b")
    tiny_hf_language(tmp_path / "language")
    return Components(vision=tmp_path / "vision", language=tmp_path / "language")


def load(folder: Path) -> dict[str, torch.Tensor]:
    """Load in plain transformers and return its parameters; nothing may be missing or left over."""
    model, info = InternVLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    return model.state_dict()


@pytest.mark.parametrize("family", ["300m", "6b"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_result_loads_in_transformers_with_the_components_bits(tmp_path, family, tied):
    vision = tiny_hf_vision(tmp_path / "vision", family).state_dict()
    language = tiny_hf_language(tmp_path / "language", tied=tied).state_dict()
    reassemble(Components(vision=tmp_path / "vision", language=tmp_path / "language"), tmp_path / "out")
    whole = load(tmp_path / "out")
    assert all(torch.equal(whole[f"model.vision_tower.{name}"], value) for name, value in vision.items())
    for name, value in language.items():
        inside = name if name.startswith("lm_head") else name.replace("model.", "model.language_model.", 1)
        assert torch.equal(whole[inside], value), name
    adapter = {name: value for name, value in whole.items() if "multi_modal_projector" in name}
    assert len(adapter) == 6
    assert adapter["model.multi_modal_projector.linear_1.weight"].shape == (96, 256)
    assert 0.015 < adapter["model.multi_modal_projector.linear_1.weight"].std() < 0.025


def test_tied_embeddings_become_two_equal_matrices_when_asked(tmp_path):
    tiny_hf_vision(tmp_path / "vision")
    language = tiny_hf_language(tmp_path / "language", tied=True, vocab_size=261).state_dict()
    components = Components(vision=tmp_path / "vision", language=tmp_path / "language", untie_embeddings=True)
    reassemble(components, tmp_path / "out")
    config = read_json(tmp_path / "out" / "config.json")
    assert (config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"]) == (False, False)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    embedding, output = (stored[f"language_model.{n}"] for n in ("model.embed_tokens.weight", "lm_head.weight"))
    assert torch.equal(embedding[:261], language["model.embed_tokens.weight"])
    assert torch.equal(embedding, output)  # grown rows too
    model = InternVLForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight.data_ptr() != model.model.language_model.embed_tokens.weight.data_ptr()


def test_image_tokens_are_added_once_and_the_rest_of_the_tokenizer_stays(components, tmp_path):
    reassemble(components, tmp_path / "out")
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (components.language, tmp_path / "out"))
    text = "<|im_start|>user\nwhat is 3+5?<|im_end|>\n<think>"
    assert after.encode(text) == before.encode(text)
    ids = after.encode("<img><IMG_CONTEXT></img>")
    assert ids == [len(before), len(before) + 2, len(before) + 1]
    assert read_json(tmp_path / "out" / "config.json")["image_token_id"] == ids[1]
    assert after.context_image_token_id == ids[1]
    assert after.decode([72, *ids], skip_special_tokens=True) == before.decode([72])
    assert after.chat_template == before.chat_template
    # A tokenizer that has the tokens keeps their ids.
    tiny_hf_language(tmp_path / "knows", image_tokens=True)
    knows = AutoTokenizer.from_pretrained(tmp_path / "knows")
    reassemble(dataclasses.replace(components, language=tmp_path / "knows"), tmp_path / "out2")
    kept = AutoTokenizer.from_pretrained(tmp_path / "out2")
    assert kept.get_vocab() == knows.get_vocab()
    assert read_json(tmp_path / "out2" / "config.json")["image_token_id"] == knows.convert_tokens_to_ids(
        "<IMG_CONTEXT>"
    )


def test_a_template_that_knows_text_alone_learns_images(components, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(components.language)
    tokenizer.chat_template = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
    tokenizer.save_pretrained(components.language)
    reassemble(components, tmp_path / "out")
    content = [{"type": "image", "image": "digits.png"}, {"type": "text", "text": "what?"}]
    prompt = AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False
    )
    assert prompt == "<|im_start|><IMG_CONTEXT>\nwhat?<|im_end|>"


@pytest.mark.parametrize("tied", [False, True])
def test_the_embedding_grows_by_mean_rows_only_when_it_is_too_small(tmp_path, tied):
    tiny_hf_vision(tmp_path / "vision")
    language = tiny_hf_language(tmp_path / "language", tied=tied, vocab_size=261).state_dict()
    reassemble(Components(vision=tmp_path / "vision", language=tmp_path / "language"), tmp_path / "out")
    whole = load(tmp_path / "out")
    pairs = [("model.language_model.embed_tokens.weight", "model.embed_tokens.weight"), ("lm_head.weight",) * 2]
    for ours, theirs in pairs:
        assert whole[ours].shape[0] == 265
        assert torch.equal(whole[ours][:261], language[theirs])
        assert torch.allclose(whole[ours][261:], language[theirs].mean(dim=0).expand(4, -1), atol=1e-7)
    assert read_json(tmp_path / "out" / "config.json")["text_config"]["vocab_size"] == 265


def test_random_adapter_depends_on_the_seed_alone(components, tmp_path):
    name = "model.multi_modal_projector.linear_2.weight"
    drawn = []
    for number, seed in enumerate((3, 3, 4)):
        reassemble(dataclasses.replace(components, seed=seed), tmp_path / str(number))
        drawn.append(load(tmp_path / str(number))[name])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("prefix", ["", "model."])
def test_adapter_comes_from_a_file_or_a_folder(components, tmp_path, prefix):
    tiny_hf_model(tmp_path / "whole", "6b", seed=5)
    stored = load_file(tmp_path / "whole" / "model.safetensors")
    adapter = {name: value for name, value in stored.items() if name.startswith("multi_modal_projector")}
    save_file({prefix + name: value for name, value in adapter.items()}, tmp_path / "adapter.safetensors")
    for source in (tmp_path / "adapter.safetensors", tmp_path / "whole"):
        reassemble(dataclasses.replace(components, adapter=source), tmp_path / "out", overwrite=True)
        whole = load(tmp_path / "out")
        assert all(torch.equal(whole["model." + name], value) for name, value in adapter.items())


@pytest.mark.parametrize(("version", "keys"), [("v1", {}), ("v2", {"ps_version": "v2"})])
def test_the_pixel_shuffle_is_the_adapters_own(components, tmp_path, version, keys):
    write_chat_folder(tmp_path / "whole", family="6b", version="v2")
    config = {key: value for key, value in read_json(tmp_path / "whole" / "config.json").items() if key != "ps_version"}
    write_json(tmp_path / "whole" / "config.json", config | keys)
    for number, source in enumerate((tmp_path / "whole", tmp_path / "whole" / "model.safetensors")):
        given = dataclasses.replace(components, adapter=source)
        assert reassemble(given, tmp_path / str(number), layout="chat").pixel_shuffle == version
        other = dataclasses.replace(given, pixel_shuffle="v1" if version == "v2" else "v2")
        with pytest.raises(ValueError, match=f"is not that of the adapter in .*trained with {version}"):
            reassemble(other, tmp_path / "other", layout="chat")


def test_an_adapter_that_says_nothing_of_its_pixel_shuffle_needs_a_word(components, tmp_path):
    write_chat_folder(tmp_path / "whole", family="6b", version="v1")
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    adapter = {name: value for name, value in tensors.items() if name.startswith("mlp1.")}
    save_file(adapter, tmp_path / "adapter.safetensors")
    given = dataclasses.replace(components, adapter=tmp_path / "adapter.safetensors")
    with pytest.raises(ValueError, match="no config.json, which would say its pixel shuffle"):
        reassemble(given, tmp_path / "out", layout="chat")
    for version in ("v1", "v2"):
        chosen = dataclasses.replace(given, pixel_shuffle=version)
        assert reassemble(chosen, tmp_path / version, layout="chat").pixel_shuffle == version


def test_components_are_refused_by_what_they_are(components, tmp_path):
    path = components.language / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, f"{name}_scale_inv": torch.ones(1)}, path, {"format": "pt"})
    with pytest.raises(Unsupported, match="quantized by FP8"):
        reassemble(components, tmp_path / "out")


def test_vision_tower_of_a_whole_model_is_taken(components, tmp_path):
    tiny_hf_model(tmp_path / "whole", "6b", seed=5)
    stored = load_file(tmp_path / "whole" / "model.safetensors")
    reassemble(dataclasses.replace(components, vision=tmp_path / "whole"), tmp_path / "out")
    whole = load(tmp_path / "out")
    vision = {name: value for name, value in stored.items() if name.startswith("vision_tower")}
    assert all(torch.equal(whole["model." + name], value) for name, value in vision.items())


def test_dtypes_must_agree_or_be_chosen(tmp_path):
    tiny_hf_vision(tmp_path / "vision", dtype=torch.bfloat16)
    tiny_hf_language(tmp_path / "language")
    components = Components(vision=tmp_path / "vision", language=tmp_path / "language")
    with pytest.raises(ValueError, match="--dtype"):
        reassemble(components, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    reassemble(dataclasses.replace(components, dtype=torch.bfloat16), tmp_path / "out")
    assert {value.dtype for value in load(tmp_path / "out").values()} == {torch.bfloat16}


def test_processor_cuts_tiles_of_the_towers_size(components, tmp_path):
    from PIL import Image

    reassemble(dataclasses.replace(components, max_tiles=3), tmp_path / "out")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    images = processor(images=[Image.new("RGB", (64, 32), (124, 116, 104))], return_tensors="pt")
    assert images["pixel_values"].shape == (3, 3, 32, 32)  # two tiles and a thumbnail
    assert images["pixel_values"].abs().max() < 0.01  # ImageNet's mean colour
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 256


def test_components_that_do_not_fit_are_named(components, tmp_path):
    cases = {
        "missing": dataclasses.replace(components, vision=tmp_path / "nowhere"),
        "internvl_vision": dataclasses.replace(components, vision=components.language),
        "qwen2": dataclasses.replace(components, language=components.vision),
        "downsample_ratio": dataclasses.replace(components, downsample_ratio=0.3),
    }
    for expected, case in cases.items():
        with pytest.raises(ValueError, match=expected if expected != "qwen2" else r"tokenizer\.json"):
            reassemble(case, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    tensors = load_file(components.vision / "model.safetensors")
    del tensors["encoder.layer.1.lambda_1"]
    save_file({**tensors, "head.weight": torch.zeros(1)}, components.vision / "model.safetensors")
    with pytest.raises(ValueError, match=r"head\.weight.*layer\.1\.lambda_1"):
        reassemble(components, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["language", "vision"]


def test_output_over_a_component_is_refused(components):
    with pytest.raises(ValueError, match="one folder"):
        reassemble(components, components.language, overwrite=True)


def test_embeddings_that_are_called_tied_and_differ_stay_two(tmp_path, components):
    """As transformers has it."""
    config = read_json(components.language / "config.json")
    write_json(components.language / "config.json", {**config, "tie_word_embeddings": True})
    assert not reassemble(components, tmp_path / "out").language.tied_embeddings
    assert read_json(tmp_path / "out" / "config.json")["tie_word_embeddings"] is False


def test_a_random_adapter_is_marked_and_the_mark_goes_through_conversions(tmp_path, components):
    reassemble(components, tmp_path / "random")
    quiet = ["--quiet", "--output"]
    hf_to_megatron.main(["--hf", str(tmp_path / "random"), *quiet, str(tmp_path / "megatron")])
    megatron_to_hf.main(["--checkpoint", str(tmp_path / "megatron"), *quiet, str(tmp_path / "back")])
    hf_to_hf.main(["--hf", str(tmp_path / "back"), "--layout", "chat", *quiet, str(tmp_path / "chat")])
    for name in ("random", "megatron", "back", "chat"):
        assert Manifest(tmp_path / name).random_parts == {"adapter"}, name
    reassemble(dataclasses.replace(components, adapter=tmp_path / "random"), tmp_path / "given")
    assert Manifest(tmp_path / "given").random_parts == {"adapter"}
    tiny_hf_model(tmp_path / "trained", "6b")
    reassemble(dataclasses.replace(components, adapter=tmp_path / "trained"), tmp_path / "good")
    assert Manifest(tmp_path / "good").random_parts == frozenset()
    content = read_json(tmp_path / "chat" / MANIFEST)
    write_json(tmp_path / "chat" / MANIFEST, content | {"random_parts": ["adaptor"]})
    with pytest.raises(ValueError, match="is damaged: it says .*adaptor.* of random parts"):
        Manifest(tmp_path / "chat")
