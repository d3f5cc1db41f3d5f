"""Rows of files, read into checked samples: the input of `r1v2 prepare`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megatron_r1v2.data.images import name_images
from megatron_r1v2.data.row_files import RawRow, find_inputs, read_file
from megatron_r1v2.data.row_forms import RowForm, sample_fields
from megatron_r1v2.data.row_images import load_image
from megatron_r1v2.data.samples import SampleError, ShardSample, check_key, encode_record

Finish = Callable[[ShardSample], ShardSample]


def read_rows(
    paths: str | Path | Sequence[Path],
    images: str | Path,
    *,
    form: RowForm | None = None,
    finish: Finish = lambda sample: sample,
    report: Callable[[str], None] | None = None,
) -> Iterator[ShardSample]:
    """Read and check rows.

    Args:
        paths: files and folders of rows (`row_files.find_inputs`).
        images: the folder that image paths are relative to.
        finish: a last check or change of each sample; raises a SampleError where it is bad.
        report: called with the message of each bad row, which is then left out; None: the first bad row is an error.

    Raises:
        ValueError: a file cannot be read, or a row is bad and `report` is None; the message has its place.
    """
    files = find_inputs([Path(paths)] if isinstance(paths, str | Path) else paths)
    if not Path(images).is_dir():
        raise ValueError(f"--images {images} is not a folder")
    places: dict[str, str] = {}
    for file, prefix in zip(files, _key_prefixes(files), strict=True):
        for raw in read_file(file):
            try:
                sample = finish(_sample(raw, f"{prefix}-{raw.number:08d}", Path(images), form or RowForm()))
                if sample.key in places:
                    # The file is named already where it is the same.
                    place = places[sample.key].removeprefix(f"{file}, ")
                    raise SampleError(f"key {sample.key!r} was used in {place} already")
            except SampleError as error:
                message = f"{raw.place}: {error}"
                # With `report`, all bad rows are listed in one run.
                if report is None:
                    raise SampleError(message) from error
                report(message)
                continue
            places[sample.key] = raw.place
            yield sample


def _key_prefixes(files: Sequence[Path]) -> list[str]:
    """Name the rows of each file that have no key of their own."""
    # Keys allow fewer characters than file names.
    stems = [re.sub(r"[^A-Za-z0-9]+", "-", file.stem).strip("-")[:60] or "row" for file in files]
    count = Counter(stems)
    return [f"{stem}-{index}" if count[stem] > 1 else stem for index, stem in enumerate(stems)]


def _sample(raw: RawRow, default_key: str, images: Path, form: RowForm) -> ShardSample:
    row = raw.content
    if isinstance(row, SampleError):
        raise row
    if not isinstance(row, dict):
        raise SampleError(f"expected a JSON object, got {type(row).__name__}")
    try:
        fields = sample_fields(row, form)
        key = str(fields.pop("key", default_key))
        check_key(key)
        named = name_images([load_image(value, images) for value in fields.pop("images")])
        sample = ShardSample(key=key, images=named, **fields)
        # For its check of the schema, so that a bad row is named by its place.
        encode_record(sample)
    except RecursionError as error:
        raise SampleError("a column is nested too deeply to be read") from error
    return sample
