"""`r1v2 plan`: what it prints, its exit codes, and the files it accepts."""

import json

import pytest

from megatron_r1v2.planning.command import main
from megatron_r1v2.planning.memory import GIB
from tests.planning.plans import HF_CONFIG, RECIPE

CLUSTER = ("--gpus", "8", "--gpu-memory", "192", "--hf-config", "r1v2-38b", "--json")
LAYOUT = ("parallel.tensor=8", "parallel.sequence=true")


def test_the_command_prints_tables_and_json(capsys):
    arguments = [str(RECIPE), "--gpus", "8", "--gpu-memory", "80", "--hf-config", "r1v2-38b"]
    main(arguments)
    text = capsys.readouterr().out
    assert "It fits" in text
    for name in ("params", "grads", "optim.", "activ.", "KV", "images", "buffers", "total", "generate", "evaluate"):
        assert f"{name} " in text.replace("\n", " \n"), "cut off at eighty columns"
    assert "SSB up to" in text
    assert "38,392,158,592" in text
    assert "Best layout" in text
    main([*arguments, "--json"])
    values = json.loads(capsys.readouterr().out)
    assert values["fits"] is True
    assert [rank["phase"] for rank in values["ranks"]] == ["gate", "generate", "update", "evaluate"]
    for rank in values["ranks"]:
        names = ["parameters", "gradients", "optimizer", "activations", "kv_cache", "image_features", "buffers"]
        assert rank["total"] == sum(rank[name] for name in names)


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--gpus", "12", "--hf-config", "r1v2-38b"], "--gpus=12 is not a multiple of parallel.tensor=8", 2),
        (["--gpus", "8"], "there is no config.json at model.hf_path='checkpoints/r1v2-38b-hf'", 2),
        (["--gpus", "8", "--hf-config", "nowhere"], "there is no config.json at --hf-config='nowhere'", 2),
        (["--gpus", "8", "--hf-config", "Org/Model"], "`hf download Org/Model --local-dir Model`", 2),
        (["parallel.tensor=3", "--gpus", "3", "--hf-config", "r1v2-38b"], "parallel.tensor=3 does not divide", 2),
        (["--gpus", "8", "--hf-config", "r1v2-38b", "--mean-response-tokens", "9000"], "is more than generation", 2),
        (["--gpus", "8", "--hf-config", "r1v2-38b", "--gpu-memory", "3"], "leaves nothing of --gpu-memory=3", 2),
        (["--gpus", "8", "--hf-config", "r1v2-38b", "--gpus-per-node", "0"], "--gpus-per-node=0 is less than 1", 2),
        (["--gpus", "8", "--hf-config", "r1v2-38b", "--reserve", "-1"], "--reserve=-1 is negative", 2),
        (["--gpus", "8", "--hf-config", "r1v2-38b", "--matmul-efficiency", "45"], "--matmul-efficiency=45 is not", 2),
        (["--gpus", "8", "--hf-config", "r1v2-38b", "--bandwidth-efficiency", "-1"], "accepted: from 0 to 1", 2),
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
    assert values["ranks"][1]["kv_cache"] == pytest.approx(30 * GIB, rel=1e-3)


def test_a_config_file_or_its_folder_is_accepted(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
    for path in (tmp_path, tmp_path / "config.json"):
        main([str(RECIPE), "--gpus", "8", "--hf-config", str(path), "--json"])
        assert json.loads(capsys.readouterr().out)["parameters"]["language"] == 32_763_876_352
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SystemExit):
        main([str(RECIPE), "--gpus", "8", "--hf-config", str(tmp_path / "config.json")])
    assert "is not valid JSON" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["align", "mpo"])
def test_recipes_are_planned_as_their_stage_without_being_told(name, capsys):
    main([f"examples/r1v2_38b/{name}.yaml", "--gpus", "8", "--hf-config", "r1v2-38b", "--json"])
    assert any(f"planned as the {name} stage" in note for note in json.loads(capsys.readouterr().out)["notes"])


def test_the_gpu_and_its_attained_parts_can_be_named(capsys):
    arguments = [str(RECIPE), "--gpus", "8", "--hf-config", "r1v2-38b", "--json", "--gpu", "h200"]
    main([*arguments, "--matmul-efficiency", "0.9", "--bandwidth-efficiency", "0.3", "--reserve", "10"])
    values = json.loads(capsys.readouterr().out)
    hardware = values["hardware"]
    assert hardware["name"].startswith("H200")
    assert (hardware["matmul_efficiency"], hardware["bandwidth_efficiency"]) == (0.9, 0.3)
    assert values["limit_bytes"] == int((139.8 - 10) * GIB)


def planned(capsys, *arguments):
    main([*arguments, *CLUSTER])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("stage", "phases"),
    [
        ("align", ["update"]),
        ("pairs", ["generate"]),
        ("mpo", ["reference", "update"]),
        ("reward_model", ["update"]),
        ("grpo", ["gate", "generate", "update"]),
    ],
)
def test_each_stage_has_its_phases_without_a_recipe(capsys, stage, phases):
    plan = planned(capsys, *LAYOUT, "--stage", stage)
    assert [rank["phase"] for rank in plan["ranks"]] == phases
    assert f"planned as the {stage} stage" in plan["notes"][0]
    assert (plan["seconds"]["decode"] > 0) == (stage in ("pairs", "grpo"))
    assert (plan["seconds"]["update"] > 0) == (stage != "pairs")
    assert (plan["host"]["buffer"] > 0) == (stage == "grpo")


def test_without_a_stage_it_is_grpo(capsys):
    assert "planned as the grpo stage" in planned(capsys, *LAYOUT)["notes"][0]


def test_the_recipe_of_a_stage_is_planned_as_that_or_as_another(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("run: {stage: reward_model}\nparallel: {tensor: 8, sequence: true}\n")
    assert "planned as the reward_model stage" in planned(capsys, str(path))["notes"][0]
    assert "planned as the grpo stage" in planned(capsys, str(path), "--stage", "grpo")["notes"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere.yaml",), "error: recipe 'nowhere.yaml' is not a file"),
        (("train.stepz=1",), "did you mean 'train.steps'?"),
        (("--stage", "serve"), "invalid choice: 'serve'"),
    ],
)
def test_bad_input_ends_with_advice(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        main([*arguments, *CLUSTER])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
