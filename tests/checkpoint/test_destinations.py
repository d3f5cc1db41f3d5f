"""The converters against megatron-core itself: what they write it loads at every layout, what it saves they read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from safetensors.torch import load_file

from checkpoint_tools import hf_to_hf, hf_to_megatron, megatron_to_hf
from megatron_r1v2.checkpoint.hf.config import read_hf_architecture
from megatron_r1v2.checkpoint.hf.weights import load_hf_weights
from megatron_r1v2.checkpoint.megatron.parameter_names import dist_entry
from megatron_r1v2.checkpoint.megatron.torch_dist import TorchDist
from megatron_r1v2.checkpoint.sources import CheckpointSpec, HfSpec, exported_rows
from megatron_r1v2.config.schema import ParallelConfig, Part
from megatron_r1v2.models.r1v2 import build_r1v2
from megatron_r1v2.models.settings import ComputeSettings
from megatron_r1v2.training.part_state import part_state
from megatron_r1v2.training.store import load_weights
from tests.checkpoint.hf.test_mapping import VARIANTS
from tests.parallel_layouts import start_layout
from tests.ranks import run_ranks
from tests.tiny_hf import tiny_hf_model
from tests.whole_weights import gather_hf_weights, save_weights

LAYOUTS = [(2, 1), (1, 2)]
CHOSEN = ("6b-odd", "300m-tied")


def build(folder: str, *, tensor: int, pipeline: int):
    context = start_layout(ParallelConfig(tensor=tensor, pipeline=pipeline))
    architecture, _ = read_hf_architecture(folder)
    settings = ComputeSettings(tensor=tensor, pipeline=pipeline, dtype=torch.bfloat16)
    model = build_r1v2(architecture, settings, groups=context.groups, device=context.device)
    return model, context


def load_and_save(root: str, layouts: list[tuple[int, int]]) -> list[str]:
    """Load what the converter wrote, say what differs, and save it as a run does, at every layout."""
    wrong = []
    for variant in CHOSEN:
        expected = load_file(f"{root}/{variant}/model.safetensors")
        for tensor, pipeline in layouts:
            model, context = build(f"{root}/{variant}", tensor=tensor, pipeline=pipeline)
            for parameter in model.parameters():
                parameter.data.fill_(float("nan"))
            parts = load_weights(model, Path(root) / f"{variant}-megatron")
            assert parts == [Part.adapter, Part.language, Part.vision]
            exported = gather_hf_weights(model, context)
            where = f"{variant} {tensor}x{pipeline}"
            if context.is_main:
                wrong += [f"{where}: {name}" for name in exported.keys() ^ expected.keys()]
                wrong += [f"{where}: {name}" for name in expected if not torch.equal(exported[name], expected[name])]
            save_weights(model, Path(root) / f"{variant}-{tensor}x{pipeline}", context, parts=list(Part))
    return wrong


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> tuple[Path, list[str]]:
    """Make checkpoints with the converter, load and save them with megatron-core on two ranks."""
    root = tmp_path_factory.mktemp("conversion")
    for variant in CHOSEN:
        tiny_hf_model(root / variant, dtype=torch.bfloat16, **VARIANTS[variant])
        hf_to_megatron.main(["--hf", str(root / variant), "--output", str(root / f"{variant}-megatron"), "--quiet"])
    return root, run_ranks(2, load_and_save, str(root), LAYOUTS)[0]


def test_megatron_core_loads_what_was_written_at_other_layouts(converted):
    _, wrong = converted
    assert wrong == []


@pytest.mark.parametrize("variant", CHOSEN)
@pytest.mark.parametrize("made", ["megatron", "2x1", "1x2"])
def test_what_megatron_core_saved_at_any_layout_comes_back_bit_for_bit(converted, tmp_path, variant, made):
    root, _ = converted
    arguments = ["--checkpoint", str(root / f"{variant}-{made}"), "--output", str(tmp_path / "out"), "--quiet"]
    megatron_to_hf.main(arguments if made == "megatron" else [*arguments, "--base", str(root / variant)])
    assert_same_weights(root / variant, tmp_path / "out")
    names = {path.name for path in (root / variant).iterdir()} | {"checkpoint_manifest.json"}
    names |= {"processor_config.json", "video_preprocessor_config.json"}  # which the model came without
    names |= {"README.md"}  # the card of an export
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


def assert_same_weights(expected: Path, got: Path) -> None:
    ours, theirs = load_file(got / "model.safetensors"), load_file(expected / "model.safetensors")
    assert ours.keys() == theirs.keys()
    wrong = [
        name for name in ours if ours[name].dtype != theirs[name].dtype or not torch.equal(ours[name], theirs[name])
    ]
    assert wrong == []


@pytest.mark.parametrize("layout", ["chat", "transformers"])
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_there_and_back_bit_for_bit_tied_and_untied_in_both_layouts(tmp_path, variant, layout):
    tiny_hf_model(tmp_path / "hf", dtype=torch.bfloat16, **VARIANTS[variant])
    hf_to_hf.main(["--hf", f"{tmp_path}/hf", "--output", f"{tmp_path}/start", "--layout", layout, "--quiet"])
    hf_to_megatron.main(["--hf", f"{tmp_path}/start", "--output", f"{tmp_path}/megatron", "--quiet"])
    source = ["--checkpoint", f"{tmp_path}/megatron", "--quiet"]
    megatron_to_hf.main([*source, "--layout", layout, "--output", f"{tmp_path}/back"])
    assert_same_weights(tmp_path / "start", tmp_path / "back")
    tied = bool(VARIANTS[variant].get("tied"))
    assert ("language_model.lm_head.weight" in load_file(tmp_path / "back" / "model.safetensors")) != tied
    hf_to_hf.main(["--hf", f"{tmp_path}/back", "--output", f"{tmp_path}/end", "--layout", "transformers", "--quiet"])
    assert_same_weights(tmp_path / "hf", tmp_path / "end")


def test_parts_that_were_not_trained_come_from_the_base_that_they_were_trained_on(converted, tmp_path, capsys):
    root, _ = converted
    shutil.copytree(root / "6b-odd-2x1", tmp_path / "checkpoint")
    state = torch.load(tmp_path / "checkpoint" / "state.pt", weights_only=True)
    torch.save({**state, "parts": ["adapter"]}, tmp_path / "checkpoint" / "state.pt")
    tiny_hf_model(tmp_path / "other", dtype=torch.bfloat16, **VARIANTS["6b-odd"], seed=99)
    source = ["--checkpoint", str(tmp_path / "checkpoint"), "--quiet"]
    to_other = [*source, "--base", str(tmp_path / "other"), "--output", str(tmp_path / "out")]
    recipe = tmp_path / "checkpoint" / "recipe.yaml"
    recipe.write_text(f"model:\n  hf_path: {root / '6b-odd'}\n")
    with pytest.raises(SystemExit):
        megatron_to_hf.main(to_other)
    assert f"its recipe names {root / '6b-odd'}" in capsys.readouterr().err
    recipe.unlink()
    megatron_to_hf.main(to_other)  # of a version that noted nothing, and nothing is known: said, and done
    assert "has no checksum of the language and vision weights" in capsys.readouterr().err
    got, base, trained = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "out", tmp_path / "other", root / "6b-odd")
    )
    for name, value in got.items():
        expected = trained if name.startswith("multi_modal_projector") else base
        assert torch.equal(value, expected[name]), name


def test_what_cannot_be_converted_is_refused_in_words(converted, tmp_path, capsys):
    root, _ = converted
    made, base = str(root / "6b-odd-2x1"), str(root / "6b-odd")
    cases = {
        "give --base": ["--checkpoint", made, "--output", str(tmp_path / "out")],
        "no place in it": ["--checkpoint", made, "--base", str(root / "300m-tied"), "--output", str(tmp_path / "out")],
        "one folder": ["--checkpoint", made, "--base", base, "--output", base, "--overwrite"],
        "no finished checkpoint": ["--checkpoint", str(tmp_path), "--base", base, "--output", str(tmp_path / "out")],
        "--overwrite": ["--checkpoint", made, "--base", base, "--output", str(root / "300m-tied")],
        "negative": ["--checkpoint", made, "--base", base, "--output", str(tmp_path / "out"), "--workers", "-1"],
    }
    for told, arguments in cases.items():
        with pytest.raises(SystemExit) as stopped:
            megatron_to_hf.main([*arguments, "--quiet"])
        assert stopped.value.code == 1, told
        assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_both_layouts_and_a_dtype_there_and_back(converted, tmp_path):
    root, _ = converted
    start = str(root / "6b-odd")
    hf_to_hf.main(
        ["--hf", start, "--output", f"{tmp_path}/chat", "--layout", "chat", "--shard-size", "100KB", "--quiet"]
    )
    assert len(list((tmp_path / "chat").glob("*.safetensors"))) > 2
    hf_to_megatron.main(["--hf", f"{tmp_path}/chat", "--output", f"{tmp_path}/megatron", "--quiet", "--dtype", "fp32"])
    source = ["--checkpoint", f"{tmp_path}/megatron", "--quiet"]
    megatron_to_hf.main([*source, "--layout", "transformers", "--output", f"{tmp_path}/back", "--dtype", "bf16"])
    assert_same_weights(root / "6b-odd", tmp_path / "back")
    config = json.loads((tmp_path / "megatron" / "hf" / "config.json").read_text())
    assert config["torch_dtype"] == "float32"
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("tool", [hf_to_hf, hf_to_megatron])
def test_a_source_is_never_the_output(converted, tool, capsys):
    root, _ = converted
    folder = str(root / "300m-tied")
    before = sorted((path.name, path.stat().st_mtime_ns) for path in Path(folder).iterdir())
    for output in (folder, f"{folder}/inside", str(root)):
        layout = ["--layout", "chat"] if tool is hf_to_hf else []
        with pytest.raises(SystemExit):
            tool.main(["--hf", folder, "--output", output, "--overwrite", *layout, "--quiet"])
        assert "one folder or one inside the other" in capsys.readouterr().err
    assert sorted((path.name, path.stat().st_mtime_ns) for path in Path(folder).iterdir()) == before


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_names_and_shapes_are_those_of_megatron_core(context, tmp_path, variant):
    """The keys are those that the model itself would save."""
    tiny_hf_model(tmp_path / "hf", dtype=torch.bfloat16, **VARIANTS[variant])
    model, ranks = build(str(tmp_path / "hf"), tensor=1, pipeline=1)
    load_hf_weights(model, tmp_path / "hf", ranks)
    wanted: dict[str, tuple[int, ...]] = {}
    for value in part_state(model, list(Part)).values():
        for sharded in [value] if isinstance(value, ShardedTensor) else value.build():
            wanted[sharded.key] = tuple(sharded.global_shape)
    hf_to_megatron.main(["--hf", str(tmp_path / "hf"), "--output", str(tmp_path / "megatron"), "--quiet"])
    written = TorchDist(tmp_path / "megatron" / "tensors")
    assert {key: written.array(key).shape for key in written.array_names()} == wanted
    # And what is in them: every parameter of the model is the one that is read from the checkpoint.
    with CheckpointSpec(tmp_path / "megatron").open() as source:
        assert [entry for entry in source.names() if dist_entry(entry, source.architecture).key not in wanted] == []


def test_any_number_of_workers_writes_the_same_bytes(converted, tmp_path):
    root, _ = converted
    start = str(root / "300m-tied")
    for workers in ("1", "2"):
        out = ["--output", str(tmp_path / workers), "--workers", workers, "--shard-size", "200KB", "--quiet"]
        hf_to_hf.main(["--hf", start, "--layout", "chat", *out])
    one, two = (sorted((tmp_path / number).iterdir()) for number in ("1", "2"))
    assert [path.name for path in one] == [path.name for path in two]
    assert [a.name for a, b in zip(one, two, strict=True) if a.read_bytes() != b.read_bytes()] == []


def test_sources_agree_on_every_parameter(converted):
    root, _ = converted
    with HfSpec(root / "6b-odd").open() as hf, CheckpointSpec(root / "6b-odd-2x1", root / "6b-odd").open() as saved:
        rows = [row.ours for row in exported_rows(hf.architecture, "chat")]
        assert hf.names() == saved.names() == sorted(rows)
        assert [ours for ours in rows if not torch.equal(hf.parameter(ours), saved.parameter(ours))] == []
        assert [ours for ours in rows if hf.meta(ours).shape != saved.meta(ours).shape] == []
