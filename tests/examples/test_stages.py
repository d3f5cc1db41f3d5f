import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from examples import stages
from examples.stages import Stage, StageError, StageRunner, read_steps


@pytest.fixture
def runner(tmp_path):
    return StageRunner(tmp_path / "run", threads=2, console=Console(file=io.StringIO(), width=200))


def json_stage(tmp_path, name, content="{}"):
    """Return a stage that pretty-prints a file, and fails where it is not JSON."""
    (tmp_path / f"{name}.json").write_text(content)
    return Stage(name, ("python", "-m", "json.tool", str(tmp_path / f"{name}.json")))


def test_a_stage_leaves_its_log_and_its_record(tmp_path, runner):
    runner.run(json_stage(tmp_path, "one", '{"answer": 8}'))
    assert '"answer": 8' in (tmp_path / "run" / "logs" / "one.log").read_text()
    record = json.loads((tmp_path / "run" / "stages" / "one.json").read_text())
    assert record["command"][:3] == ["python", "-m", "json.tool"]
    assert 0 < runner.seconds["one"] < 30


def test_a_failing_stage_is_named_with_its_command_and_the_end_of_its_log(tmp_path, runner):
    stage = json_stage(tmp_path, "broken", "{'not': json}")
    with pytest.raises(
        StageError, match=r"(?s)stage broken failed with exit code 1 .*Expecting property name.*json\.tool"
    ):
        runner.run(stage)
    assert not (tmp_path / "run" / "stages" / "broken.json").exists()


def test_a_program_that_is_not_on_path_is_named_with_what_to_do(tmp_path, runner):
    with pytest.raises(StageError, match=r"stage one needs 'r1v3', which is not on PATH; .* make install"):
        runner.run(Stage("one", ("r1v3", "align", "recipe.yaml")))
    assert not (tmp_path / "run" / "stages" / "one.json").exists()


def test_a_failure_ends_the_stages_beside_it_at_once(tmp_path, runner):
    endless = Stage("endless", ("python", "-m", "http.server", "--bind", "127.0.0.1", "0"))
    start = time.perf_counter()
    with pytest.raises(StageError, match="stage broken"):
        runner.run(endless, json_stage(tmp_path, "broken", "?"))
    assert time.perf_counter() - start < 20
    assert "endless" not in runner.seconds


def test_a_finished_stage_is_not_run_again_and_says_so(tmp_path):
    stage = json_stage(tmp_path, "one")
    for attempt in range(2):
        output = io.StringIO()
        runner = StageRunner(tmp_path / "run", threads=1, console=Console(file=output, width=200))
        if attempt:
            (tmp_path / "one.json").unlink()
        runner.run(stage)
    assert "one" in output.getvalue()
    assert "done before" in output.getvalue()


def test_another_command_for_a_finished_stage_is_an_error(tmp_path, runner):
    runner.run(json_stage(tmp_path, "one"))
    with pytest.raises(StageError, match="was done with another command"):
        runner.run(Stage("one", ("python", "-m", "json.tool", "--sort-keys", str(tmp_path / "one.json"))))


def test_a_recipe_that_is_gone_is_named_before_and_after_its_stage(tmp_path, runner):
    recipe = tmp_path / "recipe.yaml"
    stage = Stage("one", ("cat", str(recipe)))
    message = r"stage one is made by the recipe .*recipe\.yaml, which does not exist; put the file back"
    with pytest.raises(StageError, match=message):
        runner.run(stage)
    recipe.write_text("steps: 1")
    runner.run(stage)
    recipe.unlink()
    with pytest.raises(StageError, match=message):
        runner.run(stage)
    recipe.write_text("steps: 1")
    runner.run(stage)


def test_a_recipe_that_is_edited_or_removed_while_its_stage_runs_is_the_one_it_began_with(tmp_path, runner):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: 1")
    stage = Stage("one", ("bash", "-c", 'rm "$0"', str(recipe)))
    runner.run(stage)
    recipe.write_text("steps: 1")
    runner.run(stage)
    recipe.write_text("steps: 2")
    with pytest.raises(StageError, match="another version of its recipe"):
        runner.run(stage)


def test_stages_side_by_side_share_the_threads(tmp_path, runner):
    command = ("bash", "-c", 'echo "threads $OMP_NUM_THREADS"')
    runner.run(Stage("left", command), Stage("right", command))
    runner.run(Stage("alone", command))
    logs = {name: (tmp_path / "run" / "logs" / f"{name}.log").read_text() for name in ("left", "right", "alone")}
    assert [logs[name].split("\n")[0] for name in logs] == ["threads 1", "threads 1", "threads 2"]


def test_chains_keep_their_order_and_no_more_run_at_once_than_asked(tmp_path, runner):
    log = tmp_path / "order"

    def writing(name: str) -> Stage:
        return Stage(name, ("bash", "-c", f"printf '{name} ' >> {log}"))

    runner.run_chains([[writing("a1"), writing("a2")], [writing("b1"), writing("b2")]], at_once=1)
    assert log.read_text().split() == ["a1", "a2", "b1", "b2"]
    log.unlink()
    runner.run_chains([[writing("a1"), writing("a2"), writing("a3")]], at_once=2)
    assert log.read_text().split() == ["a3"], "what is done is not done again"


SCRIPT = """\
set -euo pipefail
OUT={out}
source {steps}
beside left bash -c 'until grep -qs right {out}/order; do sleep 0.05; done; echo left >> {out}/order'
beside right bash -c 'echo "right $1" >> {out}/order' right "$1"
join
step last bash -c 'echo last >> {out}/order'
"""


@pytest.fixture
def script(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    path = tmp_path / "run.sh"
    path.write_text(SCRIPT.format(out=out, steps=Path(stages.__file__).parent / "steps.sh"))
    return path


def run_script(script, *arguments, environment=()):
    """Run a script with the `python` of this environment."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["bash", str(script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": path, **dict(environment)},
    )


def test_a_script_runs_its_steps_in_order_and_those_beside_each_other_together(script):
    done = run_script(script, "given")
    assert done.returncode == 0, done.stderr
    assert (script.parent / "out" / "order").read_text().splitlines() == ["right given", "left", "last"]
    assert "last               $ bash -c" in done.stdout, "each command is shown"
    again = run_script(script, "given")
    assert again.stdout.count("done before") == 3


def test_a_step_that_fails_ends_the_script_and_the_steps_beside_it(script):
    text = (
        script.read_text()
        .replace("until grep", "sleep 30; until grep")
        .replace("'echo \"right", "'exit 3; echo \"right")
    )
    script.write_text(text)
    start = time.perf_counter()
    done = run_script(script, "given")
    assert done.returncode == 1
    assert "stage right failed with exit code 3" in done.stdout
    assert time.perf_counter() - start < 25
    assert not (script.parent / "out" / "order").exists()


def test_a_script_outside_of_the_environment_says_how_to_enter_it(script, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("#!/bin/sh\necho 'No module named rich' >&2; exit 1\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    done = run_script(script, "given", environment={"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"})
    assert done.returncode == 1
    assert done.stderr.strip().endswith("make install && source .venv/bin/activate")
    assert not (script.parent / "out" / "order").exists()


def test_steps_of_a_script_are_read_without_running_them(script):
    text = script.read_text().replace('"$1"', "'two words'")
    script.write_text(text)
    steps = read_steps(script)
    assert [step.name for step in steps] == ["left", "right", "last"]
    assert steps[1].command[-2:] == ("right", "two words")
    assert str(steps[1]).endswith("right 'two words'")
    assert not list((script.parent / "out").iterdir())
