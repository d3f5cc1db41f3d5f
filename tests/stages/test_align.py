"""Whole align runs of a few steps: what they learn, log, leave out and refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_r1v2.checkpoint.megatron.run_folder import finished_checkpoints
from megatron_r1v2.config.recipes import AlignRecipe
from megatron_r1v2.stages.align import supervised_sample
from megatron_r1v2.stages.session import open_session
from tests.stages.runs import (
    checkpoint_contents,
    differences,
    read_metrics,
    recipe_for,
    run_stage,
    without_timings,
)

Run = Callable[..., Path]


def settings(root: Path, output: Path, *overrides: str) -> AlignRecipe:
    return recipe_for(root, output, ("checkpoint.every_steps=0", *overrides), stage="align")


@pytest.fixture
def run(root: Path, tmp_path: Path) -> Run:
    def start(*overrides: str, name: str = "run") -> Path:
        return run_stage(settings(root, tmp_path / name, *overrides))

    return start


def end(run: Path) -> dict:
    return checkpoint_contents(finished_checkpoints(run / "checkpoints")[-1])


def test_the_responses_are_learnt_and_only_what_trains_is_saved(run: Run) -> None:
    folder = run("train.steps=15", "train.learning_rate=0.01", "train.warmup_steps=3")
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, 16))
    assert lines[0]["actor/nll"] > 2.5
    assert lines[-1]["actor/nll"] < lines[0]["actor/nll"] - 1
    assert [line["actor/lr"] for line in lines[:3]] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01])
    assert lines[-1]["actor/lr"] < 0.001
    for line in lines:
        assert line["actor/loss"] == pytest.approx(line["actor/nll"], rel=1e-5)
        assert {"actor/grad_norm", "timing_s/update", "timing_s/step", "data/corrupt_samples"} <= line.keys()
    saved = end(folder)
    assert saved["state.pt"]["parts"] == ["adapter"]
    assert all("adapter." in name for name in saved["tensors"])


def test_text_only_prompts_are_left_out_unless_the_language_model_trains(run: Run) -> None:
    adapter = read_metrics(run("train.steps=2", "train.prompts_per_step=16", name="adapter"))
    assert [line["data/text_only_left_out"] for line in adapter] == [4, 4]
    language = read_metrics(run("train.steps=1", "train.prompts_per_step=16", "train.parts=[language]", name="both"))
    assert language[0]["data/text_only_left_out"] == 0
    # The first loss is over other tokens, so it differs; weights and prompts are the same.
    assert language[0]["actor/nll"] != pytest.approx(adapter[0]["actor/nll"], rel=1e-6)


def test_microbatches_do_not_change_the_update(run: Run) -> None:
    one, four = (
        end(run("train.steps=1", f"train.tokens_per_microbatch={size}", name=str(size)))["tensors"] for size in (1, 256)
    )
    name = "optimizer.state.exp_avg.adapter.linear_fc1.weight"
    assert one[name].abs().max() > 0
    torch.testing.assert_close(one[name], four[name], rtol=1e-4, atol=1e-8)


def test_a_resumed_stage_ends_with_the_same_bits(run: Run, root: Path, tmp_path: Path) -> None:
    overrides = ("train.steps=4", "checkpoint.every_steps=2", "train.warmup_steps=1")
    folder = run(*overrides)
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    shutil.rmtree(again / "checkpoints" / "step-00000004")
    run(*overrides, name="again")
    assert differences(end(again), end(folder)) == []
    assert without_timings(read_metrics(again)) == without_timings(read_metrics(folder))


def test_the_stage_ends_when_validation_is_good_enough(run: Run, root: Path) -> None:
    folder = run(
        "train.steps=40",
        "train.learning_rate=0.01",
        f"data.validation={root / 'data'}",
        "evaluation.every_steps=5",
        "evaluation.stop_at_pass_at_1=0.3",
        "train.parts=[adapter, language]",
    )
    lines = read_metrics(folder)
    assert 5 <= len(lines) < 40
    assert lines[-1]["validation/pass_at_1"] >= 0.3
    assert all(line.get("validation/pass_at_1", 0) < 0.3 for line in lines[:-1])
    best = json.loads((folder / "checkpoints" / "best.json").read_text())
    assert best == {"step": len(lines), "pass_at_1": lines[-1]["validation/pass_at_1"]}
    assert (
        run_stage(
            settings(
                root,
                folder,
                "train.steps=40",
                "train.learning_rate=0.01",
                "train.parts=[adapter, language]",
                f"data.validation={root / 'data'}",
            ),
        )
        == folder
    )
    assert read_metrics(folder) == lines


def test_a_sample_is_the_prompt_its_response_and_the_end_token(root: Path, tmp_path: Path) -> None:
    with open_session(settings(root, tmp_path / "run"), stage="align", shown=()) as session:
        prompt = session.stream.next(1)[0]
        encoder = session.response_encoder
        sample = supervised_sample(prompt, encoder, "data")
        assert sample.token_ids[: sample.prompt_length] == prompt.token_ids
        response = session.tokenizer.decode(list(sample.token_ids[sample.prompt_length : -1]))
        assert response == prompt.response
        assert sample.token_ids[-1] in session.tokenizer.stop_ids(["<|im_end|>"])
        with pytest.raises(ValueError, match=rf"{prompt.key}.* has no response.*r1v2 prepare"):
            supervised_sample(replace(prompt, response=None), encoder, "data")
