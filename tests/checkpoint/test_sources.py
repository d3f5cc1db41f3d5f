"""Sources of every kind, damaged: never an output that looks finished, always an error in words."""

from __future__ import annotations

import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from checkpoint_tools import parts
from megatron_r1v2.checkpoint.sources import CheckpointSpec, HfSpec, OverlaySpec, exported_rows
from megatron_r1v2.checkpoint.stored_tensors import write_hashed
from megatron_r1v2.checkpoint.tensor_files import tensor_bytes
from tests.checkpoint.damage import convert, files_below, flip, fresh, run, weight_files, what_differs
from tests.checkpoint.megatron.test_torch_dist import Hostile

PROPERTY = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("kind", ["foreign", "ours", "megatron"])
@PROPERTY
@given(data=st.data())
def test_a_truncated_file_never_gives_an_output(folders, tmp_path, kind, data):
    work = fresh(folders / kind, tmp_path / "work")
    # A text without a checksum says nothing of its end.
    files = [path for path in files_below(work) if kind != "foreign" or path.suffix != ".jinja"]
    path = data.draw(st.sampled_from(files))
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    if convert(work, tmp_path / "out"):
        assert path not in weight_files(work)
        assert what_differs(tmp_path / "out", folders / f"of-{kind}") == []
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("kind", ["ours", "megatron"])
@PROPERTY
@given(data=st.data())
def test_a_flipped_bit_never_changes_an_output_where_there_are_checksums(folders, tmp_path, kind, data):
    """Anywhere in any file, tokenizer and manifest included. What comes out in spite of it is right."""
    work = fresh(folders / kind, tmp_path / "work")
    path = data.draw(st.sampled_from(files_below(work)))
    flip(path, data.draw(st.integers(0, 8 * path.stat().st_size - 1)))
    if convert(work, tmp_path / "out"):
        assert what_differs(tmp_path / "out", folders / f"of-{kind}") == []
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("kind", ["foreign", "ours", "megatron"])
@pytest.mark.parametrize("damage", [b"{}", b'{"version": ', b""])
def test_a_damaged_tokenizer_is_refused_before_the_weights_are_written(folders, tmp_path, kind, damage, capsys):
    work = fresh(folders / kind, tmp_path / "work")
    path = next(work.rglob("tokenizer.json"))
    path.write_bytes(damage)
    assert not convert(work, tmp_path / "out")
    assert "tokenizer.json" in capsys.readouterr().err


@PROPERTY
@given(data=st.data())
def test_a_flipped_bit_in_a_checkpoint_of_others_is_found_by_its_crc(folders, tmp_path, data):
    work = fresh(folders / "megatron", tmp_path / "work")
    (work / "checkpoint_manifest.json").unlink()
    path = next((work / "tensors").glob("*.distcp"))
    flip(path, data.draw(st.integers(0, 8 * path.stat().st_size - 1)))
    if convert(work, tmp_path / "out"):
        got, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", folders / "foreign"))
        assert [name for name in expected if not torch.equal(got[name], expected[name])] == []
        shutil.rmtree(tmp_path / "out")


def test_a_pickle_beside_the_tensors_calls_nothing(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    work = fresh(folders / "megatron", tmp_path / "work")
    (work / "checkpoint_manifest.json").unlink()
    torch.save(Hostile(), work / "state.pt")
    assert not convert(work, tmp_path / "out")
    assert "state.pt cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "was-run").exists()


def test_a_shard_that_is_gone_is_named(folders, tmp_path, capsys):
    work = fresh(folders / "ours", tmp_path / "work")
    gone = sorted(work.glob("*.safetensors"))[1]
    gone.unlink()
    assert not convert(work, tmp_path / "out")
    assert f"{gone.name} is missing" in capsys.readouterr().err


def test_an_overlay_takes_its_parts_from_the_top_and_the_rest_from_the_base(made, tmp_path):
    run(parts, "export", "--checkpoint", made / "run", "--output", tmp_path / "adapter", "--quiet")
    top = HfSpec(tmp_path / "adapter", made / "other", ("adapter",), "transformers")
    with (
        OverlaySpec(made / "other", top).open() as overlay,
        HfSpec(made / "hf").open() as trained,
        HfSpec(made / "other").open() as base,
    ):
        assert overlay.names() == base.names()
        for ours in overlay.names():
            expected = trained if ours.startswith("adapter.") else base
            assert torch.equal(overlay.parameter(ours), expected.parameter(ours)), ours
            assert torch.equal(torch.cat(overlay.blocks(ours)), expected.parameter(ours)), ours
            content = bytearray()
            write_hashed(content.extend, overlay.stored_blocks(ours))
            assert content == tensor_bytes(expected.parameter(ours)), ours
            assert overlay.meta(ours).shape == expected.parameter(ours).shape


def test_sources_name_every_file_that_they_read(made):
    names = {path.name for path in HfSpec(made / "chat").files()}
    assert names == {"model.safetensors", "config.json"}
    checkpoint = CheckpointSpec(made / "run" / "checkpoints" / "step-00000007", made / "hf")
    names = {path.name for path in checkpoint.files()}
    assert {"__0_0.distcp", ".metadata", "state.pt", "model.safetensors", "config.json"} <= names


@pytest.mark.parametrize(
    ("ours", "dim"),
    [
        ("language.embedding.word_embeddings.weight", 0),
        ("language.output_layer.weight", 0),
        ("vision.decoder.layers.0.self_attention.linear_qkv.weight", 0),
        ("vision.decoder.layers.0.self_attention.linear_proj.weight", 1),
    ],
)
def test_what_pads_a_parameter_for_its_layout_is_taken_off(folders, monkeypatch, ours, dim):
    """As eight tensor-parallel ranks hold it: 300 words become 304, and two heads eight."""
    with CheckpointSpec(folders / "megatron").open() as source, HfSpec(folders / "foreign").open() as folder:
        whole = folder.parameter(ours)
        row = {row.ours: row for row in exported_rows(source.architecture, "chat")}[ours]
        tensors = row.to_hf([whole])
        padded = torch.cat([row.to_shard(tensors, tensor_rank=rank, tensor_size=8) for rank in range(8)], dim)
        assert padded.shape[dim] > whole.shape[dim]
        monkeypatch.setattr(source, "_manifest", None)  # its digest is that of the parameter without padding
        monkeypatch.setattr(source._dist, "read", lambda *_, **__: padded)
        assert torch.equal(source.parameter(ours), whole)
        short = padded.narrow(dim, 0, whole.shape[dim] - 1)
        monkeypatch.setattr(source._dist, "read", lambda *_, **__: short)
        with pytest.raises(ValueError, match="in the checkpoint, which is not the model of config.json"):
            source.parameter(ours)
