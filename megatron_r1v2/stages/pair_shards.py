"""The files of the pairs command: finished rounds while it runs, shards and counts at the end."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from rich.table import Table

from megatron_r1v2.checkpoint.megatron.run_folder import resolve_checkpoint
from megatron_r1v2.config.choices import TooLong
from megatron_r1v2.config.recipes import PairsRecipe
from megatron_r1v2.data.samples import THINK_END, ShardSample, parse_sample
from megatron_r1v2.data.shards import fill_shards
from megatron_r1v2.data.stream import read_shards
from megatron_r1v2.data.survey import DataSurvey
from megatron_r1v2.resilience.files import atomic_folder, write_json
from megatron_r1v2.resilience.fingerprint import Fingerprint
from megatron_r1v2.rewards.functions import describe_functions
from megatron_r1v2.types import Preference

COUNTS_FILE = "pairs.json"
_SETTINGS_FILE = "settings.json"
# Layout and memory may change from one attempt to the next; what decides the responses and the pairs may not.
_FREE = {
    "model": {"allow_random_parts"},
    "generation": {"kv_cache_gib", "max_requests", "max_tokens_per_step", "feature_cache_gib", "cuda_graphs"},
    "reward_model": {"centring_weight"},
}
_DECIDING = ("model", "generation", "reward", "reward_model", "pairs")
_ROWS = "data.rows"
_MAX_KEY = 80


@dataclass(frozen=True)
class PromptPairs:
    """The pairs of one prompt."""

    key: str
    pairs: list[Preference]
    dropped: dict[str, int]
    """Responses and pairs that were not taken, by reason."""


@dataclass(frozen=True)
class PairCounts:
    """The counts of a run of the command, as written to pairs.json."""

    prompts: int = 0
    prompts_with_pairs: int = 0
    responses: int = 0
    """Without the DropoutNTP continuations."""
    right: int = 0
    """Of the responses."""
    verifier_failures: int = 0
    """Checks of responses that timed out or crashed: these are in no pair."""
    pairs: dict[str, int] = field(default_factory=dict)
    """By source."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Responses, pairs and prompts that were not taken, by reason: response/*, pair/*, dropout_ntp/*, prompt/*."""

    def __add__(self, other: PairCounts) -> PairCounts:
        """Return the counts of both."""
        sums = {name: getattr(self, name) + getattr(other, name) for name in _NUMBERS}
        return PairCounts(
            **sums,
            pairs=dict(Counter(self.pairs) + Counter(other.pairs)),
            dropped=dict(Counter(self.dropped) + Counter(other.dropped)),
        )


_NUMBERS = ("prompts", "prompts_with_pairs", "responses", "right", "verifier_failures")


def count_pairs(found: Iterable[PromptPairs], *, responses: int, right: int, verifier_failures: int) -> PairCounts:
    """Count pairs, and what was dropped by reason.

    Args:
        verifier_failures: checks that timed out or crashed.
    """
    each = list(found)
    dropped: Counter[str] = Counter()
    for prompt in each:
        dropped.update(prompt.dropped)
    return PairCounts(
        prompts=len(each),
        prompts_with_pairs=sum(bool(prompt.pairs) for prompt in each),
        responses=responses,
        right=right,
        verifier_failures=verifier_failures,
        pairs=dict(Counter(pair.source for prompt in each for pair in prompt.pairs)),
        dropped=dict(dropped),
    )


class UnfinishedPairs:
    """The folder beside `run.output_dir` that keeps finished rounds, so that an interrupted command goes on from there.

    Raises:
        ValueError: it holds rounds of other settings.
    """

    def __init__(self, recipe: PairsRecipe) -> None:
        self.output = Path(recipe.run.output_dir)
        self.folder = self.output.with_name(f".{self.output.name}.unfinished")
        self._fingerprint = _pairs_fingerprint(recipe)
        self._check_kept()

    def check_rows(self, survey: DataSurvey) -> None:
        """Note which rows the rounds are of.

        Raises:
            ValueError: those of an earlier attempt are of other rows, in shards of the same folder.
        """
        values = self._fingerprint.values
        data = {**cast(Mapping[str, object], values["data"]), "rows": survey.digest[:12]}
        self._fingerprint = Fingerprint.of(**{**values, "data": data})
        self._check_kept()

    def _check_kept(self) -> None:
        kept = self.folder / _SETTINGS_FILE
        if kept.is_file():
            _check_same(self._fingerprint, json.loads(kept.read_text()), self.folder)

    def rounds(self) -> list[int]:
        """Return the numbers of the finished rounds."""
        return sorted(int(path.stem.removeprefix("round-")) for path in self.folder.glob("round-*.json"))

    def write_round(self, number: int, found: Iterable[PromptPairs], counts: PairCounts) -> None:
        """Keep a finished round.

        Args:
            found: of each of its prompts, in the order of the data set.
        """
        if not (self.folder / _SETTINGS_FILE).is_file():
            write_json(self.folder / _SETTINGS_FILE, self._fingerprint.values)
        record = {"counts": dataclasses.asdict(counts), "prompts": [dataclasses.asdict(prompt) for prompt in found]}
        write_json(self._round(number), record)

    def finish(self, source: str, remark: Mapping[str, Any]) -> PairCounts:
        """Write the shards and their counts, move them to `run.output_dir`, and delete the rounds.

        Args:
            remark: also written into pairs.json.

        Raises:
            ValueError: there is no pair; the rounds stay, and so do the counts, as pairs.json beside them.
        """
        numbers = self.rounds()
        counts = sum((PairCounts(**self._read(number)["counts"]) for number in numbers), PairCounts())
        record = {**dataclasses.asdict(counts), **remark}
        if not counts.pairs:
            write_json(self.folder / COUNTS_FILE, record)
            raise ValueError(
                f"no preference pair came of {counts.responses} responses to {counts.prompts} prompts "
                f"({_reasons(counts.dropped)}); change the pairs, generation or reward section, and delete "
                f"{self.folder}"
            )
        found = (_prompt_pairs(row) for number in numbers for row in self._read(number)["prompts"])
        with atomic_folder(self.output) as shards:
            fill_shards(shards, expand_pairs(read_shards(source, parse_sample), found))
            write_json(shards / COUNTS_FILE, record)
        # Last: until the output has its name, a restart goes on from the rounds.
        shutil.rmtree(self.folder)
        return counts

    def _round(self, number: int) -> Path:
        return self.folder / f"round-{number:08d}.json"

    def _read(self, number: int) -> dict[str, Any]:
        record: dict[str, Any] = json.loads(self._round(number).read_text(encoding="utf-8"))
        return record


def expand_pairs(samples: Iterable[ShardSample], found: Iterable[PromptPairs]) -> Iterator[ShardSample]:
    """Turn pairs into samples that keep everything of their prompt's sample.

    Args:
        samples: of the prompts, and others between them.
        found: in the same order.
    """
    rest = iter(samples)
    for prompt in found:
        if not prompt.pairs:
            continue
        sample = next(sample for sample in rest if sample.key == prompt.key)
        for number, pair in enumerate(prompt.pairs):
            unclosed = not all(THINK_END in text for text in (pair.chosen, pair.rejected))
            key = pair_key(sample.key, number)
            # The stage has chosen it, whatever it lacks: a response may be rejected for that.
            yield replace(sample, key=key, **dataclasses.asdict(pair), unclosed_think=unclosed)


def pair_key(key: str, number: int) -> str:
    """Return the key of a prompt's pair; a key that would be too long ends in a hash of itself."""
    suffix = f"-pair{number}"
    if len(key) + len(suffix) > _MAX_KEY:
        digest = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
        key = f"{key[: _MAX_KEY - len(suffix) - len(digest) - 1]}-{digest}"
    return key + suffix


def counts_table(counts: PairCounts) -> Table:
    """Return the counts for people."""
    table = Table("", "", title="Preference pairs", show_header=False)
    table.columns[1].justify = "right"
    table.add_row("prompts", str(counts.prompts))
    table.add_row("prompts with pairs", str(counts.prompts_with_pairs))
    table.add_row("responses", str(counts.responses))
    table.add_row("right responses", f"{100 * counts.right / max(1, counts.responses):.1f} %")
    table.add_row("checks that failed", str(counts.verifier_failures))
    for title, numbers in (("pairs", counts.pairs), ("dropped", counts.dropped)):
        table.add_section()
        for name in sorted(numbers):
            table.add_row(f"{title}: {name}", str(numbers[name]))
    return table


def _prompt_pairs(row: Mapping[str, Any]) -> PromptPairs:
    return PromptPairs(row["key"], [Preference(**pair) for pair in row["pairs"]], row["dropped"])


def _pairs_fingerprint(recipe: PairsRecipe) -> Fingerprint:
    """Return the settings that decide the pairs, by their sections."""
    sections = {name: getattr(recipe, name).model_dump(mode="json") for name in _DECIDING}
    sections = _without_free(sections)
    sections["run"] = {"seed": recipe.run.seed}
    sections["data"] = {"train": recipe.data.train_text, "max_tiles": recipe.data.max_tiles}
    if recipe.data.too_long is not TooLong.error:  # it decides which prompts there are, and which tiles they have
        limit = {"too_long": recipe.data.too_long.value, "max_prompt_tokens": recipe.data.max_prompt_tokens}
        sections["data"] |= limit
    sections["train"] = {"prompts_per_step": recipe.train.prompts_per_step}
    # Left out where there are none: rounds of earlier versions know nothing of them.
    del sections["reward"]["functions"]
    if recipe.reward.functions:
        sections["reward"]["functions"] = describe_functions(recipe.reward.functions)
    for section in ("model", "reward_model"):
        if sections[section]["checkpoint"]:
            sections[section]["checkpoint"] = str(resolve_checkpoint(sections[section]["checkpoint"]))
    return Fingerprint.of(**sections)


def _without_free(sections: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        section: {key: value for key, value in values.items() if key not in _FREE.get(section, ())}
        for section, values in sections.items()
    }


def _check_same(now: Fingerprint, kept: Mapping[str, dict[str, Any]], folder: Path) -> None:
    for change in now.changes_since(Fingerprint.of(**_without_free(kept))):
        if change.setting == _ROWS and None in (change.old, change.new):
            continue  # noted by an earlier version, or not looked at yet
        raise ValueError(
            f"{change.setting} is {change.new!r} but {folder} holds rounds made with {change.old!r}; put it back to go "
            "on from there, delete that folder to start again, or choose another run.output_dir"
        )


def _reasons(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(dropped.items())) or "nothing dropped"
