"""`r1v2 rehearse`: its print-out, exit codes and files."""

import json
import subprocess
import sys

import pytest

from megatron_r1v2.data.samples import ShardSample
from megatron_r1v2.data.shards import write_shards
from megatron_r1v2.planning.known_models import KNOWN_MODELS
from megatron_r1v2.planning.parameters import Layout
from megatron_r1v2.rehearsal.command import TESTED_TORCH, main
from megatron_r1v2.rehearsal.preparation import Step
from megatron_r1v2.rehearsal.rank import RankResult
from megatron_r1v2.rehearsal.run import Rehearsal
from tests.rehearsal.test_own_rows import png, sample
from tests.rehearsal.tiny_rehearsal import RECIPES, ROOT, TINY, tiny_model


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "12", "--hf-config", "r1v2-38b"], "--gpus=12 is not a multiple of parallel.tensor=8"),
        (["--gpus", "8", "--hf-config", "nowhere"], "there is no config.json at --hf-config='nowhere'"),
        (["--gpus", "8", "--hf-config", "r1v2-38b", "--gpu-memory", "3"], "leaves nothing of --gpu-memory=3"),
        (["--gpus", "8", "--hf-config", "r1v2-38b", "--gpus-per-node", "0"], "--gpus-per-node=0 is less than 1"),
    ],
)
def test_bad_input_is_that_of_plan(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main([str(RECIPES / "grpo.yaml"), *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("place", ["missing/a.svg", "."])
def test_a_chart_that_cannot_be_written_is_an_error_before_anything_runs(tmp_path, capsys, place):
    with pytest.raises(SystemExit) as stopped:
        main([str(RECIPES / "grpo.yaml"), "--gpus", "8", "--hf-config", "r1v2-38b", "--svg", str(tmp_path / place)])
    assert stopped.value.code == 2
    assert f"--svg='{tmp_path}" in capsys.readouterr().err


def test_an_override_in_the_place_of_the_recipe_is_an_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train.steps=3", "--gpus", "8", "parallel.tensor=8", "--hf-config", "r1v2-38b"])
    assert stopped.value.code == 2
    assert "recipe 'train.steps=3' is an override; give the path of a YAML recipe before it" in capsys.readouterr().err


def test_data_that_is_not_there_is_an_error_before_anything_runs(tmp_path, capsys):
    model = tiny_model(tmp_path / "model")
    layout = ["parallel.tensor=1", "parallel.sequence=false", f"model.hf_path={model}"]
    with pytest.raises(SystemExit) as stopped:
        main([str(RECIPES / "grpo.yaml"), *TINY, *layout, "data.train=nowhere", "--gpus", "1", "--data"])
    assert stopped.value.code == 2
    assert "nowhere" in capsys.readouterr().err


def test_rows_without_a_tokenizer_are_refused_before_the_slow_imports(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(KNOWN_MODELS["r1v2-38b"]))
    for config, missing in (("r1v2-38b", "there is no folder of the model"), (str(tmp_path), f"{tmp_path} has none")):
        arguments = [str(RECIPES / "grpo.yaml"), "--gpus", "8", "--data", "--hf-config", config]
        program = "import sys; sys.modules |= dict.fromkeys(('torch', 'transformers', 'megatron'))\n"
        program += f"from {main.__module__} import main; main({arguments})"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert f"--data measures rows with the model's own tokenizer, but {missing}" in done.stderr


def test_rows_that_are_too_long_are_told_before_anything_is_rehearsed(tmp_path, monkeypatch, capsys):
    model = tiny_model(tmp_path / "model")
    write_shards([sample("long", 60), *(sample(f"huge-{number}", 400) for number in range(7))], tmp_path / "data")
    monkeypatch.setattr("megatron_r1v2.rehearsal.run.rehearse_ranks", lambda *_: pytest.fail("a rank was rehearsed"))
    data = [f"data.train={tmp_path / 'data'}", "data.validation=", "evaluation.every_steps=0"]
    layout = ["parallel.tensor=1", "parallel.sequence=false", f"model.hf_path={model}"]
    capsys.readouterr()  # of making the model
    with pytest.raises(SystemExit) as stopped:
        main([str(RECIPES / "align.yaml"), *TINY, *layout, *data, "--gpus", "1", "--data", "--json"])
    assert stopped.value.code == 1
    first, count, *rows, rest = capsys.readouterr().err.splitlines()
    assert first == "Its data would end the run, so nothing was rehearsed."
    assert count == f"{tmp_path / 'data'}: 7 of 8 rows are too long and would end the run"
    assert [row.partition(": the prompt has ")[0] for row in rows] == [
        f"  shard-000000.tar: sample 'huge-{number}'" for number in range(5)
    ]
    assert all("data.max_prompt_tokens is 256; raise it" in row for row in rows)
    assert rest == "  ... and 2 more"


@pytest.mark.parametrize(
    ("version", "told"), [(TESTED_TORCH, False), (f"{TESTED_TORCH}+cpu", False), ("2.10.0a0+nv25.12", True)]
)
def test_a_torch_that_rehearsals_are_not_tested_with_is_told(monkeypatch, capsys, version, told):
    assert f"\ntorch=={TESTED_TORCH}\n" in (ROOT / "requirements.lock").read_text()
    monkeypatch.setattr("importlib.metadata.version", lambda _: version)
    with pytest.raises(SystemExit):
        main(["train.steps=3", "--gpus", "8"])
    assert (f"with torch {TESTED_TORCH}, this is 2.10.0a0: " in capsys.readouterr().err) is told


@pytest.mark.parametrize("name", ["model", "model/config.json"])
def test_the_folder_of_a_configuration_is_looked_at(tmp_path, monkeypatch, name):
    """Its weights, its tokenizer."""
    model, asked = tiny_model(tmp_path / "model"), {}

    def rehearse(*_, **kwargs):
        asked.update(kwargs)
        raise ValueError("enough")

    monkeypatch.setattr("megatron_r1v2.rehearsal.run.rehearse", rehearse)
    layout = ["parallel.tensor=1", "parallel.sequence=false"]
    with pytest.raises(SystemExit):
        main([str(RECIPES / "grpo.yaml"), *TINY, *layout, "--gpus", "1", "--hf-config", str(tmp_path / name)])
    assert asked["hf_path"] == model


@pytest.mark.parametrize(
    ("options", "all_ranks", "own_data"), [([], False, False), (["--all-ranks", "--data"], True, True)]
)
def test_options_are_those_of_the_rehearsal(monkeypatch, tmp_path, options, all_ranks, own_data):
    asked = {}
    (tmp_path / "config.json").write_text(json.dumps(KNOWN_MODELS["r1v2-38b"]))
    (tmp_path / "tokenizer.json").touch()
    folder, config = (tmp_path, str(tmp_path)) if own_data else (None, "r1v2-38b")

    def rehearse(recipe, _, plan, **kwargs):
        asked.update(kwargs, seed=recipe.run.seed, layout=plan.layout)
        raise ValueError("enough")

    monkeypatch.setattr("megatron_r1v2.rehearsal.run.rehearse", rehearse)
    with pytest.raises(SystemExit) as stopped:
        main([str(RECIPES / "grpo.yaml"), "--gpus", "16", *options, "run.seed=5", "--hf-config", config])
    assert stopped.value.code == 2
    layout = Layout(8, 1, 2, 0, True)
    assert asked == {"hf_path": folder, "all_ranks": all_ranks, "own_data": own_data, "seed": 5, "layout": layout}


def test_a_rehearsal_that_saw_no_tensor_has_no_chart(monkeypatch, tmp_path, capsys):
    """Its rank has died at once, and that is what it prints."""

    def rehearse(recipe, _, plan, **kwargs):
        dead = RankResult(0, "rank 0", error="the process ended with status 143", error_phase="before its start")
        return Rehearsal(plan, (dead,), (), Step(2, 14, 1, 64, 2))

    monkeypatch.setattr("megatron_r1v2.rehearsal.run.rehearse", rehearse)
    with pytest.raises(SystemExit) as stopped:
        main([str(RECIPES / "grpo.yaml"), "--gpus", "8", "--hf-config", "r1v2-38b", "--svg", str(tmp_path / "a.svg")])
    assert stopped.value.code == 1
    printed = capsys.readouterr()
    assert "the process ended with status 143" in printed.out
    assert f"{tmp_path / 'a.svg'} is not written: the rehearsal has seen no tensor" in printed.err
    assert not (tmp_path / "a.svg").exists()


@pytest.mark.slow
def test_own_data_is_measured_and_its_longest_rows_are_rehearsed(tmp_path, capsys):
    model = tiny_model(tmp_path / "model")
    rows = [
        ShardSample(
            key=key,
            messages=({"role": "user", "content": "<image>\n" + "a" * length},),
            answer="8",
            answer_type="numeric",
            images={"0.png": png()},
            response="b" * 40,
        )
        for key, length in (("short", 5), ("long", 60), ("too-long", 400))
    ]
    write_shards(rows, tmp_path / "data")
    data = [f"data.train={tmp_path / 'data'}", "data.validation=", "evaluation.every_steps=0", "data.too_long=skip"]
    data += ["train.prompts_per_step=2"]  # as many as there are
    layout = ["parallel.tensor=1", "parallel.sequence=false", f"model.hf_path={model}"]
    main([str(RECIPES / "align.yaml"), *TINY, *layout, *data, "--gpus", "1", "--data", "--json"])
    values = json.loads(capsys.readouterr().out)
    assert values["passed"] is True
    longest, left_out = values["data"]
    assert "3 rows; the longest prompt has" in longest
    assert "shard-000000.tar: long" in longest
    assert "1 rows are too long and are left out: shard-000000.tar: sample 'too-long'" in left_out
    assert [phase["name"] for phase in values["ranks"][0]["phases"]].count("update") == 2


@pytest.mark.slow
def test_a_run_that_does_not_fit_exits_1_and_is_drawn(tmp_path, capsys):
    model = tiny_model(tmp_path / "model")
    layout = ["parallel.tensor=1", "parallel.sequence=false", f"model.hf_path={model}"]
    arguments = [str(RECIPES / "grpo.yaml"), *TINY, *layout, "--gpus", "1", "--json", "--svg", str(tmp_path / "a.svg")]
    # 3 MiB for the tensors: weights and optimizer fit, the cache does not.
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--gpu-memory", "4.003"])
    assert stopped.value.code == 1
    values = json.loads(capsys.readouterr().out)
    assert values["passed"] is False
    (rank,) = values["ranks"]
    full = [phase["name"] for phase in rank["phases"] if phase["peak"] > values["limit_bytes"]]
    assert "generate" in full
    assert "load" not in full
    assert (tmp_path / "a.svg").read_text().startswith("<svg")
