import pytest
import torch
from transformers import AutoModel, InternVLVisionModel

from examples.digits import make_vision_tower as maker
from examples.digits import source
from megatron_r1v2.checkpoint.hf.architecture import vision_architecture


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("digits") / "vision"
    maker.main(["--output", str(output), "--steps", "2", "--hidden-size", "32", "--layers", "1"])
    return output


def test_the_folder_is_a_tower_that_transformers_and_we_can_read(folder):
    model = AutoModel.from_pretrained(folder)
    assert isinstance(model, InternVLVisionModel)
    architecture = vision_architecture(model.config.to_dict())
    assert (architecture.hidden_size, architecture.image_size, architecture.num_patches) == (32, 32, 64)
    assert (architecture.norm, architecture.qkv_bias, architecture.qk_norm) == ("layer_norm", True, False)


def test_training_sees_the_training_split_alone(monkeypatch):
    asked = []
    load = maker.load_split
    monkeypatch.setattr(maker, "load_split", lambda name: asked.append(name) or load(name))
    maker.train(maker.Settings(hidden_size=32, layers=1, heads=2, steps=1, batch=8))
    assert asked == ["train"]


def test_patches_are_labelled_by_the_half_that_they_are_in():
    labels = maker.patch_labels(torch.tensor([3, 4]), torch.tensor([5, 4]), side=4)
    assert labels[0].view(4, 4).tolist() == [[3, 3, 5, 5]] * 4
    assert labels[1].tolist() == [4] * 16


def test_a_thumbnail_in_training_looks_like_the_one_in_the_prompt():
    tiles, _ = source.digit_tiles()
    left, right = torch.from_numpy(tiles[:2]).float() / 255
    ours = maker.make_thumbnails(left[None], right[None])[0]
    real = torch.from_numpy(source.thumbnail(tiles[0], tiles[1])).float() / 255
    assert (ours - real).abs().max() < 0.02


def test_augmentation_moves_the_picture_but_keeps_it_a_picture():
    tiles, _ = maker.load_split("train")
    changed = maker.augment(tiles[:64], torch.Generator().manual_seed(0))
    again = maker.augment(tiles[:64], torch.Generator().manual_seed(0))
    assert torch.equal(changed, again)
    assert changed.shape == (64, 32, 32)
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert 0.02 < (changed - tiles[:64]).abs().mean() < 0.3
    assert changed.mean().item() == pytest.approx(tiles[:64].mean().item(), rel=0.2)


def test_a_short_training_already_beats_chance():
    model, head = maker.train(maker.Settings(steps=40, hidden_size=32, layers=2, heads=2, batch=48))
    right = maker.accuracy(model.eval(), head, *maker.load_split("validation"))
    assert right > 0.2


def test_what_is_there_is_left_alone(folder, capsys):
    before = (folder / "model.safetensors").read_bytes()
    maker.main(["--output", str(folder), "--steps", "1"])
    assert "is there already" in capsys.readouterr().out
    assert (folder / "model.safetensors").read_bytes() == before
