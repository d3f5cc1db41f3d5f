import json

import numpy
import torch
from PIL import Image
from torch.nn import functional as F

from examples.real_weights import convert_language_model, convert_vision_tower, make_adapter
from megatron_r1v2.checkpoint.hf.companions import Components
from megatron_r1v2.checkpoint.hf.folders import SafetensorsFolder
from megatron_r1v2.checkpoint.splicing import reassemble
from tests.examples.tiny_weights import random_dinov2, random_llama, write_gguf, write_onnx

P = "multi_modal_projector."


def adapted(adapter, features_TFK):
    """Compute an adapter as transformers does."""
    hidden = F.layer_norm(features_TFK, features_TFK.shape[-1:], adapter[f"{P}layer_norm.weight"])
    hidden = F.gelu(F.linear(hidden, adapter[f"{P}linear_1.weight"], adapter[f"{P}linear_1.bias"]))
    return F.linear(hidden, adapter[f"{P}linear_2.weight"], adapter[f"{P}linear_2.bias"])


def test_the_fit_gives_every_token_the_embedding_of_its_picture():
    torch.manual_seed(0)
    kinds = torch.arange(60) % 3
    # What makes a picture one of three kinds is in every token of it, beside noise.
    features_TFK = 3 * torch.randn(3, 32)[kinds][:, None] + 0.3 * torch.randn(60, 4, 32)
    words = torch.randn(3, 16)
    adapter = make_adapter.fit(features_TFK, words[kinds], seed=1)
    found = adapted(adapter, features_TFK)
    assert ((found - words[kinds][:, None]).norm(dim=-1) < 0.5 * words.norm(dim=-1).min()).all()
    other = make_adapter.fit(features_TFK, words[kinds], seed=2)
    assert not torch.equal(adapter[f"{P}linear_1.weight"], other[f"{P}linear_1.weight"])


def test_the_fitted_adapter_is_spliced_and_names_the_pictures_that_it_saw(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", random_llama())
    write_onnx(tmp_path / "tiny.onnx", random_dinov2())
    vision, language = tmp_path / "vision", tmp_path / "language"
    convert_language_model.convert(tmp_path / "tiny.gguf", language)
    convert_vision_tower.convert(tmp_path / "tiny.onnx", vision, tile=28)
    (tmp_path / "images").mkdir()
    rows = []
    for number in range(24):
        shade = numpy.random.default_rng(number).integers(0, 40, (28, 28, 3)) + (200 if number % 2 else 0)
        Image.fromarray(shade.astype(numpy.uint8)).save(tmp_path / "images" / f"{number}.png")
        rows.append({"answer": "cat" if number % 2 else "7", "images": [f"{number}.png"]})
    (tmp_path / "align.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folders = {"vision": vision, "language": language, "rows": tmp_path / "align.jsonl", "output": tmp_path / "adapter"}
    make_adapter.main([argument for name, path in folders.items() for argument in (f"--{name}", str(path))])
    reassemble(Components(vision, language, adapter=tmp_path / "adapter"), tmp_path / "base")
    with SafetensorsFolder(tmp_path / "adapter") as folder:
        adapter = {name: folder.tensor(name) for name in folder.names()}
    with SafetensorsFolder(tmp_path / "base") as folder:
        assert torch.equal(folder.tensor(f"{P}linear_2.weight"), adapter[f"{P}linear_2.weight"])
    features_TFK = make_adapter.image_features(vision, [tmp_path / "images" / f"{number}.png" for number in range(24)])
    words = make_adapter.word_embeddings(language, ["7", "cat"])
    found = torch.cdist(adapted(adapter, features_TFK).mean(1), words).argmin(1)
    assert found.tolist() == [0, 1] * 12
