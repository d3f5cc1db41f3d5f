"""The command line of `prepare`: shards or a list of all bad rows, and nothing left behind by an error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_r1v2.checkpoint.hf.config import read_hf_architecture
from megatron_r1v2.config.schema import DataConfig
from megatron_r1v2.data.prompts import PromptBuilder
from megatron_r1v2.data.rows import read_rows
from megatron_r1v2.data.samples import SampleError, encode_record, parse_sample
from megatron_r1v2.data.shards import check_shards
from megatron_r1v2.data.stream import read_shards
from megatron_r1v2.data.tokenizer import ChatTokenizer
from megatron_r1v2.stages.prepare import finish_answer, histogram, main
from tests.data.conftest import write_pictures
from tests.data.test_rows import BAD_ROWS, MMPR, OWN, VERL, write_rows
from tests.tiny import tiny_sample


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "images")


@pytest.mark.parametrize(("message", "row"), BAD_ROWS.items(), ids=BAD_ROWS.keys())
def test_a_bad_row_is_named_by_its_line_and_nothing_is_left(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str], message: str, row: Any
) -> None:
    path = write_rows(tmp_path, {**OWN, "key": "first"}, row, OWN)
    before = sorted(tmp_path.iterdir())
    assert main([str(path), "--images", str(images), "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert f"{path}, line 2: " in error
    assert message in error
    assert sorted(tmp_path.iterdir()) == before


def test_check_only_lists_every_bad_row(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path, OWN, "{", OWN, {**OWN, "answer": 1})
    before = sorted(tmp_path.iterdir())
    assert main([str(path), "--images", str(images), "--check-only"]) == 1
    captured = capsys.readouterr()
    assert "line 2" in captured.err
    assert "line 4" in captured.err
    assert "2 samples are fine, 2 are not" in captured.out
    assert sorted(tmp_path.iterdir()) == before
    assert main([str(write_rows(tmp_path, OWN)), "--images", str(images), "--check-only"]) == 0


def test_a_terminal_shows_the_first_bad_rows_and_a_file_takes_all(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [str(write_rows(tmp_path, *["{"] * 23)), "--images", str(images), "--check-only"]
    assert main(command) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 23
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(command) == 1
    printed = capsys.readouterr().err
    assert "line 20: " in printed
    assert "line 21: " not in printed
    assert "... and 3 more; with 2> FILE the file has them all" in printed


def test_an_image_that_is_missing_names_the_option_of_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "away").mkdir()
    assert main([str(write_rows(tmp_path, OWN)), "--images", str(tmp_path / "away"), "--check-only"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"{tmp_path / 'away'}/" in line
    assert line.endswith("does not exist; paths are relative to --images FOLDER")


@pytest.mark.parametrize(("name", "message"), [("rows.parquet", "does not exist"), ("no.jsonl", "does not exist")])
def test_inputs_that_cannot_be_read(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    assert main([str(tmp_path / name), "--images", str(images), "--output", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err


def test_the_command_writes_shards(tmp_path: Path, images: Path) -> None:
    command = [sys.executable, "-m", "megatron_r1v2", "prepare"]
    root = Path(__file__).parents[2]
    path = write_rows(tmp_path, OWN, MMPR, VERL)
    arguments = [str(path), "--images", str(images), "--output", str(tmp_path / "out"), "--samples-per-shard", "2"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=root, check=True)
    assert "3 samples are fine" in done.stdout
    assert check_shards(tmp_path / "out") == {"shard-000000.tar": 2, "shard-000001.tar": 1}


def prepare(tmp_path: Path, images: Path, *options: str, rows: list[Any]) -> int:
    path = write_rows(tmp_path, *rows)
    return main([str(path), "--images", str(images), "--output", str(tmp_path / "out"), *options])


def test_a_table_in_two_parts(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "table.csv"
    table.write_text("question,answer,colour\n" + "".join(f"What is {n} + 1?,{n + 1},red\n" for n in range(40)))
    command = [str(table), "--images", str(images), "--output", str(tmp_path / "train")]
    assert main([*command, "--held-out", f"0.25={tmp_path / 'heldout'}"]) == 0
    counts = [sum(check_shards(tmp_path / name).values()) for name in ("train", "heldout")]
    said = capsys.readouterr().out
    assert f"{counts[1]} of 40 samples are held out in {tmp_path / 'heldout'}; set evaluation.data to it" in said
    assert f"{sum(counts)} samples are fine" in said
    first = next(read_shards(tmp_path / "heldout", parse_sample))
    assert (first.metadata, first.answer_type) == ({"colour": "red"}, "math")
    for wrong in ("0.2", "1=x", "0=x", "a=x", "0.2="):
        with pytest.raises(SystemExit):
            main([*command, "--held-out", wrong])
        assert "give a share between 0 and 1 and a folder, such as 0.2=data/heldout" in capsys.readouterr().err


def test_bad_rows_are_left_out_and_listed_up_to_a_number(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [OWN, "{", OWN, {**OWN, "answer": None}]
    assert prepare(tmp_path, images, "--skip-bad", "1", rows=rows) == 1
    assert "line 4: " in (error := capsys.readouterr().err)
    assert "after 1 that --skip-bad left out" in error
    assert not (tmp_path / "out").exists()
    assert prepare(tmp_path, images, "--skip-bad", "2", rows=rows) == 0
    captured = capsys.readouterr()
    assert captured.err.count("left out: ") == 2
    assert "line 2: not JSON" in captured.err
    assert "2 samples are fine, 2 are not" in captured.out
    assert check_shards(tmp_path / "out") == {"shard-000000.tar": 2}


def test_check_only_never_dies_of_a_row(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = [
        '{"question": "What \\ud83d", "answer": "8"}',
        '{"question": "q", "answer": ' + "9" * 5000 + "}",
        '{"question": "q", "answer": 1e999}',
        '{"question": "q", "answer": "8", "more": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"question": "q", "answer": "8", "more": ' + '{"a": ' * 900 + "1" + "}" * 900 + "}",
        '{"question": "q", "answer": "8", "image": "' + "a" * 5000 + '.png"}',
        '{"question": "q", "answer": "8", "image": "a\\u0000.png"}',
        '{"question": "q", "answer": "8", "margin": 1' + "0" * 400 + "}",
    ]
    path = write_rows(tmp_path, OWN)
    path.write_bytes(path.read_bytes() + b"\xff\xfe\n" + "\n".join(bad).encode() + b"\n" + json.dumps(OWN).encode())
    assert main([str(path), "--images", str(images), "--check-only"]) == 1
    captured = capsys.readouterr()
    assert "2 samples are fine" in captured.out or "3 samples are fine" in captured.out
    assert "column question has half of a character, '\\ud83d', at place 6" in captured.err
    assert "nested too deeply" in captured.err


@pytest.mark.parametrize(
    ("answer", "answer_type", "expected"),
    [
        ("\\boxed{8}", "numeric", "8"),
        ("So $x = 3$ and we get \\boxed{\\frac{1}{2}}.", "math", "\\frac{1}{2}"),
        ("<think>8 or 9</think><answer> B </answer>", "choice", "B"),
        ("3 + 5 = 8\n#### 8", "math", "8"),
        ("1,234 apples", "numeric", "1,234 apples"),
        ("(C)", "choice", "(C)"),
        ("2", "choice", "2"),
        ("None of these", "exact", "None of these"),
        ("eight", "numeric", "is no number"),
        ("x + 1", "numeric", "is no number"),
        ("12", "choice", "is no option letter"),
        ("blue", "choice", "is no option letter"),
        ("\\boxed{}", "math", "has nothing in it"),
        ("$$", "exact", "has nothing in it"),
    ],
)
def test_an_answer_is_taken_out_of_its_solution_and_fits_its_type(answer: str, answer_type: Any, expected: str) -> None:
    sample = tiny_sample(1, answer=answer, answer_type=answer_type)
    if expected.startswith(("is ", "has ")):
        with pytest.raises(SampleError, match=expected):
            finish_answer(sample)
    else:
        assert finish_answer(sample).answer == expected


def test_alternatives_fit_the_type_too() -> None:
    with pytest.raises(SampleError, match=r"answer 'eight' is no number"):
        finish_answer(tiny_sample(1, answer="8", answer_type="numeric", alternatives=("eight",)))
    sample = tiny_sample(1, answer="B", answer_type="choice", alternatives=("12 cm", "\\boxed{8}"))
    assert finish_answer(sample).alternatives == ("12 cm", "8")


def test_rows_of_other_names(tmp_path: Path, images: Path) -> None:
    row = {"problem text": "left?", "gold": ["8", "8.0"], "pic": "a.png", "thumb": "b.jpg", "level": 3, "id": "x"}
    options = ("--columns", "question=problem text,answer=gold,image=pic", "--ignore", "thumb,id")
    prompt = ("--prompt", "{question} (level {level}) Answer in \\boxed{{}}.", "--answer-type", "numeric")
    assert prepare(tmp_path, images, *options, *prompt, rows=[row]) == 0
    (sample,) = read_shards(tmp_path / "out", parse_sample)
    assert sample.messages[0]["content"] == "<image>\nleft? (level 3) Answer in \\boxed{}."
    assert (sample.answer, sample.alternatives, sample.answer_type) == ("8", ("8.0",), "numeric")
    assert sample.metadata == {"level": "3"}
    assert sample.images == {"0.png": (images / "a.png").read_bytes()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--columns", "qestion=q"), "unknown 'qestion'; accepted are question, answer, image"),
        (("--columns", "question"), "'question' names no column"),
        (("--columns", "question=q"), "the row has no column 'q', only"),
        (("--prompt", "\\boxed{}"), "write a brace of the text twice"),
        (("--prompt", "{question"), "write a brace of the text twice"),
        (("--prompt", "{topic}"), "the row has no column 'topic'"),
    ],
)
def test_wishes_that_do_not_fit_the_rows(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert prepare(tmp_path, images, *options, rows=[{"question": "q", "answer": "8"}]) == 1
    assert message in capsys.readouterr().err


def test_rows_without_an_answer(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": "Draw a cat."}, {"question": "q", "answer": "8"}]
    assert prepare(tmp_path, images, rows=rows) == 1
    assert "line 1: no answer (looked for answer, answers," in capsys.readouterr().err
    assert prepare(tmp_path, images, "--no-answer", rows=[*rows, {"question": "q", "answer": None}]) == 1
    assert "line 3: answer is None" in capsys.readouterr().err
    assert prepare(tmp_path, images, "--no-answer", rows=rows) == 0
    first, second = read_shards(tmp_path / "out", parse_sample)
    assert (first.answer, first.answer_type) == ("", None)
    assert (second.answer, second.answer_type) == ("8", "math")


def test_tokens_are_counted_with_the_model(
    tmp_path: Path, root: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(root / "model")
    rows = [OWN, {"question": "left " * 100, "answer": "8", "response": "8"}]
    options = ("--model", model, "--max-prompt-tokens", "150", "--check-only")
    assert prepare(tmp_path, images, *options, rows=rows) == 0
    printed = capsys.readouterr().out
    tokenizer, (architecture, _) = ChatTokenizer(model), read_hf_architecture(model)
    builder = PromptBuilder(
        settings=DataConfig(),
        tokenizer=tokenizer,
        tile_size=architecture.vision.image_size,
        tokens_per_tile=architecture.tokens_per_tile,
    )
    samples = list(read_rows(write_rows(tmp_path, *rows), images))
    lengths = [len(builder.build(s.key, {"json": encode_record(s), **s.images}).token_ids) for s in samples]
    assert f"tokens of 2 prompts: {min(lengths)} to {max(lengths)}, {sum(lengths)} in all" in printed
    assert f"tokens of 1 responses: {len(tokenizer.encode_text('8'))} to" in printed
    assert "1 prompts have more than 150 tokens" in printed
    assert f"my-rows-v2-00000002: {lengths[1]} tokens (0 tiles)" in printed


def test_a_pair_that_never_closes_what_the_template_opens(
    tmp_path: Path, root: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question": "q", "chosen": "a</think>b", "rejected": "never"}]
    assert prepare(tmp_path, images, "--check-only", rows=rows) == 0  # nobody knows of a template
    options = ("--model", str(root / "model"))
    assert prepare(tmp_path, images, *options, rows=rows) == 1
    assert "rejected never closes the <think> that the chat template opens: 'never'" in capsys.readouterr().err
    assert prepare(tmp_path, images, *options, "--unclosed-think", rows=rows) == 0
    (sample,) = read_shards(tmp_path / "out", parse_sample)
    assert sample.unclosed_think


def test_the_bars_of_a_histogram() -> None:
    assert histogram([1, 2, 3, 4, 4, 9]) == [
        "  up to       1        1  ##############",
        "  up to       2        1  ##############",
        "  up to       4        3  ########################################",
        "  up to       8        0",
        "  up to      16        1  ##############",
    ]


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "python -m megatron_r1v2 prepare questions.jsonl --images pictures" in text
    assert "reward_model" in text
