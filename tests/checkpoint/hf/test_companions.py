"""Config, tokenizer and processor beside the weights: complete for transformers, or refused."""

from __future__ import annotations

import shutil

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from checkpoint_tools import reassemble
from megatron_r1v2.checkpoint.hf.folders import read_json
from megatron_r1v2.resilience.files import write_json
from tests.checkpoint.chat_reference import SIDE, write_chat_folder
from tests.checkpoint.damage import run
from tests.checkpoint.hf.test_config import convert
from tests.tiny import name_qwen_tokenizer, split_tokenizer_json
from tests.tiny_hf import tiny_hf_language, tiny_hf_vision


def test_the_export_is_complete_for_transformers_without_another_step(tmp_path):
    write_chat_folder(tmp_path / "chat", family="6b", version="v2")
    (tmp_path / "chat" / "modeling_skywork_chat.py").write_text("raise SystemExit('remote code ran')")
    convert(tmp_path / "chat", tmp_path / "out", "transformers", "--dtype", "bf16")
    assert list((tmp_path / "out").glob("*.py")) == []
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    image = AutoImageProcessor.from_pretrained(tmp_path / "out")(Image.new("RGB", (64, 32)), return_tensors="pt")
    assert image["pixel_values"].shape == (3, 3, SIDE, SIDE)
    content = [{"type": "image"}, {"type": "text", "text": "what?"}]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    tokens = tokenizer.context_image_token * (3 * 16)
    batch = tokenizer(prompt.replace("<IMG_CONTEXT>", f"<img>{tokens}</img>"), return_tensors="pt")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert int((batch["input_ids"] == model.config.image_token_id).sum()) == 3 * 16
    pixel_values = image["pixel_values"].bfloat16()
    generated = model.generate(**batch, pixel_values=pixel_values, max_new_tokens=2, do_sample=False)
    assert generated.shape[1] > batch["input_ids"].shape[1]


def test_the_whole_processor_loads(tmp_path):
    # torchvision has no release for the torch that is pinned here, so this is skipped; all that the processor is made
    # of (image processor, tokenizer, template) is loaded by the tests above and below.
    pytest.importorskip("torchvision", reason="transformers' processor of InternVL takes videos, which needs it")
    write_chat_folder(tmp_path / "chat", family="6b", version="v2")
    convert(tmp_path / "chat", tmp_path / "out", "transformers")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    content = [{"type": "image", "image": Image.new("RGB", (64, 32))}, {"type": "text", "text": "what?"}]
    messages = [{"role": "user", "content": content}]
    batch = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert batch["pixel_values"].shape == (3, 3, SIDE, SIDE)
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == 3 * 16


def test_a_processor_that_is_not_there_is_written(tmp_path):
    write_chat_folder(tmp_path / "chat", family="6b", version="v2")
    convert(tmp_path / "chat", tmp_path / "full", "transformers")
    shutil.copytree(tmp_path / "full", tmp_path / "bare")
    (tmp_path / "bare" / "checkpoint_manifest.json").unlink()
    for path in tmp_path.glob("bare/*processor_config.json"):
        path.unlink()
    convert(tmp_path / "bare", tmp_path / "out", "transformers")
    names = [{path.name for path in (tmp_path / name).iterdir()} for name in ("full", "out")]
    assert names[0] == names[1]
    image = AutoImageProcessor.from_pretrained(tmp_path / "out")(Image.new("RGB", (64, 32)), return_tensors="pt")
    assert image["pixel_values"].shape == (3, 3, SIDE, SIDE)
    # What InternVLProcessor takes from its own file and from the tokenizer, and the class that all files name.
    stated = read_json(tmp_path / "out" / "processor_config.json")
    assert stated == {"processor_class": "InternVLProcessor", "image_seq_length": 16}
    assert read_json(tmp_path / "out" / "preprocessor_config.json")["processor_class"] == "InternVLProcessor"
    video = read_json(tmp_path / "out" / "video_preprocessor_config.json")
    assert video["video_processor_type"] == "InternVLVideoProcessor"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    roles = ("start_image_token", "end_image_token", "context_image_token", "video_token")
    assert all(tokenizer.convert_tokens_to_ids(getattr(tokenizer, role)) is not None for role in roles)


@pytest.mark.parametrize("layout", ["transformers", "chat"])
def test_a_model_without_a_tokenizer_is_refused(tmp_path, capsys, layout):
    write_chat_folder(tmp_path / "chat", family="6b", version="v2")
    convert(tmp_path / "chat", tmp_path / "full", "transformers")
    (tmp_path / "full" / "checkpoint_manifest.json").unlink()
    for path in tmp_path.glob("full/token*"):
        path.unlink()
    with pytest.raises(SystemExit):
        convert(tmp_path / "full", tmp_path / "out", layout)
    assert "has no tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_older_folder_without_tokenizer_json_gets_one_where_it_is_changed(tmp_path):
    write_chat_folder(tmp_path / "chat", family="300m", version="v2")
    name_qwen_tokenizer(tmp_path / "chat")
    convert(tmp_path / "chat", tmp_path / "new", "transformers")
    split_tokenizer_json(tmp_path / "chat")
    for layout in ("transformers", "chat"):
        convert(tmp_path / "chat", tmp_path / f"out-{layout}", layout)
        assert (tmp_path / f"out-{layout}" / "tokenizer.json").exists() == (layout == "transformers")
        tokenizers = [AutoTokenizer.from_pretrained(tmp_path / name) for name in ("chat", "new", f"out-{layout}")]
        text = "<|im_start|>user\n<img><IMG_CONTEXT></img>left 3?<|im_end|><think>"
        first, *others = [tokenizer.encode(text) for tokenizer in tokenizers]
        assert others == [first, first]
    config = read_json(tmp_path / "out-transformers" / "config.json")
    assert config["image_token_id"] == tokenizers[0].convert_tokens_to_ids("<IMG_CONTEXT>")


def test_a_language_model_without_tokenizer_json_gets_its_image_tokens(tmp_path, capsys):
    tiny_hf_vision(tmp_path / "vision")
    tiny_hf_language(tmp_path / "language")
    name_qwen_tokenizer(tmp_path / "language")
    split_tokenizer_json(tmp_path / "language")
    arguments = ["--vision", tmp_path / "vision", "--language", tmp_path / "language", "--quiet"]
    run(reassemble, *arguments, "--output", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.encode("<video>left 3") == [tokenizer.video_token_id, *tokenizer.encode("left 3")]
    (tmp_path / "language" / "merges.txt").unlink()
    run(reassemble, *arguments, "--output", tmp_path / "out2", code=1)
    assert "no tokenizer.json, nor vocab.json with merges.txt" in capsys.readouterr().err


@pytest.mark.parametrize("extra", [[], ["<extra>"], {"other_token": "<extra>"}])
def test_the_tokenizer_is_written_as_both_versions_of_transformers_read_it(tmp_path, extra):
    """4.57 knows no class TokenizersBackend, and takes a mapping where 5 writes a list."""
    write_chat_folder(tmp_path / "chat", family="6b", version="v2")
    path = tmp_path / "chat" / "tokenizer_config.json"
    settings = read_json(path)
    write_json(path, {**settings, "tokenizer_class": "TokenizersBackend", "extra_special_tokens": extra})
    for layout in ("transformers", "chat"):
        convert(tmp_path / "chat", tmp_path / f"out-{layout}", layout)
        got = read_json(tmp_path / f"out-{layout}" / "tokenizer_config.json")
        assert got["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert got["model_input_names"] == ["input_ids", "attention_mask"]
        assert "backend" not in got
        assert isinstance(got.get("extra_special_tokens", {}), dict)
        assert got.get("additional_special_tokens", []) == (extra if isinstance(extra, list) else [])
        assert ("other_token" in got.get("extra_special_tokens", {})) == isinstance(extra, dict)
    roles = read_json(tmp_path / "out-transformers" / "tokenizer_config.json")["extra_special_tokens"]
    assert roles["context_image_token"] == "<IMG_CONTEXT>"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out-transformers")
    assert tokenizer.context_image_token == "<IMG_CONTEXT>"
    before = AutoTokenizer.from_pretrained(tmp_path / "chat")
    text = "<|im_start|>user\n<img><IMG_CONTEXT></img>what?<|im_end|>"
    assert tokenizer.encode(text) == before.encode(text)


def test_an_image_processor_that_stands_elsewhere_is_written_where_older_versions_look(tmp_path):
    write_chat_folder(tmp_path / "chat", family="6b", version="v2")
    convert(tmp_path / "chat", tmp_path / "full", "transformers")
    folder = tmp_path / "full"
    (folder / "checkpoint_manifest.json").unlink()
    stated = read_json(folder / "preprocessor_config.json") | {"image_mean": [0.5, 0.4, 0.3], "max_patches": 3}
    (folder / "preprocessor_config.json").unlink()
    processor = read_json(folder / "processor_config.json")
    write_json(folder / "processor_config.json", {**processor, "image_processor": stated})
    convert(folder, tmp_path / "out", "transformers")
    written = read_json(tmp_path / "out" / "preprocessor_config.json")
    assert (written["image_mean"], written["max_patches"]) == ([0.5, 0.4, 0.3], 3)
    assert "image_processor" in read_json(tmp_path / "out" / "processor_config.json")


@pytest.mark.parametrize(
    ("keys", "tiles"),
    [
        ({"max_dynamic_patch": 4}, 4),
        ({"max_dynamic_patch": None}, 6),
        ({"dynamic_image_size": False}, 1),
        ({"dynamic_image_size": None}, 1),
    ],
)
def test_tiles_that_a_chat_folder_leaves_out_are_those_of_its_class(tmp_path, keys, tiles):
    write_chat_folder(tmp_path / "chat", family="6b", version="v2")
    config = {**read_json(tmp_path / "chat" / "config.json"), **keys}
    write_json(tmp_path / "chat" / "config.json", {key: value for key, value in config.items() if value is not None})
    convert(tmp_path / "chat", tmp_path / "out", "transformers")
    assert read_json(tmp_path / "out" / "preprocessor_config.json")["max_patches"] == tiles


def test_the_statistics_of_another_range_are_written_in_the_usual_one(tmp_path):
    write_chat_folder(tmp_path / "chat", family="6b", version="v2")
    stated = {"image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 2.0, 4.0], "rescale_factor": 1 / 127.5}
    write_json(tmp_path / "chat" / "preprocessor_config.json", stated)
    convert(tmp_path / "chat", tmp_path / "out", "transformers")
    written = read_json(tmp_path / "out" / "preprocessor_config.json")
    assert (written["image_mean"], written["image_std"]) == ([0.0, 0.0, 0.0], [0.5, 1.0, 2.0])
    assert written["rescale_factor"] == 1 / 255
