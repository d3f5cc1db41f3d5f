"""Rows of every kind of file, several at once, and files that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_r1v2.data import row_files
from megatron_r1v2.data.row_files import count_rows, find_inputs, read_file
from megatron_r1v2.data.samples import SampleError

ROWS = [{"question": "one\u2028two", "answer": "1"}, {"question": "two", "answer": "2"}]


def rows_of(path: Path) -> list[object]:
    return [row.content for row in read_file(path)]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_lines_and_lists_of_json(tmp_path: Path, mark: str) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    contents = {
        "a.jsonl": f"{lines[0]}\n\n{lines[1]}\n",
        "lines.json": "\n".join(lines),
        "list.json": json.dumps(ROWS, indent=1, ensure_ascii=False),
        "map.json": json.dumps({"a": ROWS[0], "b": ROWS[1]}),
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(mark + content)
        assert rows_of(tmp_path / name) == ROWS, name
    one, two = read_file(tmp_path / "a.jsonl")
    assert (one.place, two.place, two.number) == (f"{tmp_path}/a.jsonl, line 1", f"{tmp_path}/a.jsonl, line 3", 3)
    assert [row.place for row in read_file(tmp_path / "list.json")][1] == f"{tmp_path}/list.json, row 2"
    assert [count_rows(tmp_path / name) for name in ("a.jsonl", "list.json")] == [2, None]


def test_one_line_that_is_no_json_leaves_the_others(tmp_path: Path) -> None:
    lines = ["{", "\xff", "9" * 5000, "[" * 100_000, json.dumps(ROWS[1])]
    (tmp_path / "a.jsonl").write_bytes("\n".join(lines).encode("latin-1"))
    *bad, good = rows_of(tmp_path / "a.jsonl")
    assert all(isinstance(error, SampleError) and "not JSON" in str(error) for error in bad)
    assert good == ROWS[1]


def test_a_list_that_is_cut_off(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS)[:-5])
    with pytest.raises(ValueError, match=r"a\.json is not a list of rows: not JSON"):
        rows_of(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("name", "mark", "text"),
    [
        ("a.csv", "", 'question,answer\n"one, two",1\n"two\nlines ""so""",2\n'),
        ("a.csv", "\ufeff", 'question;answer\r\n"one, two";1\r\n"two\nlines ""so""";2\r\n'),
        ("A.CSV", "", ',question , answer\n0,"one, two",1\n\n1,"two\nlines ""so""",2'),  # pandas' index has no name
        ("a.tsv", "", 'question\tanswer\none, two\t1\n"two\nlines ""so"""\t2\n'),
    ],
)
def test_tables_as_spreadsheets_and_pandas_write_them(tmp_path: Path, name: str, mark: str, text: str) -> None:
    (tmp_path / name).write_bytes((mark + text).encode())
    assert find_inputs([tmp_path]) == [tmp_path / name]
    assert rows_of(tmp_path / name) == [
        {"question": "one, two", "answer": "1"},
        {"question": 'two\nlines "so"', "answer": "2"},
    ]
    one, two = read_file(tmp_path / name)
    blank = "\n\n" in text
    assert (one.number, one.place) == (1, f"{tmp_path / name}, line 2")
    assert (two.number, two.place) == (2, f"{tmp_path / name}, line {3 + blank}")
    assert count_rows(tmp_path / name) is None


def test_tables_that_are_broken(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_text("question,answer\nHow many, all told?,1\nHow many?,2\nWhich?\n")
    long, good, short = rows_of(table)
    assert good == {"question": "How many?", "answer": "2"}
    for bad, count in ((long, 3), (short, 1)):
        assert isinstance(bad, SampleError)
        assert f"the row has {count} cells, the first line names 2 columns" in str(bad)
    for content, message in {
        b"": r"a\.csv: the first line is empty; it must name the columns",
        b"a,b,a\n1,2,3\n": r"a\.csv: two columns are named 'a'",
        b'a,b\n"1,2\n': r"a\.csv, line 2: unexpected end of data; a text with a comma",
        b"a,b\n\xe4,2\n": r"a\.csv is not UTF-8 .*; save it as CSV in UTF-8",
    }.items():
        table.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            rows_of(table)
    with pytest.raises(ValueError, match=r"a\.xlsx is a spreadsheet, which is not read; save its sheet as CSV"):
        find_inputs([tmp_path / "a.xlsx"])


def test_a_table_beside_rows_is_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS[0]))
    (tmp_path / "sources.csv").write_text("name\nme\n")
    assert find_inputs([tmp_path]) == [tmp_path / "a.jsonl"]


def test_parquet_and_saved_data_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{**row, "images": [{"bytes": b"\x89PNG", "path": None}]} for row in ROWS] * 40
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved", num_shards=2)
    datasets.DatasetDict(train=data).save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=data, test=data).save_to_disk(tmp_path / "two")
    assert rows_of(tmp_path / "a.parquet") == rows
    for folder in ("saved", "one", "two/train"):
        assert [row for file in find_inputs([tmp_path / folder]) for row in rows_of(file)] == rows
    with pytest.raises(ValueError, match=r"two holds the splits test, train; give one"):
        find_inputs([tmp_path / "two"])


def test_a_folder_as_downloaded_is_read_if_it_is_one_split(tmp_path: Path) -> None:
    for name in (
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
        "dataset_infos.json",
        "x.md",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert [file.name[:11] for file in find_inputs([tmp_path])] == ["train-00000", "train-00001"]
    (tmp_path / "data/test-00000-of-00001.parquet").write_text("")
    with pytest.raises(ValueError, match="holds the splits test, train; give the files of one"):
        find_inputs([tmp_path])


def test_files_that_are_not_there_twice_or_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"no\.jsonl does not exist; give a JSONL, JSON or parquet file"):
        find_inputs([tmp_path / "no.jsonl"])
    with pytest.raises(ValueError, match=r"holds no \.jsonl"):
        find_inputs([tmp_path])
    for name in ("a.parquet", "a.arrow"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="is given twice"):
        find_inputs([tmp_path / "a.arrow", tmp_path / "." / "a.arrow"])
    with pytest.raises(ValueError, match=r"a\.parquet is not a parquet file"):
        rows_of(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.arrow is no Arrow stream"):
        rows_of(tmp_path / "a.arrow")
    monkeypatch.setattr(row_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"reading parquet needs pyarrow; pip install 'megatron_r1v2\[evaluation\]'"):
        rows_of(tmp_path / "a.parquet")
