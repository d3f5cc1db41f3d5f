"""Rows of published files: parquet, JSON and JSONL, their images and lists, and files that are broken."""

import json

import pytest

pytest.importorskip("pyarrow")

from megatron_r1v2.data.samples import SampleError
from megatron_r1v2.evaluation.benchmarks.files import check_one_split, find_files, image_bytes, read_rows, text_list
from megatron_r1v2.evaluation.benchmarks.samples import benchmark_samples
from tests.evaluation import published


def read(name, folder, only="*"):
    return list(benchmark_samples(name, folder, folder, only))


def content(sample):
    return sample.messages[-1]["content"]


@pytest.mark.parametrize("content", ["null", "5", '"text"'])
def test_json_that_holds_no_rows(tmp_path, content):
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(ValueError, match=r"rows.json: expected a list of rows or a mapping"):
        read("mmmu", tmp_path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_line_ends_inside_texts_and_a_byte_order_mark(tmp_path, name):
    row = {"id": 1, "problem": "one\u2028two\x85three", "answer": "3"}
    (tmp_path / name).write_text("\ufeff" + json.dumps(row if name == "rows.jsonl" else [row], ensure_ascii=False))
    (sample,) = read("aime2024", tmp_path)
    assert content(sample).startswith("one\u2028two\x85three\n")


def test_files_that_are_not_there_or_broken(tmp_path):
    with pytest.raises(ValueError, match="no .parquet, .jsonl, .json file"):
        read("mmmu", tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="a.parquet is not a parquet file"):
        read("mmmu", tmp_path)


def test_files_are_found_to_any_depth_in_order(tmp_path):
    for name in ("b/rows.jsonl", "a/deep/rows.json", "c.parquet", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert [str(file.relative_to(tmp_path)) for file in find_files(tmp_path)] == [
        "a/deep/rows.json", "b/rows.jsonl", "c.parquet",
    ]  # fmt: skip
    assert find_files(tmp_path / "c.parquet") == [tmp_path / "c.parquet"]
    for missing in (tmp_path / "notes.txt", tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="give the file or folder as downloaded"):
            find_files(missing)


def test_rows_come_with_their_places(tmp_path):
    rows = [{"id": number, "text": f"t{number}"} for number in range(1, 80)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    (tmp_path / "b.json").write_text(json.dumps({f"k{row['id']}": row for row in rows}))
    published.write(tmp_path / "c.parquet", [("id", "int64"), ("text", published.TEXT)], rows)
    for name, place in (("a.jsonl", "row 79"), ("b.json", "row k79"), ("c.parquet", "row 79")):
        found = list(read_rows(tmp_path / name))
        assert [row for _, row in found] == rows
        assert found[-1][0] == f"{tmp_path / name}, {place}"
    (tmp_path / "d.jsonl").write_text('{"id": 1}\n[2]\n')
    with pytest.raises(ValueError, match="d.jsonl, row 2: expected an object, got list"):
        list(read_rows(tmp_path / "d.jsonl"))
    (tmp_path / "e.jsonl").write_text('{"id": 1}\n{"id"')
    with pytest.raises(ValueError, match="e.jsonl is not valid JSON"):
        list(read_rows(tmp_path / "e.jsonl"))


def test_images_are_bytes_or_files_beside(tmp_path):
    (tmp_path / "a.png").write_bytes(b"beside")
    assert image_bytes({"bytes": b"inside", "path": "a.png"}, tmp_path) == b"inside"
    assert image_bytes({"bytes": None, "path": "a.png"}, tmp_path) == b"beside"
    assert image_bytes("a.png", tmp_path) == b"beside"
    for nothing in (None, "", {"bytes": None, "path": None}):
        assert image_bytes(nothing, tmp_path) is None
    with pytest.raises(SampleError, match=r"b.png does not exist; give the folder of the images with --images"):
        image_bytes("b.png", tmp_path)
    with pytest.raises(SampleError, match="an image is a path or a struct of bytes and path, got int"):
        image_bytes(5, tmp_path)


def test_lists_may_be_the_text_of_a_list():
    assert text_list("['3', 5]", "x") == text_list(("3", 5), "x") == ["3", "5"]
    assert text_list(None, "x") == text_list("", "x") == []
    with pytest.raises(SampleError, match="options is not the text of a list: 'a, b'"):
        text_list("a, b", "options")
    with pytest.raises(SampleError, match="options must be a list, got 7"):
        text_list("7", "options")


def test_a_split_is_told_by_the_name_that_the_hub_gives_its_files(tmp_path):
    parts = [tmp_path / f"{name}.parquet" for name in ("train-00000-of-00002", "train-00001-of-00002")]
    check_one_split([*parts, tmp_path / "test_en-00000-of-00001.parquet", tmp_path / "testmini.json"])
    with pytest.raises(ValueError, match=r"several splits \(test, train\)"):
        check_one_split([*parts, tmp_path / "deep" / "test-00000-of-00001.parquet"])
