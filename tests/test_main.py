"""The one command: its list, its errors, how fast it answers, and a reader that leaves early."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from megatron_r1v2.__main__ import COMMANDS, main
from megatron_r1v2.config.choices import StageName
from megatron_r1v2.config.recipes import STAGES
from megatron_r1v2.stages.model_fit import all_mistakes

COMMAND = [sys.executable, "-m", "megatron_r1v2"]
NAMES = (
    "align", "pairs", "mpo", "reward-model", "grpo", "evaluate", "filter-prompts", "prepare", "benchmarks", "plan",
    "rehearse", "report", "serve", "serve-reward-model",
)  # fmt: skip


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_without_a_command_it_lists_them_with_a_line_each(capsys, arguments):
    assert main(arguments) == 0
    listed = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert tuple(words[0] for words in listed) == NAMES
    assert all(len(words) > 3 for words in listed)


def test_help_with_words_finds_commands_and_settings(capsys):
    assert main(["--help", "pass@1", "tau:"]) == 0
    printed = capsys.readouterr().out
    entries = [line.split()[0] for line in printed.splitlines() if line.startswith("  ") and not line.startswith("   ")]
    assert {"evaluate", "preference.min_margin", "evaluation.stop_at_pass_at_1"} <= set(entries)
    assert not {"grpo", "train.steps"} & set(entries)
    assert main(["--help", "nonsense"]) == 0
    assert capsys.readouterr().out == "no setting of any command has 'nonsense' in its name or its meaning\n"


@pytest.mark.parametrize(
    ("name", "word", "found"),
    [
        ("plan", "kv_cache", "generation.kv_cache_gib"),
        ("plan", "nodes", None),
        ("plan", "gpus-per", "--gpus-per-node"),
        ("serve", "queue", "--max-queue"),
        ("serve", "max_tiles", "data.max_tiles"),
        ("serve", "max_margin", None),
        ("evaluate", "judge", "evaluation.judge_url"),
        ("evaluate", "every_steps", None),
        ("prepare", "images", "--images"),
        ("report", "page", "--output"),
        ("benchmarks", "only", "--only"),
        ("filter-prompts", "telling", "--most"),
        ("serve-reward-model", "weights", "--precision"),
    ],
)
def test_help_with_a_word_shows_what_contains_it(capsys, name, word, found):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help", "zzz", word])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "usage" not in printed
    assert found in printed if found else printed.startswith("no setting of ")


def test_an_unknown_command_is_named(capsys):
    assert main(["grpoo"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "error: there is no command 'grpoo'" in printed.err
    assert "reward-model" in printed.err


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_itself(capsys, name):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert f"megatron_r1v2 {name} " in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_not_kept_waiting_by_a_heavy_import(name):
    code = (
        "import contextlib, sys, time; from megatron_r1v2.__main__ import main\n"
        f"with contextlib.suppress(SystemExit): main([{name!r}, '--help'])\n"
        "print({'torch', 'megatron', 'transformers', 'matplotlib', 'wandb', 'PIL'} & set(sys.modules))\n"
        "print(time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *_, heavy, seconds = done.stdout.splitlines()
    assert heavy == "set()"
    assert float(seconds) < 0.5  # 0.2 on a quiet machine


@pytest.mark.parametrize(("name", "status"), [("grpo", 141), ("--help", 141), ("serve", 0)])
def test_a_reader_that_leaves_early_sees_no_traceback(name, status):
    """141 is how a shell tells of SIGPIPE; argparse itself overlooks the broken pipe of a long help."""
    arguments = [name, "--help"] if name in COMMANDS else [name]
    with subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == status


def test_a_broken_connection_is_not_taken_for_a_reader_that_left():
    code = (
        "import megatron_r1v2.__main__ as m\n"
        "def broken(_): raise BrokenPipeError('the server went away')\n"
        "m.COMMANDS['report'] = m.Command('', broken)\n"
        "m.main(['report'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "BrokenPipeError: the server went away" in done.stderr


@pytest.mark.parametrize("stage", ["align", "mpo", "reward_model", "grpo"])
def test_a_stage_ends_with_its_report(capfd, monkeypatch, stage):
    """The stage itself is stood in for: what it does has tests of its own."""
    calls = []
    monkeypatch.setattr("megatron_r1v2.config.command_line.parse_command_line", lambda *given: calls.append(given))
    module = import_module(f"megatron_r1v2.stages.{'grpo.stage' if stage == 'grpo' else stage}")
    monkeypatch.setattr(module, f"run_{stage}", lambda recipe: "the run")
    monkeypatch.setattr("megatron_r1v2.report.page.write_report", lambda run: f"{run}/report.html")
    assert main([stage.replace("_", "-"), "recipe.yaml", "train.steps=2"]) == 0
    assert calls == [(["recipe.yaml", "train.steps=2"], STAGES[StageName(stage)], all_mistakes)]
    assert capfd.readouterr().out == "report: the run/report.html\n"
    monkeypatch.setenv("RANK", "1")
    assert main([stage.replace("_", "-"), "recipe.yaml"]) == 0
    assert capfd.readouterr().out == ""


def test_the_name_of_an_evaluation_needs_a_value():
    with pytest.raises(SystemExit, match="--name needs a value"):
        main(["evaluate", "recipe.yaml", "--name"])


def test_the_console_script_is_this_command():
    setup = (Path(__file__).parents[1] / "setup.py").read_text(encoding="utf-8")
    assert '"r1v2 = megatron_r1v2.__main__:main"' in setup
