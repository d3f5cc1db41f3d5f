"""A user's mistake ends each entry point with one message and code 2, and changes nothing on disk."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from checkpoint_tools import megatron_to_hf
from megatron_r1v2.__main__ import main
from megatron_r1v2.checkpoint.megatron.run_folder import resolve_checkpoint
from megatron_r1v2.config.command_line import tell_bad_input
from megatron_r1v2.data.samples import ShardSample, parse_sample
from megatron_r1v2.data.shards import write_shards
from megatron_r1v2.data.stream import read_shards
from tests.stages.runs import read_metrics, recipe_for, run_stage
from tests.stages.tiny_run import write_data, write_model
from tests.tiny_hf import tiny_hf_model, tiny_text_config

Entry = Callable[..., str]
SHORT = ("train.steps=2", "checkpoint.every_steps=0")


@pytest.fixture
def run_entry(root: Path, tmp_path: Path, capsys) -> Entry:
    """Return a function that runs an entry point with overrides and gives back its error message."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("data")

    def run(*overrides: str, stage: str = "grpo") -> str:
        recipe_for(root, tmp_path / "run", SHORT, stage=stage)
        with pytest.raises(SystemExit) as ended:
            main([stage.replace("_", "-"), str(tmp_path / "run.yaml"), *SHORT, *overrides])
        told = capsys.readouterr().err
        assert ended.value.code == 2, told
        assert "Traceback" not in told
        message = re.search(r"(?ms)^error: (.*)", told)
        assert message is not None, told
        assert (tmp_path / "run" / "precious").read_text() == "data"
        return message[1]

    return run


@pytest.fixture
def model(root: Path, tmp_path: Path) -> Path:
    """Return a copy of the model that may be broken."""
    return shutil.copytree(root / "model", tmp_path / "model")


def damaged_data(folder: Path, damaged: int, *, images: int = 40) -> Path:
    """Write shards in which some pictures are no pictures, the sizes in the tar file unchanged."""
    write_data(folder, images=images, texts=0)
    shard = folder / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    position = 0
    for _ in range(damaged):
        position = content.index(b"\x89PNG\r\n\x1a\n", position)
        content[position : position + 30] = bytes(30)
    shard.write_bytes(content)
    return folder


@pytest.mark.parametrize("stage", ["grpo", "align", "mpo", "evaluate"])
def test_an_unknown_setting_is_named_with_the_one_meant(run_entry: Entry, stage: str) -> None:
    message = run_entry("train.learnig_rate=1", stage=stage)
    assert "unknown setting 'train.learnig_rate'; did you mean 'train.learning_rate'?" in message


def test_all_that_is_wrong_is_told_at_once(run_entry: Entry) -> None:
    overrides = (
        "buffer.capcity=1",
        "buffer.max_age=0",
        "preference.beta=1",
        "evaluation.judge_url=http://127.0.0.1:1",
        "train.warmup_steps=50",
        "data.train=/nowhere",
        "model.checkpoint=/none",
        "parallel.tensor=3",
    )
    message = run_entry(*overrides, "learning_rate=5")
    assert message.startswith("9 mistakes\n"), message
    for part in (*overrides[:4], "train.warmup_steps=50", "data.train='/nowhere'", "model.checkpoint='/none'"):
        assert sum(part in line for line in message.splitlines()) == 1, part
    assert "parallel.tensor=3 does not divide the language model's 4 attention heads" in message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.steps=many", ("train.steps='many'", "a whole number")),
        ("train.parts=[adaptor]", ("train.parts", "vision, adapter, language")),
        ("model.precision=fp16", ("model.precision='fp16'", "fp32, bf16")),
        ("parallel.tensor=3", ("parallel.tensor=3 does not divide", "4 attention heads", "1, 2, 4")),
        ("parallel.pipeline=4", ("parallel.pipeline=4 does not divide", "2 layers")),
        ("parallel.tensor=2", ("parallel.tensor=2", "needs a multiple of 2 processes, got 1", "--nproc-per-node")),
        ("parallel.sequence=true", ("parallel.sequence=true", "parallel.tensor to 2 or more")),
        ("generation.responses_per_prompt=1", ("generation.responses_per_prompt=1", "GRPO needs 2 or more")),
        ("generation.max_response_tokens=5000", ("generation.max_response_tokens=5000", "2048 positions")),
        ("model.hf_path=/nowhere", ("model.hf_path='/nowhere'", "existing")),
        ("data.train=/nowhere", ("data.train='/nowhere'", "existing")),
        ("train.prompts_per_step=100", ("only 16 distinct prompts", "train.prompts_per_step=100")),
        ("data.max_prompt_tokens=20", ("data.max_prompt_tokens is 20", "sample-0", "lower data.max_tiles")),
        ("generation.kv_cache_gib=1e-7", ("generation.kv_cache_gib",)),
        ("generation.stop_tokens=[abc]", ("'abc' must be one token",)),
        ("algorithm.max_log_prob_difference=1e-12", ("algorithm.max_log_prob_difference",)),
    ],
)
def test_settings_that_cannot_be_met_are_named(run_entry: Entry, override: str, parts: tuple[str, ...]) -> None:
    message = run_entry(override)
    for part in parts:
        assert part in message


def test_a_missing_model_shard_is_named(run_entry: Entry, model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert f"{model}" in run_entry(f"model.hf_path={model}")


@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_a_truncated_model_shard_is_named(run_entry: Entry, model: Path, keep: float) -> None:
    path = model / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    message = run_entry(f"model.hf_path={model}")
    assert str(path) in message
    assert "truncated" in message


def test_a_tensor_of_another_shape_is_named(run_entry: Entry, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["intermediate_size"] *= 2
    (model / "config.json").write_text(json.dumps(config))
    message = run_entry(f"model.hf_path={model}")
    assert "mlp" in message
    assert "the weights do not belong to this config.json" in message


def test_a_template_that_repeats_an_image_is_told_with_both_counts(run_entry: Entry, model: Path) -> None:
    template = model / "chat_template.jinja"
    template.write_text(
        template.read_text()
        .replace("{{ part['text'] }}", "")
        .replace("{{ message['content'] }}", "{{ message['content'] }}{{ message['content'] }}")
    )
    message = run_entry(f"model.hf_path={model}")
    assert "<IMG_CONTEXT> tokens where its images need" in message
    assert "sample-0" in message


def test_a_few_corrupt_images_are_skipped_and_counted(root: Path, tmp_path: Path) -> None:
    data = damaged_data(tmp_path / "data", 2)
    overrides = (*SHORT, f"data.train={data}", "data.max_corrupt_fraction=0.1", "train.prompts_per_step=30")
    lines = read_metrics(run_stage(recipe_for(root, tmp_path / "run", overrides, stage="align")))
    assert lines[-1]["data/corrupt_samples"] >= 2
    assert lines[-1]["data/samples_read"] >= 60 + lines[-1]["data/corrupt_samples"]


def test_too_many_corrupt_images_stop_the_run_and_name_them(run_entry: Entry, tmp_path: Path) -> None:
    data = damaged_data(tmp_path / "data", 12)
    message = run_entry(f"data.train={data}", "data.max_corrupt_fraction=0.1", "train.prompts_per_step=30")
    assert "of 40 samples read are corrupt, more than data.max_corrupt_fraction = 0.1" in message
    assert "sample-0" in message
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_truncated_data_shard_is_named(run_entry: Entry, root: Path, tmp_path: Path) -> None:
    data = shutil.copytree(root / "data", tmp_path / "data")
    shard = data / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    assert f"{shard} is truncated" in run_entry(f"data.train={data}")


def test_supervised_data_without_responses_is_told_how_to_get_them(run_entry: Entry, tmp_path: Path) -> None:
    user = ({"role": "user", "content": "abc?"},)
    write_shards(
        [ShardSample(key=f"s-{index}", messages=user, answer="1", answer_type="exact") for index in range(8)],
        tmp_path / "data",
    )
    message = run_entry(f"data.train={tmp_path / 'data'}", "train.parts=[language]", stage="align")
    assert "has no response; the align stage trains on reference responses" in message


def test_data_without_pairs_is_told_how_to_get_them(run_entry: Entry, tmp_path: Path) -> None:
    user = ({"role": "user", "content": "abc?"},)
    write_shards(
        [ShardSample(key=f"s-{index}", messages=user, answer="1", answer_type="exact") for index in range(8)],
        tmp_path / "data",
    )
    for weights in ((), ("preference.preference_weight=0", "preference.quality_weight=0")):
        message = run_entry(f"data.train={tmp_path / 'data'}", "train.parts=[language]", *weights, stage="mpo")
        assert "has no pair of responses; the mpo stage trains on pairs" in message


def test_a_threshold_that_no_pair_reaches_is_told(run_entry: Entry) -> None:
    message = run_entry("preference.min_margin=5", "train.prompts_per_step=9", stage="mpo")
    assert "the largest margin in data.train=" in message
    assert "preference.min_margin=5" in message


def test_a_start_from_nothing_finished_is_refused(run_entry: Entry, tmp_path: Path) -> None:
    (tmp_path / "other" / "checkpoints" / ".step-00000007.partial").mkdir(parents=True)
    assert "no finished checkpoint in" in run_entry(f"model.checkpoint={tmp_path / 'other'}")


def test_a_checkpoint_of_a_model_of_another_size_is_named(run_entry: Entry, root: Path, tmp_path: Path) -> None:
    run_stage(recipe_for(root, tmp_path / "first", SHORT, stage="align"))
    other = wider_model(tmp_path / "wide")
    message = run_entry(f"model.hf_path={other}", f"model.checkpoint={tmp_path / 'first'}")
    assert "step-00000002" in message
    assert "adapter.linear_fc1.weight is [96, 256] in it and [128, 256] in the model" in message
    assert "model.hf_path must be the model that it was made from" in message


def wider_model(folder: Path) -> Path:
    """Write a model of another width, with the tokenizer of the others."""
    write_model(folder)
    kept = {path.name: path.read_bytes() for path in folder.iterdir() if "token" in path.name or "chat" in path.name}
    image_token = json.loads((folder / "config.json").read_text())["image_token_id"]
    tiny_hf_model(folder, text=tiny_text_config(hidden=128))
    for name, content in kept.items():
        (folder / name).write_bytes(content)
    config = json.loads((folder / "config.json").read_text())
    config["image_token_id"] = image_token
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_an_export_that_fails_leaves_checkpoint_and_target_as_they_were(
    root: Path, tmp_path: Path, model: Path, capsys
) -> None:
    run = run_stage(recipe_for(root, tmp_path / "run", SHORT, stage="align"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    export = tmp_path / "export"
    arguments = ["--checkpoint", str(run), "--base", str(model), "--output", str(export)]
    weights = (model / "model.safetensors").read_bytes()
    header = struct.unpack("<Q", weights[:8])[0]
    (model / "model.safetensors").write_bytes(weights[: 8 + header + 100])
    with pytest.raises(SystemExit):
        megatron_to_hf.main(arguments)
    assert "truncated" in capsys.readouterr().err
    assert not export.exists()
    (model / "model.safetensors").write_bytes(weights)
    megatron_to_hf.main(arguments)
    assert (export / "config.json").is_file()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_reward_function_that_always_fails_is_told_without_a_traceback(run_entry: Entry, tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text("def f(metadata, **_):\n    return metadata['color']\n")
    message = run_entry(f"reward.functions=[{{path: {own}, name: f}}]")
    assert "own.py: f failed for every response, the first to sample" in message
    assert "KeyError: 'color' (line 2); mend it" in message


def test_a_librarys_error_keeps_its_traceback() -> None:
    with pytest.raises(ValueError, match="invalid literal"), tell_bad_input():
        json.loads("1", parse_int=lambda _: int("x"))
    with pytest.raises(SystemExit) as ended, tell_bad_input():
        resolve_checkpoint("nowhere")
    assert ended.value.code == 2


@pytest.mark.parametrize(("stage", "field"), [("align", "response"), ("mpo", "rejected"), ("reward_model", "chosen")])
def test_a_row_with_more_tokens_than_the_model_has_positions_ends_the_start(
    run_entry: Entry, model: Path, tmp_path: Path, stage: str, field: str
) -> None:
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 300
    (model / "config.json").write_text(json.dumps(config))
    write_data(tmp_path / "data")
    long = "left 3, " * 300 + "</think>\\boxed{1}"
    samples = [
        replace(sample, **{field: long}) if number == 3 else sample
        for number, sample in enumerate(read_shards(tmp_path / "data", parse_sample))
    ]
    write_shards(samples, tmp_path / "long")
    message = run_entry(f"model.hf_path={model}", f"data.train={tmp_path / 'long'}", stage=stage)
    assert "sample 'sample-003': prompt and response have " in message
    assert "but the model has 300 positions (max_position_embeddings); shorten the response" in message


def test_a_long_validation_pair_ends_the_start_of_a_reward_model(run_entry: Entry, model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 300
    (model / "config.json").write_text(json.dumps(config))
    write_data(tmp_path / "data")
    samples = list(read_shards(tmp_path / "data", parse_sample))
    write_shards(samples, tmp_path / "short")
    write_shards([replace(sample, rejected="left 3, " * 300) for sample in samples], tmp_path / "long")
    message = run_entry(
        f"model.hf_path={model}",
        f"data.train={tmp_path / 'short'}",
        f"data.validation={tmp_path / 'long'}",
        "evaluation.every_steps=1",
        stage="reward_model",
    )
    assert "data.validation='" in message
    assert "but the model has 300 positions" in message
