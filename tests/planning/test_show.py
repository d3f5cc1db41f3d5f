"""A plan in words, tables and JSON: the numbers shown are those of the plan."""

import io
import json
import re
from dataclasses import replace

from rich.console import Console

from megatron_r1v2.planning.memory import GIB
from megatron_r1v2.planning.show import as_json, print_plan
from tests.planning.plans import plan_of


def printed(plan, width=80):
    stream = io.StringIO()
    print_plan(plan, Console(file=stream, width=width))
    return stream.getvalue()


def test_a_plan_that_fits_is_shown_with_its_layout_and_its_best_one():
    plan = plan_of()
    text = printed(plan)
    flat = " ".join(text.split())
    assert "38,392,158,592 parameters (vision 5,536,496,000, adapter 91,786,240, language 32,763,876,352)" in flat
    assert "TP8 PP1 DP1, recompute none, FP8 none, on 8 x 80 GiB" in flat
    peak = plan.memory.peak
    free = (plan.cluster.limit - peak.total) / GIB
    assert f"It fits: stage 0, {peak.phase}: {peak.total / GIB:.1f} of 76.0 GiB, {free:.1f} free" in flat
    assert " ".join(plan.proposal.best.settings) in flat
    assert all(note in flat for note in plan.notes)
    assert f"Assumed for the times: {plan.cluster.hardware.name}" in flat
    assert "Not measured." in flat


def test_the_table_has_a_row_for_each_rank_and_phase_that_fits_eighty_columns():
    plan = plan_of()
    lines = printed(plan).splitlines()
    header = next(line for line in lines if line.split()[:2] == ["stage", "phase"])
    assert header.split()[2:] == ["params", "grads", "optim.", "activ.", "KV", "images", "buffers", "total"]
    for rank in plan.memory.ranks:
        row = next(line.split() for line in lines if line.split()[:2] == [str(rank.stage), rank.phase])
        parts = (rank.parameters, rank.gradients, rank.optimizer, rank.activations, rank.kv_cache)
        shown = [f"{value / GIB:.2f}" for value in (*parts, rank.image_features, rank.buffers, rank.total)]
        assert row[2:] == shown


def test_the_seconds_of_a_step_are_those_of_the_plan():
    plan = plan_of()
    lines = [re.findall(r"[\w.-]+", line) for line in printed(plan).splitlines()]
    header = lines.index(["vision", "prefill", "decode", "host", "log-probs", "update", "step"])
    time = plan.time
    seconds = (time.vision, time.prefill, time.decode, time.host, time.log_probs, time.update, time.total)
    assert [f"{value:.1f}" for value in seconds] in lines[header + 1 : header + 3]


def test_the_hours_of_a_run_are_those_of_its_steps():
    plan = plan_of("train.steps=1200")
    hours = f"A run of train.steps=1200: {1200 * plan.time.total / 3600:,.1f} hours, without starts, evaluations and"
    assert hours in " ".join(printed(plan).split())
    assert as_json(plan)["steps"] == 1200
    assert "A run of" not in printed(replace(plan, steps=0)), "the pairs stage has no steps"


def test_a_plan_that_does_not_fit_says_by_how_much():
    plan = plan_of("train.parts=[vision,adapter,language]")
    flat = " ".join(printed(plan, width=200).split())
    over = (plan.memory.peak.total - plan.cluster.limit) / GIB
    assert f"{over:.1f} too many" in flat
    assert "It does not fit" in flat
    assert as_json(plan)["best"] is None
    assert as_json(plan)["fits"] is False


def test_json_has_the_numbers_of_the_plan():
    plan = plan_of(gpus=16)
    values = json.loads(json.dumps(as_json(plan)))
    assert values["parameters"] == {"vision": 5_536_496_000, "adapter": 91_786_240, "language": 32_763_876_352}
    assert values["layout"]["data"] == 2
    assert values["limit_bytes"] == plan.cluster.limit
    assert [rank["total"] for rank in values["ranks"]] == [rank.total for rank in plan.memory.ranks]
    assert values["host"] == {"buffer": plan.memory.host_buffer, "tiles": plan.memory.host_tiles}
    assert values["largest"] == plan.limits
    assert (
        values["seconds"]["step"]
        == plan.time.total
        == sum(values["seconds"][name] for name in ("vision", "prefill", "decode", "host", "log-probs", "update"))
    )
    best = plan.proposal.best
    assert values["best"]["settings"] == list(best.settings)
    assert values["best"]["peak_bytes"] == best.memory.peak.total
    assert values["best"]["seconds"]["step"] == best.time.total
    assert (values["name"], values["reason"], values["notes"]) == (plan.name, plan.proposal.reason, list(plan.notes))
    assert values["mean_response_tokens"] == plan.mean_response


def test_tails_and_the_host_are_shown_as_what_they_are():
    plan = plan_of("train.prompts_per_step=8")
    flat = " ".join(printed(plan).split())
    assert "what waiting for the last responses costs" in flat
    assert "Simulated, not measured: log-normal lengths of 4096 tokens on average with a spread of 0.80, cut at" in flat
    for tail in plan.tails:
        assert f"{tail.tokens / tail.seconds:,.0f} {tail.lost:.0%}" in flat
    assert "with 65 launches a layer (without CUDA graphs) of 7 us, counted in the code. Not measured." in flat
    assert "with 1 launches a layer (with CUDA graphs)" in " ".join(
        printed(plan_of("generation.cuda_graphs=true")).split()
    )
    seconds = as_json(plan)["host_seconds"]
    assert seconds["with_cuda_graphs"] < seconds["without_cuda_graphs"] == plan.time.host
    assert (
        f"Decode would wait for the CPU for {seconds['without_cuda_graphs']:.0f} s of a step without CUDA graphs (65 "
        f"launches a layer) and {seconds['with_cuda_graphs']:.0f} s with them (1): an estimate."
    ) in flat
    assert [tail["lost"] for tail in as_json(plan)["tails"]] == [tail.lost for tail in plan.tails]
