"""The command that writes reports."""

import subprocess
import sys


def run(*arguments):
    command = [sys.executable, "-m", "megatron_r1v2", "report", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_reports_are_written_for_each_folder_and_one_page_for_all(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    done = run(tmp_path / "a", tmp_path / "b")
    assert done.returncode == 0, done.stderr
    reports = [str(tmp_path / "a" / "report.html"), str(tmp_path / "b" / "report.html")]
    assert done.stdout.split() == [*reports, str(tmp_path / "a" / "comparison.html")]
    assert (tmp_path / "b" / "report.html").is_file()


def test_a_missing_folder_ends_with_advice(tmp_path):
    done = run(tmp_path / "none")
    assert done.returncode == 2
    assert done.stderr.startswith("error: run folder")
    assert "Traceback" not in done.stderr


def test_a_run_twice_is_not_compared_with_itself(tmp_path):
    done = run(tmp_path, tmp_path / ".")
    assert done.returncode == 2
    assert "is given twice; give each run once" in done.stderr
    alone = run(tmp_path, "--output", tmp_path / "x.html")
    assert alone.returncode == 2
    assert "--output is the page of --evaluations or of several runs" in alone.stderr
