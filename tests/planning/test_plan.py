"""Whole plans: the shipped recipes on their clusters, and settings that no plan can be made of."""

import re

import pytest

from megatron_r1v2.config.choices import Part, StageName
from megatron_r1v2.config.load import load_recipe
from megatron_r1v2.planning.memory import GIB
from megatron_r1v2.planning.parameters import Layout
from megatron_r1v2.planning.plan import AssumedLengths, make_plan
from tests.planning.plans import HF_CONFIG, RECIPE, cluster, plan_of


def test_the_38b_recipe_fits_the_node_that_it_names():
    plan = plan_of()
    assert plan.layout == Layout(tensor=8, pipeline=1, data=1, sequence=True)
    assert plan.fits
    gate, generation, training, evaluation = plan.memory.ranks
    assert [rank.phase for rank in plan.memory.ranks] == ["gate", "generate", "update", "evaluate"]
    assert generation.kv_cache == evaluation.kv_cache == pytest.approx(20 * GIB, rel=1e-3)
    assert gate.kv_cache <= generation.kv_cache
    assert training.kv_cache == 0
    assert training.gradients == 2 * (training.gradients // 2)
    assert training.gradients < 50e6
    # 38.4 G weights of 2 bytes and 7 zero heads of 25 over 8 ranks; vision norms and such are whole on each.
    assert 9.0 < training.parameters / GIB < 9.2
    assert plan.memory.peak is training


def test_training_everything_on_one_node_does_not_fit():
    plan = plan_of("train.parts=[vision,adapter,language]")
    assert not plan.fits
    # 38.4 G parameters: 4 bytes of gradient and 12 of optimizer state each, over 8 ranks.
    training = plan.memory.peak
    assert training.phase == "update"
    assert training.gradients + training.optimizer > 16 * 38.4e9 / 8
    assert plan.proposal.best is None
    assert "nothing fits" in plan.proposal.reason


def shipped_recipes():
    return sorted(RECIPE.parent.glob("*.yaml"))


@pytest.mark.parametrize("path", shipped_recipes(), ids=lambda path: path.name)
def test_each_38b_recipe_fits_the_cluster_that_its_header_names(path):
    header = re.match(r"# Cluster: (\d+) nodes? x (\d+) GPUs x (\d+) GB\n", path.read_text())
    nodes, gpus, memory = (int(number) for number in header.groups())
    plan = make_plan(load_recipe(path), HF_CONFIG, cluster(nodes * gpus, memory))
    assert plan.fits, plan.memory.peak
    assert plan.layout.ranks == nodes * gpus


def test_the_align_stage_has_no_buffer_and_one_response_a_prompt():
    separate = "train.packing=first_fit_decreasing"
    recipe = load_recipe(RECIPE, [separate])
    plan = make_plan(recipe, HF_CONFIG, cluster(), stage=StageName.align)
    assert [rank.phase for rank in plan.memory.ranks] == ["update", "evaluate"]
    assert plan.memory.host_buffer == plan.time.decode == plan.time.log_probs == 0
    assert plan.time.update == pytest.approx(plan_of(separate).time.update / 8, rel=1e-6)


def test_training_the_language_model_on_four_nodes_is_planned_with_its_optimizer():
    plan = plan_of("train.parts=[adapter,language]", "parallel.pipeline=2", "train.recompute=full", gpus=32)
    assert plan.layout.data == 2
    assert plan.work.parts == (Part.adapter, Part.language)
    last = [rank for rank in plan.memory.ranks if rank.stage == 1][-1]
    share = 32.76e9 / 16
    assert last.gradients == pytest.approx(4 * share, rel=0.03)
    assert last.optimizer == pytest.approx(12 * share / 2, rel=0.03)


def test_the_limit_of_a_rank_is_its_memory_without_the_reserve():
    assert cluster(memory=80.0).limit == 76 * GIB


def test_the_mean_response_is_half_of_the_longest_unless_it_is_given():
    recipe = load_recipe(RECIPE)
    assert plan_of().mean_response == recipe.generation.max_response_tokens // 2
    assert make_plan(recipe, HF_CONFIG, cluster(), lengths=AssumedLengths(mean=5)).mean_response == 5
    longest = recipe.generation.max_response_tokens
    with pytest.raises(ValueError, match=f"--mean-response-tokens={longest + 1} is more than generation"):
        make_plan(recipe, HF_CONFIG, cluster(), lengths=AssumedLengths(mean=longest + 1))


def test_a_cluster_that_the_layout_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"--gpus=12 is not a multiple of parallel.tensor=8 x parallel.pipeline=1 = 8"):
        plan_of(gpus=12)
    with pytest.raises(ValueError, match=r"--reserve=4.0 leaves nothing of --gpu-memory=4.0"):
        plan_of(memory=4.0)


def test_notes_name_what_the_numbers_leave_out():
    assert not any("TransformerEngine" in note or "model.fp8" in note for note in plan_of().notes)
    notes = plan_of("model.layers=te", "model.fp8=tensorwise").notes
    assert any(note.startswith("model.layers=te:") for note in notes)
    assert any(note.startswith("model.fp8=tensorwise:") for note in notes)
    assert any("uniform groups are left out" in note for note in notes)


def test_tails_are_those_of_the_lengths_that_are_assumed_or_found_in_a_run(tmp_path):
    recipe = load_recipe(RECIPE, ["train.prompts_per_step=8"])
    given = make_plan(recipe, HF_CONFIG, cluster(), lengths=AssumedLengths(mean=1000, spread=0.5, segment_tokens=300))
    assert (given.lengths.spread, given.segment_tokens) == (0.5, 300)
    assert [(tail.replicas, tail.segment_tokens) for tail in given.tails] == [
        (replicas, tokens) for replicas in (1, 8, 64) for tokens in (0, 300)
    ]
    assert all(0 <= tail.lost < 1 for tail in given.tails)
    wide = make_plan(recipe, HF_CONFIG, cluster(), lengths=AssumedLengths(mean=1000, spread=1.2))
    assert wide.segment_tokens == 500
    moving = recipe.changed(generation=recipe.generation.changed(segment_tokens=700))
    assert make_plan(moving, HF_CONFIG, cluster()).segment_tokens == 700, "the recipe's own"
    assert wide.tails[0].seconds > given.tails[0].seconds
    (tmp_path / "metrics.jsonl").write_text('{"response_length/mean": 700.0, "response_length/max": 1500}')
    run = make_plan(recipe, HF_CONFIG, cluster(), lengths=AssumedLengths(metrics=tmp_path))
    assert (run.mean_response, run.lengths.cut) == (700, 8192)
    assert make_plan(recipe, HF_CONFIG, cluster(), stage=StageName.align).tails == ()
