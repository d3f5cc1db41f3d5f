import io
import json
import time

import pytest
from rich.console import Console

from examples.stages import Stage, StageError, StageRunner


@pytest.fixture
def runner(tmp_path):
    return StageRunner(tmp_path / "run", threads=2, console=Console(file=io.StringIO(), width=200))


def json_stage(tmp_path, name, content="{}"):
    """Return a stage that pretty-prints a file, and fails where it is not JSON."""
    (tmp_path / f"{name}.json").write_text(content)
    return Stage(name, f"print {name}", ("json.tool", str(tmp_path / f"{name}.json")))


def test_a_stage_leaves_its_log_and_its_record(tmp_path, runner):
    runner.run(json_stage(tmp_path, "one", '{"answer": 8}'))
    assert '"answer": 8' in (tmp_path / "run" / "logs" / "one.log").read_text()
    record = json.loads((tmp_path / "run" / "stages" / "one.json").read_text())
    assert record["command"][0] == "json.tool"
    assert 0 < runner.seconds["one"] < 30


def test_a_failing_stage_is_named_with_its_command_and_the_end_of_its_log(tmp_path, runner):
    stage = json_stage(tmp_path, "broken", "{'not': json}")
    with pytest.raises(
        StageError, match=r"(?s)stage broken failed with exit code 1 .*Expecting property name.*json\.tool"
    ):
        runner.run(stage)
    assert not (tmp_path / "run" / "stages" / "broken.json").exists()


def test_a_failure_ends_the_stages_beside_it_at_once(tmp_path, runner):
    endless = Stage("endless", "serve forever", ("http.server", "--bind", "127.0.0.1", "0"))
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
        runner.run(Stage("one", "", ("json.tool", "--sort-keys", str(tmp_path / "one.json"))))


def test_stages_side_by_side_share_the_threads(tmp_path, runner):
    command = ("timeit", "-n", "1", "-r", "1", "-s", "import os", "print('threads', os.environ['OMP_NUM_THREADS'])")
    runner.run(Stage("left", "", command), Stage("right", "", command))
    runner.run(Stage("alone", "", command))
    logs = {name: (tmp_path / "run" / "logs" / f"{name}.log").read_text() for name in ("left", "right", "alone")}
    assert [logs[name].split("\n")[0] for name in logs] == ["threads 1", "threads 1", "threads 2"]


def test_chains_keep_their_order_and_no_more_run_at_once_than_asked(tmp_path, runner):
    log = tmp_path / "order"

    def writing(name: str) -> Stage:
        statement = f"open({str(log)!r}, 'a').write({name + ' '!r})"
        return Stage(name, "", ("timeit", "-n", "1", "-r", "1", statement))

    runner.run_chains([[writing("a1"), writing("a2")], [writing("b1"), writing("b2")]], at_once=1)
    assert log.read_text().split() == ["a1", "a2", "b1", "b2"]
    log.unlink()
    runner.run_chains([[writing("a1"), writing("a2"), writing("a3")]], at_once=2)
    assert log.read_text().split() == ["a3"], "what is done is not done again"


def test_a_stage_of_several_processes_is_started_by_torchrun():
    one = Stage("grpo", "", ("megatron_r1v2", "grpo", "recipe.yaml"))
    two = Stage("grpo", "", one.command, processes=2)
    assert one.arguments == one.command
    assert two.arguments[0] == "torch.distributed.run"
    assert two.arguments[-4:] == ("-m", "megatron_r1v2", "grpo", "recipe.yaml")
    assert two.arguments[two.arguments.index("--nproc-per-node") + 1] == "2"
