"""The command that writes reports."""

import subprocess
import sys


def run(*arguments):
    command = [sys.executable, "-m", "megatron_r1v2", "report", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_reports_are_written_for_each_folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    done = run(tmp_path / "a", tmp_path / "b")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "a" / "report.html"), str(tmp_path / "b" / "report.html")]
    assert (tmp_path / "b" / "report.html").is_file()


def test_a_missing_folder_ends_with_advice(tmp_path):
    done = run(tmp_path / "none")
    assert done.returncode == 2
    assert done.stderr.startswith("error: run folder")
    assert "Traceback" not in done.stderr
