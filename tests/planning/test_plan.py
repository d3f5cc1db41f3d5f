"""Whole plans: the shipped recipe on its cluster, limits that are limits, proposals, the command line."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_r1v2.checkpoint.hf.architecture import r1v2_architecture
from megatron_r1v2.config.load import load_recipe
from megatron_r1v2.config.schema import Fp8, Part, Recompute
from megatron_r1v2.planning.command import main, stage_of
from megatron_r1v2.planning.known_models import KNOWN_MODELS
from megatron_r1v2.planning.memory import GIB, Workload, kv_cache_bytes, plan_memory
from megatron_r1v2.planning.parameters import Layout
from megatron_r1v2.planning.plan import Cluster, make_plan
from megatron_r1v2.planning.roofline import HARDWARE, language_layer_flops, step_time, vision_flops
from megatron_r1v2.planning.search import propose_layout

RECIPE = Path(__file__).parents[2] / "examples" / "r1v2_38b" / "grpo.yaml"
HF_CONFIG = KNOWN_MODELS["r1v2-38b"]
ARCHITECTURE = r1v2_architecture(HF_CONFIG)


def cluster(gpus=8, memory=80.0):
    return Cluster(gpus, 8, memory, 4.0, HARDWARE["h100"])


NARROW = {**HF_CONFIG, "text_config": {**HF_CONFIG["text_config"], "intermediate_size": 4 * 1600}}


def plan_of(*overrides, gpus=8, memory=80.0, hf=HF_CONFIG):
    return make_plan(load_recipe(RECIPE, overrides), hf, cluster(gpus, memory))


def workload(*overrides):
    return Workload.from_recipe(load_recipe(RECIPE, overrides), ARCHITECTURE)


def test_the_38b_recipe_fits_the_node_that_it_names():
    plan = plan_of()
    assert plan.layout == Layout(tensor=8, pipeline=1, data=1, sequence=True)
    assert plan.fits
    generation, log_probs, training = plan.memory.ranks
    assert generation.kv_cache == pytest.approx(20 * GIB, rel=1e-3)
    assert log_probs.kv_cache == training.kv_cache == 0
    assert training.gradients == 2 * (training.gradients // 2)
    assert training.gradients < 50e6
    # 38.4 G weights of 2 bytes and 7 zero heads of 25 over 8 ranks; vision norms and such are whole on each.
    assert 9.0 < training.parameters / GIB < 9.2
    assert plan.memory.peak is training


def test_training_everything_on_one_node_does_not_fit():
    plan = plan_of("train.parts=[vision,adapter,language]")
    assert not plan.fits
    # 38.4 G parameters: 4 bytes of gradient and 12 of optimizer state each, over 8 ranks.
    training = plan.memory.ranks[-1]
    assert training.gradients + training.optimizer > 16 * 38.4e9 / 8
    assert plan.proposal.best is None
    assert "nothing fits" in plan.proposal.reason


@pytest.mark.parametrize("packing", ["none", "first_fit_decreasing"])
def test_each_limit_fits_and_a_little_more_does_not(packing):
    tokens = 0 if packing == "none" else 12288
    overrides = (f"train.packing={packing}", f"train.tokens_per_microbatch={tokens}", "train.micro_batch_size=1")
    limits = plan_of(*overrides).limits
    size = "train.micro_batch_size" if packing == "none" else "train.tokens_per_microbatch"
    # Rows longer than a packed microbatch make it longer, so they are bounded alike.
    for setting, step in ((size, 512 if "tokens" in size else 1), ("generation.max_response_tokens", 32)):
        largest = int(limits[setting])
        assert largest >= 1
        assert plan_of(*overrides, f"{setting}={largest}").fits
        assert not plan_of(*overrides, f"{setting}={largest + step}").fits
    requests = ("generation.max_requests=20000", "generation.max_tokens_per_step=20000")
    largest = limits["generation.kv_cache_gib"]
    assert plan_of(*overrides, f"generation.kv_cache_gib={largest}").fits
    assert largest > 30
    assert not plan_of(*overrides, *requests, f"generation.kv_cache_gib={largest + 0.25}").fits


def shipped_recipes():
    return sorted(RECIPE.parent.glob("*.yaml"))


@pytest.mark.parametrize("path", shipped_recipes(), ids=lambda path: path.name)
def test_each_38b_recipe_fits_the_cluster_that_its_header_names(path):
    header = re.match(r"# Cluster: (\d+) nodes? x (\d+) GPUs x (\d+) GB\n", path.read_text())
    nodes, gpus, memory = (int(number) for number in header.groups())
    stage = path.stem.split("_")[0]
    plan = make_plan(load_recipe(path), HF_CONFIG, cluster(nodes * gpus, memory), stage=stage)
    assert plan.fits, plan.memory.peak
    assert plan.layout.ranks == nodes * gpus


def test_the_align_stage_has_no_buffer_and_one_response_a_prompt():
    recipe = load_recipe(RECIPE)
    plan = make_plan(recipe, HF_CONFIG, cluster(), stage="align")
    assert [rank.phase for rank in plan.memory.ranks] == ["generation", "training"]
    assert plan.memory.host_buffer == plan.time.decode == plan.time.log_probs == 0
    assert plan.time.update == pytest.approx(plan_of().time.update / 8, rel=1e-6)


def test_the_mpo_stage_has_two_responses_a_prompt_that_stay_together():
    recipe = load_recipe(RECIPE)
    plan = make_plan(recipe, HF_CONFIG, cluster(), stage="mpo")
    assert [rank.phase for rank in plan.memory.ranks] == ["generation", "log-probs", "training"]
    assert plan.memory.host_buffer == plan.time.decode == plan.time.log_probs == 0
    assert plan.time.update == pytest.approx(plan_of().time.update / 4, rel=1e-6)
    work = Workload.from_recipe(recipe, ARCHITECTURE, stage="mpo")
    assert work.microbatch(8).tokens == 2 * 12288, "a packed row of 12,288 tokens would hold one of the two"
    assert work.microbatch(8).tiles == 3 * 13, "the two share their tiles"
    padded = replace(work, packed_tokens=0, micro_batch_size=1).microbatch(8)
    assert (padded.rows, padded.tiles) == (2, 13)


def test_the_cache_is_what_its_requests_can_use_and_holds_at_least_one_sequence():
    layout = Layout(tensor=8)
    token = 64 * 1 * 2 * 128 * 2  # layers, heads of a rank, keys and values, channels, bf16
    one = workload("generation.max_requests=1")
    assert kv_cache_bytes(ARCHITECTURE, layout, one, 0) == (48 + 1) * 256 * token  # 12,288 tokens and a spare block
    with pytest.raises(ValueError, match="kv_cache_gib=0.1 does not hold one sequence of 12288"):
        kv_cache_bytes(ARCHITECTURE, layout, workload("generation.kv_cache_gib=0.1"), 0)
    # With fewer heads than ranks each rank still has one.
    assert kv_cache_bytes(ARCHITECTURE, Layout(tensor=20), one, 0) == (48 + 1) * 256 * token


def test_image_features_stay_below_the_cache_limit_and_vanish_without_images():
    layout = Layout(tensor=8, data=2)
    first = plan_memory(ARCHITECTURE, layout, workload("generation.feature_cache_gib=1")).ranks
    embeddings = 32 * 13 * 256 * 5120 * 2
    assert [rank.image_features for rank in first] == [GIB + embeddings, GIB, GIB]
    text = replace(workload(), tiles=0)
    assert all(rank.image_features == 0 for rank in plan_memory(ARCHITECTURE, layout, text).ranks)
    later = plan_memory(ARCHITECTURE, Layout(tensor=4, pipeline=2), workload()).ranks[3:]
    assert all(rank.image_features == 0 and rank.gradients == 0 for rank in later)


def test_operations_are_two_a_weight_and_token():
    # facts of the model: 31.2 G weights in the decoder's layers, 5.53 G in the vision tower.
    assert language_layer_flops(ARCHITECTURE, 1, 0) == pytest.approx(2 * 31.2e9, rel=0.01)
    per_tile = vision_flops(ARCHITECTURE.vision)
    assert per_tile == pytest.approx(2 * 5.53e9 * 1025, rel=0.06)  # attention over 1,025 tokens on top
    # The zero heads cost something: 25 become 32.
    assert vision_flops(ARCHITECTURE.vision, tensor=8) > 1.05 * per_tile


def test_times_follow_what_is_asked():
    layout, h100 = Layout(tensor=8, sequence=True), HARDWARE["h100"]

    def seconds(*overrides, layout=layout, hardware=h100, mean=4096):
        return step_time(ARCHITECTURE, layout, workload(*overrides), hardware, mean_response=mean)

    base = seconds()
    assert base.total == base.vision + base.prefill + base.decode + base.log_probs + base.update
    # A frozen language model needs no weight gradients: 2 passes' worth instead of 3.
    assert seconds("train.parts=[adapter,language]").update > 1.2 * base.update
    assert seconds("train.recompute=full").update > 1.3 * base.update
    assert seconds(hardware=HARDWARE["h200"]).decode < base.decode
    assert seconds(hardware=HARDWARE["h200"]).update == base.update
    assert seconds(mean=8192).decode > 2 * base.decode
    half = seconds(layout=Layout(tensor=8, data=2, sequence=True))
    assert half.update == pytest.approx(base.update / 2)
    assert seconds("generation.feature_cache_gib=0").update > base.update
    assert seconds("algorithm.kl_coefficient=0.1").log_probs == 2 * base.log_probs


def test_decode_reads_the_weights_once_a_token():
    # One response: 32 G weights of 2 bytes over 8 ranks at the attained bandwidth, and 128 all-reduces.
    h100 = HARDWARE["h100"]
    alone = workload("train.prompts_per_step=1", "generation.responses_per_prompt=2", "generation.max_requests=1")
    time = step_time(ARCHITECTURE, Layout(tensor=8), alone, h100, mean_response=100)
    read = 32e9 * 2 / 8 / (h100.bandwidth * h100.bandwidth_efficiency) + 128 * h100.collective_seconds
    assert time.decode == pytest.approx(200 * read, rel=0.03)


def test_the_proposal_is_the_fastest_that_fits():
    work = workload()
    proposal = propose_layout(
        ARCHITECTURE, work, HARDWARE["h100"], gpus=16, gpus_per_node=8, limit=76 * GIB, mean_response=4096
    )
    best = proposal.best
    assert best.layout.ranks == 16
    assert best.layout.tensor <= 8
    assert best.memory.peak.total <= 76 * GIB
    chosen = replace(work, recompute=best.recompute, fp8=best.fp8, fp8_weights=best.fp8_weights)
    again = step_time(ARCHITECTURE, best.layout, chosen, HARDWARE["h100"], mean_response=4096)
    assert again == best.time
    for tensor, data in ((8, 2), (4, 4)):
        layout = Layout(tensor, 1, data, sequence=True)
        for recompute in (Recompute.none, Recompute.full):
            tried = replace(work, recompute=recompute)
            if plan_memory(ARCHITECTURE, layout, tried).peak.total <= 76 * GIB:
                time = step_time(ARCHITECTURE, layout, tried, HARDWARE["h100"], mean_response=4096)
                assert time.total >= best.time.total
    # What it proposes is accepted as a recipe, and fits.
    assert plan_of(*best.settings, gpus=16).fits


def test_fp8_is_faster_and_costs_memory_beside_bf16_weights():
    bf16 = plan_of()
    rounded = plan_of("model.layers=te", "model.fp8=tensorwise", "model.fp8_weights=true")
    beside = plan_of("model.layers=te", "model.fp8=tensorwise")
    assert rounded.time.decode < bf16.time.decode
    assert rounded.time.update < bf16.time.update
    assert rounded.time.vision == bf16.time.vision
    assert rounded.memory.peak.total == bf16.memory.peak.total
    # 62 of 64 layers, by hand: 5120 x (2 x 5120 + 2 x 1024 + 3 x 27648) weights over 8 ranks, in 8 bits and transposed.
    copies = 62 * 5120 * (2 * 5120 + 2 * 1024 + 3 * 27648) // 8 * 2
    assert beside.memory.peak.buffers - bf16.memory.peak.buffers == copies
    # A token of one response: 62/64 of the layers' weights are read in half the bytes.
    alone = workload("train.prompts_per_step=1", "generation.responses_per_prompt=2", "generation.max_requests=1")
    in_fp8 = replace(alone, fp8=Fp8.tensorwise)
    times = [step_time(ARCHITECTURE, Layout(), work, HARDWARE["h100"], mean_response=100) for work in (alone, in_fp8)]
    saved = (times[0].decode - times[1].decode) / 200 * HARDWARE["h100"].bandwidth * 0.6
    assert saved == pytest.approx(copies * 8 / 2, rel=1e-6)


def test_fp8_is_proposed_where_the_gpu_has_it_and_the_price_is_said():
    arguments = {"gpus": 8, "gpus_per_node": 8, "limit": 76 * GIB, "mean_response": 4096}
    hopper = propose_layout(ARCHITECTURE, workload(), HARDWARE["h100"], **arguments)
    assert hopper.best.fp8 is Fp8.tensorwise
    assert hopper.best.fp8_weights
    assert re.search(r"In bf16 the best is TP8 PP1 DP1, recompute none, \d+% slower", hopper.reason)
    ampere = propose_layout(ARCHITECTURE, workload(), HARDWARE["a100"], **arguments)
    assert ampere.best.fp8 is Fp8.none
    with pytest.raises(ValueError, match="model.fp8=tensorwise, but A100 SXM 80 GB has no FP8 products"):
        step_time(ARCHITECTURE, Layout(8), replace(workload(), fp8=Fp8.tensorwise), HARDWARE["a100"], mean_response=9)
    # 1,600 feed-forward channels a rank are a multiple of 16 but not of 128.
    with pytest.raises(ValueError, match="blockwise needs a multiple of 128"):
        plan_of("model.layers=te", "model.fp8=blockwise", "parallel.tensor=4", "parallel.sequence=true", hf=NARROW)


def test_less_memory_makes_the_proposal_split_or_recompute_more():
    def best(gib):
        return propose_layout(
            ARCHITECTURE, workload(), HARDWARE["h100"], gpus=8, gpus_per_node=8, limit=gib * GIB, mean_response=4096
        ).best

    assert best(40).recompute is Recompute.full
    assert best(40).time.total > best(76).time.total


def test_training_the_language_model_on_four_nodes_is_planned_with_its_optimizer():
    plan = plan_of("train.parts=[adapter,language]", "parallel.pipeline=2", "train.recompute=full", gpus=32)
    assert plan.layout.data == 2
    assert plan.work.parts == (Part.adapter, Part.language)
    last = [rank for rank in plan.memory.ranks if rank.stage == 1][-1]
    share = 32.76e9 / 16
    assert last.gradients == pytest.approx(4 * share, rel=0.03)
    assert last.optimizer == pytest.approx(12 * share / 2, rel=0.03)


def test_the_command_prints_tables_and_json(capsys):
    arguments = [str(RECIPE), "--gpus", "8", "--gpu-memory", "80", "--hf-config", "r1v2-38b"]
    main(arguments)
    text = capsys.readouterr().out
    assert "It fits" in text
    for name in ("params", "grads", "optim.", "activ.", "KV", "images", "buffers", "total", "generation", "log-probs"):
        assert f"{name} " in text.replace("\n", " \n"), "cut off at eighty columns"
    assert "SSB up to" in text
    assert "38,392,158,592" in text
    assert "Best layout" in text
    main([*arguments, "--json"])
    values = json.loads(capsys.readouterr().out)
    assert values["fits"] is True
    assert [rank["phase"] for rank in values["ranks"]] == ["generation", "log-probs", "training"]
    for rank in values["ranks"]:
        names = ["parameters", "gradients", "optimizer", "activations", "kv_cache", "image_features", "buffers"]
        assert rank["total"] == sum(rank[name] for name in names)


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--gpus", "12", "--hf-config", "r1v2-38b"], "--gpus=12 is not a multiple of parallel.tensor=8", 2),
        (["--gpus", "8"], "there is no config.json at model.hf_path='checkpoints/r1v2-38b-hf'", 2),
        (["--gpus", "8", "--hf-config", "nowhere"], "there is no config.json at --hf-config='nowhere'", 2),
        (["parallel.tensor=3", "--gpus", "3", "--hf-config", "r1v2-38b"], "parallel.tensor=3 does not divide", 2),
        (["--gpus", "8", "--hf-config", "r1v2-38b", "--mean-response-tokens", "9000"], "is more than generation", 2),
        (["--gpus", "8", "--hf-config", "r1v2-38b", "--gpu-memory", "3"], "leaves nothing of --gpu-memory=3", 2),
        (["--gpus", "8", "--hf-config", "r1v2-38b", "--gpu-memory", "40"], "", 1),
    ],
)
def test_the_command_says_what_is_wrong(capsys, arguments, message, code):
    with pytest.raises(SystemExit) as stopped:
        main([str(RECIPE), *arguments])
    assert stopped.value.code == code
    assert message in capsys.readouterr().err


def test_overrides_may_stand_anywhere(capsys):
    main([str(RECIPE), "--gpus", "16", "generation.kv_cache_gib=30", "--hf-config", "r1v2-38b", "--json"])
    values = json.loads(capsys.readouterr().out)
    assert values["layout"]["data"] == 2
    assert values["ranks"][0]["kv_cache"] == pytest.approx(30 * GIB, rel=1e-3)


def test_a_config_file_or_its_folder_is_accepted(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
    for path in (tmp_path, tmp_path / "config.json"):
        main([str(RECIPE), "--gpus", "8", "--hf-config", str(path), "--json"])
        assert json.loads(capsys.readouterr().out)["parameters"]["language"] == 32_763_876_352
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SystemExit):
        main([str(RECIPE), "--gpus", "8", "--hf-config", str(tmp_path / "config.json")])
    assert "is not valid JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("align.yaml", "align"),
        ("a/mpo.yaml", "mpo"),
        ("grpo_64k.yaml", "grpo"),
        ("mine.yaml", "grpo"),
        ("mpo-2.yaml", "mpo"),
    ],
)
def test_the_stage_is_what_the_name_of_the_recipe_says(name, stage):
    assert stage_of(name) == stage


@pytest.mark.parametrize("name", ["align", "mpo"])
def test_recipes_are_planned_as_their_stage_without_being_told(name, capsys):
    main([f"examples/r1v2_38b/{name}.yaml", "--gpus", "8", "--hf-config", "r1v2-38b", "--json"])
    assert any(f"planned as the {name} stage" in note for note in json.loads(capsys.readouterr().out)["notes"])
