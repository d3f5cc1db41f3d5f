"""Pairs on disk: rounds of one set of settings only, counts that add up, samples with all that their prompt has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_r1v2.config.recipes import PairsRecipe
from megatron_r1v2.data.samples import ShardSample, parse_sample
from megatron_r1v2.data.stream import read_shards
from megatron_r1v2.data.survey import DataSurvey
from megatron_r1v2.stages.pair_shards import (
    PairCounts,
    PromptPairs,
    UnfinishedPairs,
    count_pairs,
    counts_table,
    expand_pairs,
    pair_key,
)
from megatron_r1v2.types import Preference
from tests.stages.runs import recipe_for
from tests.tiny import tiny_sample

GOOD = Preference("good", "bad", 0.5, "margin")


def recipe(root: Path, folder: Path, *overrides: str) -> PairsRecipe:
    return recipe_for(root, folder / "pairs", overrides, stage="pairs")


def test_counts_of_rounds_add_up() -> None:
    found = [PromptPairs("a", [GOOD, GOOD], {"pair/x": 1}), PromptPairs("b", [], {"pair/x": 2, "prompt/y": 1})]
    counts = count_pairs(found, responses=8, right=3, verifier_failures=1)
    assert counts == PairCounts(2, 1, 8, 3, 1, {"margin": 2}, {"pair/x": 3, "prompt/y": 1})
    other = PairCounts(prompts=1, responses=4, pairs={"margin": 1, "correctness": 2}, dropped={"prompt/y": 5})
    assert counts + other == PairCounts(3, 1, 12, 3, 1, {"margin": 3, "correctness": 2}, {"pair/x": 3, "prompt/y": 6})
    cells = [str(cell) for column in counts_table(counts).columns for cell in column.cells]
    assert {"37.5 %", "dropped: pair/x", "pairs: margin"} <= set(cells)


def test_finished_rounds_become_shards(root: Path, tmp_path: Path) -> None:
    unfinished = UnfinishedPairs(recipe(root, tmp_path))
    unfinished.write_round(1, [PromptPairs("sample-004", [GOOD], {})], PairCounts(prompts=1, pairs={"margin": 1}))
    unfinished.write_round(0, [PromptPairs("sample-001", [GOOD, GOOD], {})], PairCounts(1, pairs={"margin": 2}))
    assert UnfinishedPairs(recipe(root, tmp_path)).rounds() == [0, 1]
    counts = unfinished.finish(str(root / "data"), {"model": "m"})
    assert counts.pairs == {"margin": 3}
    written = list(read_shards(tmp_path / "pairs", parse_sample))
    assert [sample.key for sample in written] == ["sample-001-pair0", "sample-001-pair1", "sample-004-pair0"]
    assert json.loads((tmp_path / "pairs" / "pairs.json").read_text())["model"] == "m"
    assert not unfinished.folder.exists()


def test_rounds_of_other_settings_are_refused(root: Path, tmp_path: Path) -> None:
    kept = UnfinishedPairs(recipe(root, tmp_path))
    kept.write_round(0, [], PairCounts())
    UnfinishedPairs(recipe(root, tmp_path, "generation.max_requests=2", "generation.kv_cache_gib=0.1"))
    with pytest.raises(ValueError, match=r"pairs.max_pairs_per_prompt is 3 but .*unfinished holds rounds made with 4"):
        UnfinishedPairs(recipe(root, tmp_path, "pairs.max_pairs_per_prompt=3"))


def test_rounds_of_other_rows_are_refused(root: Path, tmp_path: Path) -> None:
    settings, rows = recipe(root, tmp_path), DataSurvey(shards={"shard-000000.tar": "1"})
    kept = UnfinishedPairs(settings)
    kept.check_rows(rows)
    kept.write_round(0, [], PairCounts())
    UnfinishedPairs(recipe(root, tmp_path, "generation.cuda_graphs=false")).check_rows(rows)
    with pytest.raises(ValueError, match=r"data.rows is '\w{12}' but .*unfinished holds rounds made with '\w{12}'"):
        UnfinishedPairs(settings).check_rows(DataSurvey(shards={"shard-000000.tar": "2"}))
    # Of an earlier version.
    file = kept.folder / "settings.json"
    values = json.loads(file.read_text())
    del values["data"]["rows"]
    values["generation"]["cuda_graphs"] = "auto"
    file.write_text(json.dumps(values))
    UnfinishedPairs(settings).check_rows(rows)


def test_rounds_of_another_reward_function_are_refused(root: Path, tmp_path: Path) -> None:
    own = tmp_path / "reward.py"
    own.write_text("def f(**_): return 1")
    settings = recipe(root, tmp_path, f"reward.functions=[{{path: {own}, name: f}}]")
    UnfinishedPairs(settings).write_round(0, [], PairCounts())
    UnfinishedPairs(settings)
    own.write_text("def f(**_): return 0")
    with pytest.raises(ValueError, match=r"reward.functions is .*unfinished holds rounds made with"):
        UnfinishedPairs(settings)
    without = UnfinishedPairs(recipe(root, tmp_path / "other"))
    without.write_round(0, [], PairCounts())
    assert "functions" not in json.loads((without.folder / "settings.json").read_text())["reward"]


def test_no_pair_at_all_is_an_error_that_says_why(root: Path, tmp_path: Path) -> None:
    kept = UnfinishedPairs(recipe(root, tmp_path))
    counts = PairCounts(prompts=1, responses=4, dropped={"prompt/all_wrong": 1})
    kept.write_round(0, [PromptPairs("sample-000", [], {"prompt/all_wrong": 1})], counts)
    with pytest.raises(ValueError, match="no preference pair came of 4 responses to 1 prompts .*all_wrong 1"):
        kept.finish(str(root / "data"), {})
    assert json.loads((kept.folder / "pairs.json").read_text())["dropped"] == {"prompt/all_wrong": 1}
    shutil.rmtree(kept.folder)


def test_pairs_find_their_samples_and_long_keys_stay_valid() -> None:
    samples = [tiny_sample(index, key="k" * 79 + str(index)) for index in range(3)]
    pair = Preference("good", "bad", 0.5, "margin")
    found = [PromptPairs(samples[0].key, [pair, pair], {}), PromptPairs(samples[2].key, [pair], {})]
    made: list[ShardSample] = list(expand_pairs(samples, found))
    assert len({sample.key for sample in made}) == 3
    assert all(len(sample.key) == 80 for sample in made)
    assert [sample.images for sample in made] == [samples[0].images, samples[0].images, samples[2].images]
    assert all(sample.unclosed_think for sample in made)
    closed = PromptPairs(samples[0].key, [Preference("a</think>b", "c</think>d", 0.5, "margin")], {})
    assert [sample.unclosed_think for sample in expand_pairs(samples, [closed])] == [False]
    assert pair_key("digits-0001", 3) == "digits-0001-pair3"
