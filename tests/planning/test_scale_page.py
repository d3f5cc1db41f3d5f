"""docs/planning.md holds what its commands print, and the table's rows are those of the planner."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_r1v2.planning.command import main
from megatron_r1v2.planning.parameters import Layout
from megatron_r1v2.planning.roofline import step_time
from megatron_r1v2.planning.scale_page import scale_recipe, scale_table
from megatron_r1v2.planning.tails import Replica, Tail, simulate_tail
from tests.planning.plans import ARCHITECTURE, RECIPE

PAGE = (Path(__file__).parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")


def test_the_table_of_the_page_is_what_its_command_prints():
    assert scale_table(RECIPE.parent) in PAGE, "run `python -m megatron_r1v2.planning.scale_page examples/r1v2_38b`"


def test_the_plan_of_the_page_is_what_its_command_prints(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    main([str(RECIPE), "--gpus", "8", "--hf-config", "r1v2-38b"])
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    shown = PAGE.split("```\n")[1].splitlines()
    assert len(shown) > 20
    assert [line for line in shown if line != "..." and line not in printed] == []


def test_a_recipe_keeps_its_layout_and_its_prompts_a_replica():
    scaled = scale_recipe(RECIPE, 64)
    assert (scaled.layout, scaled.is_own_layout) == (Layout(8, 1, 8, 0, True), True)
    assert scaled.work.prompts_per_step == 8 * 64


def test_fewer_gpus_than_the_recipe_asks_for_get_the_best_layout_or_none():
    scaled = scale_recipe(RECIPE, 4)
    assert (scaled.layout.ranks, scaled.is_own_layout) == (4, False)
    assert scaled.work.prompts_per_step == 32
    assert scale_recipe(RECIPE, 1) is None


def test_a_recipe_without_its_cluster_is_refused(tmp_path):
    (tmp_path / "own.yaml").write_text("run:\n  stage: grpo\n")
    with pytest.raises(ValueError, match=r"own\.yaml has no first line like `# Cluster: 1 node x 8 GPUs x 80 GB`"):
        scale_recipe(tmp_path / "own.yaml", 8)


def test_seconds_are_those_of_the_roofline_with_the_simulated_decode():
    scaled = scale_recipe(RECIPE, 8)
    mean = scaled.lengths.mean
    tail = Tail(1, 0, seconds=100.0, tokens=scaled.work.responses_per_step * mean, lost=0.0)
    time = step_time(ARCHITECTURE, scaled.layout, scaled.work, scaled.hardware, mean_response=mean)
    seconds = scaled.seconds(tail)
    assert mean == 4096
    assert seconds["update"] == pytest.approx(time.update)
    assert seconds["step"] == pytest.approx(time.total - time.decode - time.host + 100)
    half = scaled.seconds(replace(tail, tokens=tail.tokens / 2))
    assert half["update"] == pytest.approx(time.update / 2)


def test_segments_prefill_what_goes_on_and_compute_its_log_probs():
    scaled = scale_recipe(RECIPE.parent / "grpo_64k.yaml", 32)
    prompts = scaled.work.prompts_per_step * scaled.work.prompt_tokens
    tail = Tail(4, 8192, seconds=1.0, tokens=1e6, lost=0.0)
    alone, again = scaled.seconds(tail), scaled.seconds(replace(tail, continued=prompts))
    assert again["prefill"] == pytest.approx(2 * alone["prefill"])
    assert alone["log-probs"] > 0


@pytest.mark.parametrize("recipe", ["grpo_64k", "grpo_language_64k"])
@pytest.mark.parametrize("gpus", [64, 512])
def test_segments_of_the_64k_recipes_lose_at_most_a_tenth_of_decode(recipe, gpus):
    scaled = scale_recipe(RECIPE.parent / f"{recipe}.yaml", gpus)
    replica = Replica.planned(ARCHITECTURE, scaled.layout, scaled.work, scaled.hardware)
    whole, parts = (
        simulate_tail(replica, scaled.lengths, replicas=gpus // 8, segment_tokens=tokens)
        for tokens in (0, scaled.segment_tokens)
    )
    assert whole.lost > 0.5
    assert parts.lost <= 0.1
