"""The common part of the makers: options from settings, sets of rows, an output that is left alone."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from examples import making


@dataclass(frozen=True)
class Settings:
    hidden_size: int = 64
    rate: float = 0.5
    heads: int = 4


def parse(*arguments: str) -> Settings:
    parser = making.maker_parser("examples.a.maker", "Make a part.", output="folder to make")
    making.add_settings(parser, Settings(), {"hidden_size": "width", "rate": "peak rate"})
    return making.chosen_settings(parser.parse_args(["--output", "x", *arguments]), Settings())


def test_options_replace_settings_and_keep_their_types():
    assert parse() == Settings()
    assert parse("--hidden-size", "32", "--rate", "1") == Settings(hidden_size=32, rate=1.0)
    assert isinstance(parse("--rate", "1").rate, float)
    with pytest.raises(SystemExit):
        parse("--heads", "2")


def test_help_names_the_maker_and_the_defaults(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    assert "python -m examples.a.maker" in text
    assert "width (64)" in text


def test_an_output_that_exists_is_reported(tmp_path, capsys):
    assert not making.report_if_made("data", tmp_path / "new")
    assert capsys.readouterr().out == ""
    assert making.report_if_made("data", tmp_path)
    assert capsys.readouterr().out == f"data: {tmp_path} is there already; remove it to make it again\n"


def test_sets_appear_together_or_not_at_all(tmp_path):
    def rows(name, count, images):
        for number in range(count):
            (images / f"{name}-{number}.png").write_bytes(b"pixels")
            yield {"key": f"{name}-{number}"}

    making.write_sets(tmp_path / "data", {"one": 2, "two": 1}, rows)
    written = (tmp_path / "data" / "one.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == [{"key": "one-0"}, {"key": "one-1"}]
    assert sorted(path.name for path in (tmp_path / "data" / "images").iterdir()) == [
        "one-0.png",
        "one-1.png",
        "two-0.png",
    ]

    def failing(name, count, images):
        yield {"key": name}
        raise ValueError("no more pictures")

    with pytest.raises(ValueError, match="no more pictures"):
        making.write_sets(tmp_path / "other", {"one": 1}, failing)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
