"""Preference pairs to look at: those of a folder of `r1v2 pairs`, or those that a run trained on."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, UnidentifiedImageError

from megatron_r1v2.report.read import Json, Run

if TYPE_CHECKING:
    from megatron_r1v2.data.samples import ShardSample

PAIRS_SHOWN = 8
_LOOKED_AT = 400
# As in stages/pair_shards.py, which this must not import: it writes, and loads torch.
_COUNTS_FILE = "pairs.json"


@dataclass(frozen=True)
class PreferencePairs:
    """Some pairs of a folder, and what it holds."""

    folder: Path
    counts: dict[str, int]
    """Pairs by source; empty where the folder does not say."""
    chosen: list[Json]
    """Rows as those of rollouts.jsonl, of the better responses."""
    rejected: list[Json]
    """The same of the worse ones."""
    margins: list[float | None]
    sources: list[str]


def read_preferences(run: Run) -> list[PreferencePairs]:
    """Return a few pairs of each data set that a run has read, or of its own folder; those without pairs are left out.

    Damaged and missing data sets are noted.
    """
    found = []
    for folder in _folders(run):
        try:
            pairs = _read_pairs(folder)
        except ValueError as error:
            run.notes.append(f"no pairs are shown: {error}")
            continue
        if pairs.chosen:
            found.append(pairs)
    return found


def _folders(run: Run) -> list[Path]:
    if any(run.path.glob("*.tar")):
        return [run.path]
    if run.recipe.get("run.stage") not in ("mpo", "reward_model"):
        return []
    train = run.recipe.get("data.train")
    # One folder, or several with their weights.
    entries = train if isinstance(train, list) else [train]
    paths = [entry.get("path") if isinstance(entry, dict) else entry for entry in entries]
    folders = [Path(path) for path in paths if isinstance(path, str) and path]
    run.notes.extend(
        f"no pairs are shown: data.train {str(folder)!r} is not on this machine, or relative to another folder"
        for folder in folders
        if not folder.is_dir()
    )
    return [folder for folder in folders if folder.is_dir()]


def _read_pairs(folder: Path) -> PreferencePairs:
    # Most runs have no pairs, and energon takes seconds to import.
    from megatron_r1v2.data.samples import parse_sample
    from megatron_r1v2.data.stream import read_shards

    with_pair = (sample for sample in read_shards(folder, parse_sample) if sample.chosen and sample.rejected)
    samples = _telling(list(itertools.islice(with_pair, _LOOKED_AT)))
    return PreferencePairs(
        folder,
        _counts(folder / _COUNTS_FILE),
        chosen=[_row(sample, sample.chosen) for sample in samples],
        rejected=[_row(sample, sample.rejected) for sample in samples],
        margins=[sample.margin for sample in samples],
        sources=[sample.source or "" for sample in samples],
    )


def _telling(samples: Sequence[ShardSample]) -> list[ShardSample]:
    """Return a few pairs, in turn of each source, the largest margin first."""
    by_source: dict[str, list[ShardSample]] = {}
    for sample in sorted(samples, key=lambda sample: -(sample.margin or 0.0)):
        by_source.setdefault(sample.source or "", []).append(sample)
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*by_source.values()))
    # Of each prompt one pair only.
    by_prompt: dict[str, ShardSample] = {}
    for sample in in_turn:
        if sample is not None:
            by_prompt.setdefault(_prompt_key(sample.key), sample)
    return list(by_prompt.values())[:PAIRS_SHOWN]


def _prompt_key(key: str) -> str:
    """Return the key of the prompt of a pair, whose own key has its number in the end."""
    return re.sub(r"-pair\d+$", "", key)


def _row(sample: ShardSample, text: str | None) -> Json:
    from megatron_r1v2.evaluation.rollout_records import images_base64, question

    try:
        picture = images_base64([Image.open(io.BytesIO(content)).convert("RGB") for content in sample.images.values()])
    except (UnidentifiedImageError, OSError):
        picture = None
    return {
        "prompt_key": sample.key,
        "question": question(sample.messages),
        "messages": [dict(message) for message in sample.messages] if len(sample.messages) > 1 else [],
        "answer": sample.answer,
        "text": text,
        "image_png": picture,
    }


def _counts(path: Path) -> dict[str, int]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        pairs = content["pairs"]
        return {str(source): int(count) for source, count in pairs.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
