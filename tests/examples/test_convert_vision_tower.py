import onnx
import pytest
import torch
from transformers import InternVLVisionModel

from examples.real_weights import convert_vision_tower as converter
from megatron_r1v2.checkpoint.hf.architecture import vision_architecture
from tests.examples.tiny_weights import Focus, random_dinov2, write_onnx

PIXELS = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An ONNX file, the network that it is of, and the folder that we make of it."""
    folder = tmp_path_factory.mktemp("vision")
    network = Focus(random_dinov2())
    write_onnx(folder / "tiny.onnx", network)
    converter.main(["--onnx", str(folder / "tiny.onnx"), "--output", str(folder / "hf"), "--tile", "28"])
    return folder, network.backbone


def test_the_tower_computes_what_dinov2_does_up_to_its_last_norm(made):
    folder, dinov2 = made
    tower = InternVLVisionModel.from_pretrained(folder / "hf")
    with torch.no_grad():
        ours = dinov2.layernorm(tower(pixel_values=PIXELS).last_hidden_state)
        theirs = dinov2(pixel_values=PIXELS).last_hidden_state
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_every_weight_is_that_of_the_network(made):
    _, dinov2 = made
    found = converter.read_backbone(made[0] / "tiny.onnx")
    expected = dinov2.state_dict()
    assert found.keys() == expected.keys() - {"embeddings.mask_token"}
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def test_an_export_of_an_older_transformers_is_read_as_well(made, tmp_path):
    model = onnx.load(made[0] / "tiny.onnx")
    older = {newer: older for older, newer in converter._BEFORE_TRANSFORMERS_5.items()}
    for stored in [*model.graph.initializer, *model.graph.node]:
        for newer, name in older.items():
            if isinstance(stored, onnx.TensorProto):
                stored.name = stored.name.replace(newer, name)
            else:
                stored.input[:] = [each.replace(newer, name) for each in stored.input]
    onnx.save(model, tmp_path / "older.onnx")
    assert any("attention.attention.query.bias" in tensor.name for tensor in model.graph.initializer)
    found, expected = (converter.read_backbone(path) for path in (tmp_path / "older.onnx", made[0] / "tiny.onnx"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_the_configuration_is_one_that_our_tower_computes(made):
    config = InternVLVisionModel.from_pretrained(made[0] / "hf").config
    architecture = vision_architecture(config.to_dict())
    assert (architecture.image_size, architecture.patch_size, architecture.num_patches) == (28, 14, 4)
    assert (architecture.num_heads, architecture.num_layers, architecture.ffn_size) == (2, 2, 256)
    assert (architecture.norm, architecture.qkv_bias, architecture.qk_norm) == ("layer_norm", True, False)


def test_positions_of_the_same_size_stay_as_they_are():
    positions = torch.randn(1, 17, 8)
    assert torch.allclose(converter.resize_positions(positions, 4), positions, atol=1e-6)
    resized = converter.resize_positions(positions, 2)
    assert resized.shape == (1, 5, 8)
    assert torch.equal(resized[:, 0], positions[:, 0])
    with pytest.raises(ValueError, match="15 patch positions are no square"):
        converter.resize_positions(positions[:, :16], 2)


def test_an_export_of_the_trained_size_is_read_too(tmp_path):
    """There the positions are one tensor, under their own name."""
    network = Focus(random_dinov2())
    write_onnx(tmp_path / "whole.onnx", network, side=56)
    found = converter.read_backbone(tmp_path / "whole.onnx")
    assert torch.equal(found["embeddings.position_embeddings"], network.backbone.embeddings.position_embeddings)


def test_a_backbone_that_is_the_whole_network_is_read_too(made, tmp_path):
    write_onnx(tmp_path / "alone.onnx", made[1])
    found, expected = (converter.read_backbone(path) for path in (tmp_path / "alone.onnx", made[0] / "tiny.onnx"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("tile", [0, 14, 30])
def test_a_tile_that_does_not_divide_is_refused(made, tmp_path, tile):
    with pytest.raises(ValueError, match=f"--tile {tile} is no positive multiple of 28"):
        converter.convert(made[0] / "tiny.onnx", tmp_path / "hf", tile=tile)


def test_another_network_is_refused_and_leaves_nothing(tmp_path, capsys):
    write_onnx(tmp_path / "other.onnx", torch.nn.Conv2d(3, 4, 14))
    with pytest.raises(SystemExit) as stopped:
        converter.main(["--onnx", str(tmp_path / "other.onnx"), "--output", str(tmp_path / "hf")])
    assert stopped.value.code == 1
    assert "other.onnx has no tensor embeddings.cls_token" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("backbone.encoder.layer.1.layer_scale1.lambda1", r"1 tensors are missing \['encoder.layer.1.layer_scale1"),
        ("backbone.encoder.layer.0.mlp.fc1.bias", r"1 tensors are missing \['encoder.layer.0.mlp.fc1.bias'"),
        ("onnx::", "the positions were not found"),
    ],
)
def test_a_network_without_a_part_is_refused(made, tmp_path, name, message):
    model = onnx.load(made[0] / "tiny.onnx")
    kept = [tensor for tensor in model.graph.initializer if not tensor.name.startswith(name)]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    onnx.save(model, tmp_path / "part.onnx")
    with pytest.raises(ValueError, match=message):
        converter.convert(tmp_path / "part.onnx", tmp_path / "hf", tile=28)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("kept", [0, 100, 5000, -1])
def test_a_truncated_file_is_refused(made, tmp_path, kept):
    whole = (made[0] / "tiny.onnx").read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[:kept])
    with pytest.raises(ValueError, match="cut.onnx"):
        converter.convert(tmp_path / "cut.onnx", tmp_path / "hf", tile=28)
    assert not (tmp_path / "hf").exists()
