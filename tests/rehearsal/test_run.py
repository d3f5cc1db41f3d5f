"""Which ranks are rehearsed, and processes that end badly."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_r1v2.config.choices import Part, StageName
from megatron_r1v2.planning.parameters import Layout, language_layer_weights
from megatron_r1v2.rehearsal.ledger import PhaseMemory
from megatron_r1v2.rehearsal.preparation import STEPS, Step
from megatron_r1v2.rehearsal.rank import RankResult, RankSpec
from megatron_r1v2.rehearsal.run import (
    plan_as_rehearsed,
    planned_flops,
    planned_memory,
    ranks_to_rehearse,
    rehearse_ranks,
)
from tests.planning.plans import ARCHITECTURE, plan_of


@pytest.mark.parametrize(
    ("layout", "all_ranks", "ranks"),
    [
        (Layout(8, 1, 1, 0, True), False, [0]),
        (Layout(8, 2, 2, 0, True), False, [0, 16]),
        (Layout(8, 2, 2, 0, True), True, [0, 7, 8, 15, 16, 23, 24, 31]),
        (Layout(1, 1, 1, 0, False), True, [0]),
    ],
)
def test_one_rank_of_each_stage_or_the_corners(layout, all_ranks, ranks):
    assert ranks_to_rehearse(layout, all_ranks=all_ranks) == ranks


def test_phases_have_their_plan():
    ranks = plan_of().memory.ranks
    names = ("generate", "update", "save")
    of_phase = {name: planned_memory(ranks, RankResult(0), PhaseMemory(name, 0, 0)) for name in names}
    assert (of_phase["generate"].phase, of_phase["update"].phase, of_phase["save"]) == ("generate", "update", None)


def test_a_process_that_dies_is_a_finding(tmp_path):
    spec = RankSpec(str(tmp_path / "missing.yaml"), StageName.grpo, 0, 1, 8, 80.0)
    (result,) = rehearse_ranks([spec], tmp_path)
    assert "status 1" in result.error
    assert "missing.yaml" in result.error
    assert result.error_phase == "before its start"


@pytest.mark.parametrize(
    ("status", "words"),
    [(3, "ended with status 3"), (-9, "memory of this machine is used up"), (143, "143: a SIGTERM from outside")],
    ids=["exit", "killed", "terminated"],
)
def test_a_process_that_dies_in_a_phase_names_it(tmp_path, monkeypatch, status, words):
    def run(command, **_):
        Path(command[-1]).with_name("phase").write_text("update")
        return SimpleNamespace(wait=lambda: status, kill=lambda: None)

    monkeypatch.setattr(subprocess, "Popen", run)
    (result,) = rehearse_ranks([RankSpec("recipe.yaml", StageName.grpo, 3, 8, 8, 80.0)], tmp_path)
    assert (result.rank, result.error_phase) == (3, "update")
    assert words in result.error


def test_the_phases_of_ranks_are_told_while_they_are_rehearsed(tmp_path, monkeypatch, capsys):
    """A rehearsal takes minutes; a rank that has ended is told no more."""
    told = []

    def finish(own):
        while own.name == "rank-0" and (not told or "rank 4" in told[-1]):
            time.sleep(0.01)
            told.extend(capsys.readouterr().err.splitlines())
        RankResult(0).write(own / "result.json")
        return 0

    def run(command, **_):
        own = Path(command[-1]).parent
        (own / "phase").write_text("generate" if own.name == "rank-0" else "update")
        return SimpleNamespace(wait=lambda: finish(own), kill=lambda: None)

    monkeypatch.setattr(subprocess, "Popen", run)
    monkeypatch.setattr("megatron_r1v2.rehearsal.run.TELL_SECONDS", 0.05)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    rehearse_ranks([RankSpec("recipe.yaml", StageName.grpo, rank, 8, 8, 80.0) for rank in (0, 4)], tmp_path)
    assert re.fullmatch(r"rehearsing for \d+ s; rank 0: generate", told[-1])


def test_a_rehearsal_that_is_given_up_leaves_no_process(tmp_path, monkeypatch):
    """A rank would take Ctrl-C and SIGTERM as a wish to finish its step, which takes minutes."""
    stand_in = tmp_path / "python"
    stand_in.write_text('#!/bin/sh\ntrap "" TERM INT\necho $$ > "$3.pid"\nwhile :; do sleep 0.1; done\n')
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    pid = tmp_path / "rank-0" / "spec.json.pid"

    def give_up():
        while not (pid.is_file() and pid.read_text().strip()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=give_up, daemon=True).start()
    with pytest.raises(SystemExit) as stopped:
        rehearse_ranks([RankSpec("recipe.yaml", StageName.grpo, rank, 8, 8, 80.0) for rank in (0, 4)], tmp_path)
    assert stopped.value.code == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert not (tmp_path / "rank-4").exists(), "nothing is begun after it"
    assert signal.getsignal(signal.SIGTERM) is before


STEP = Step(long=2, short=14, mixed_groups=1, prompts_of_replica=64, long_of_replica=2)


@pytest.fixture(scope="module")
def plan():
    return plan_of()


def test_the_plan_of_what_was_rehearsed_has_fewer_rows_than_the_fullest_step(plan):
    rehearsed = {each.phase: each.total for each in plan_as_rehearsed(plan, STEP)}
    assert rehearsed.keys() == {each.phase for each in plan.memory.ranks}
    assert all(rehearsed[each.phase] <= each.total for each in plan.memory.ranks)


def test_generation_computes_each_long_prompt_once_for_its_responses(plan):
    language = ARCHITECTURE.language
    tokens = 2 * 4096
    products = 2.0 * tokens * language.num_layers * language_layer_weights(language) / 8
    attention = 4.0 * tokens * language.num_layers * language.num_heads * language.head_size * 2048 / 8
    without_images = planned_flops(replace(plan, work=replace(plan.work, tiles=0)), STEP, 0)["generate"]
    assert without_images == pytest.approx(products + attention)
    assert planned_flops(plan, STEP, 0)["generate"] > without_images


def test_an_update_has_three_passes_where_the_language_model_trains_and_one_more_recomputed(plan):
    update = planned_flops(plan, STEP, 0)["update"]
    language = planned_flops(plan_of("train.parts=[adapter, language]"), STEP, 0)["update"]
    recomputed = planned_flops(plan_of("train.recompute=full"), STEP, 0)["update"]
    assert language == pytest.approx(1.5 * update) == recomputed
    compared = planned_flops(plan_of("algorithm.kl_coefficient=0.1"), STEP, 0)["update"]
    assert compared == pytest.approx(1.5 * update), "one pass by the reference"
    more = planned_flops(plan, replace(STEP, mixed_groups=2), 0)["update"]
    assert more == pytest.approx(2 * update)


def of_stage(plan, stage, **changes):
    return replace(plan, work=replace(plan.work, stage=stage, responses_per_prompt=2, **changes))


def test_images_are_encoded_where_no_earlier_phase_has_left_their_features(plan):
    pairs = of_stage(plan, StageName.mpo)
    flops, bare = planned_flops(pairs, STEP, 0), planned_flops(of_stage(plan, StageName.mpo, tiles=0), STEP, 0)
    images = flops["update"] - bare["update"]
    assert images > 0
    assert flops["evaluate"] - bare["evaluate"] == pytest.approx(images), "one prompt each"
    assert flops["reference"] == pytest.approx(STEPS * (bare["update"] / 2 + images)), "of all prompts at once"
    trained, frozen = (
        planned_flops(of_stage(plan, StageName.mpo, parts=parts), STEP, 0)["update"]
        for parts in ((Part.adapter, Part.vision), (Part.adapter,))
    )
    assert trained - frozen == pytest.approx(2 * images), "and two gradients"
    scored = planned_flops(of_stage(plan, StageName.reward_model, parts=(Part.adapter, Part.score)), STEP, 0)
    assert scored["validate"] == pytest.approx((scored["update"] - images) / 2 + images)
    assert planned_flops(replace(pairs, layout=replace(plan.layout, pipeline=2)), STEP, 1)["update"] < bare["update"]


def test_phases_without_gradients_have_one_pass(plan):
    flops = planned_flops(plan, STEP, 0)
    assert flops["evaluate"] == pytest.approx(flops["generate"] / 2), "one prompt of two"
    assert "log_probs" not in flops, "those of the update are taken"
    several = plan_of("train.updates_per_step=2")
    flops = planned_flops(several, STEP, 0)
    assert flops["log_probs"] == pytest.approx(flops["update"] / 2)
    assert "log_probs" not in planned_flops(several, replace(STEP, whole_groups=1), 0), "of rows that go on"
    assert planned_flops(of_stage(plan, StageName.pairs), STEP, 0).keys() == {"generate"}


def test_a_stage_has_its_share_and_the_last_one_the_head(plan):
    halves = replace(plan, layout=replace(plan.layout, pipeline=2))
    first, last = (planned_flops(halves, STEP, stage)["update"] for stage in (0, 1))
    whole = planned_flops(plan, STEP, 0)["update"]
    assert first < last
    assert first + last == pytest.approx(whole)
