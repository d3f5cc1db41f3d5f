"""The command line of the chat server: bad input before anything is loaded, and a help that teaches."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from megatron_r1v2.config.recipes import ServeRecipe
from megatron_r1v2.config.schema import ParallelConfig
from megatron_r1v2.serve.command import check_one_replica, main, serving_recipe


def told_by(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_bad_input_is_told_before_anything_is_loaded(run, tmp_path, capsys):
    model = str(run.root / "model")
    assert "CHECKPOINT='nowhere' is not a folder" in told_by(capsys, "nowhere")
    assert "`hf download OpenGVLab/InternVL3-1B " in told_by(capsys, "OpenGVLab/InternVL3-1B")
    assert "no finished checkpoint in" in told_by(capsys, str(tmp_path))
    assert "unknown setting 'generation.max_token'" in told_by(capsys, model, "generation.max_token=5")
    assert "the model has 2048 positions" in told_by(capsys, model, "generation.max_response_tokens=65536")
    settings = ("data.max_prompt_tokens=100", "generation.max_response_tokens=100")
    told = told_by(capsys, str(run.folder), "parallel.tensor=2")
    assert "parallel.tensor=2 x parallel.pipeline=1 needs 2 processes and there are 1; start torchrun" in told
    (tmp_path / "empty").write_text("\n")
    empty = str(tmp_path / "empty")
    assert "there is no key in it" in told_by(capsys, model, *settings, "--api-key-file", empty)
    assert "there is no key in it" in told_by(capsys, model, *settings, "--api-key-variable", "NOT_SET_ANYWHERE")
    assert "'-1'; accepted: a whole number" in told_by(capsys, model, "--max-queue", "-1")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"--port {port}: cannot listen there" in told_by(capsys, model, *settings, "--port", port)


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    told = capsys.readouterr().out
    for word in (
        "CHECKPOINT is one of",
        "generation.kv_cache_gib",
        "torchrun --nproc-per-node",
        "--api-key-file",
        "curl",
    ):
        assert word in told


def test_help_says_what_it_is_for_and_what_is_left_to_others(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "To serve in production, export the model" in told
    assert "run vLLM on the export" in told
    assert "put a proxy in front" in told


def test_a_layout_needs_its_number_of_processes():
    recipe = ServeRecipe(parallel=ParallelConfig(tensor=2, pipeline=2))
    check_one_replica(recipe, 4)
    for world_size in (1, 8):
        with pytest.raises(ValueError, match=f"needs 4 processes and there are {world_size}"):
            check_one_replica(recipe, world_size)


def test_a_run_brings_its_settings_and_an_hf_model_the_defaults(run):
    recipe = serving_recipe(str(run.folder), ["data.max_tiles=1"])
    assert (recipe.model.hf_path, recipe.data.max_tiles) == (str(run.root / "model"), 1)
    assert Path(recipe.model.checkpoint).parent == run.folder / "checkpoints"
    checkpoint = recipe.model.checkpoint
    assert serving_recipe(checkpoint, []).model.checkpoint == checkpoint
    recipe = serving_recipe(str(run.root / "model"), [])
    assert recipe.model.hf_path == str(run.root / "model")
    assert recipe.changed(model=ServeRecipe().model) == ServeRecipe()
