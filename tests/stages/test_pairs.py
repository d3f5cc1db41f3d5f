"""The pairs command on a random model: its shards, its counts, and going on after an interruption."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_r1v2.config.recipes import PairsRecipe
from megatron_r1v2.config.validate import start_mistakes
from megatron_r1v2.data.samples import parse_sample
from megatron_r1v2.data.shards import write_shards
from megatron_r1v2.data.stream import read_shards
from megatron_r1v2.data.tokenizer import ChatTokenizer
from megatron_r1v2.stages.pair_shards import PairCounts, PromptPairs, UnfinishedPairs
from megatron_r1v2.stages.pairs import run_pairs
from megatron_r1v2.types import Preference
from tests.ranks import run_ranks
from tests.stages.runs import recipe_for, run_stage

SETTINGS = (
    "generation.responses_per_prompt=24",
    "pairs.dropout_ntp_fraction=1.0",
    "pairs.max_pairs_per_prompt=2",
    "generation.max_response_tokens=8",
)


@pytest.fixture(scope="module")
def made(root: Path, tmp_path_factory) -> Path:
    """Return the pairs of one uninterrupted run."""
    folder = tmp_path_factory.mktemp("pairs")
    learn = ("train.steps=12", "train.learning_rate=0.01", "checkpoint.every_steps=0", "train.parts=[language]")
    run_stage(recipe_for(root, root / "aligned", learn, stage="align"))
    return run_pairs(recipe(root, folder))


def recipe(root: Path, folder: Path, *overrides: str) -> PairsRecipe:
    return recipe_for(
        root,
        folder / "pairs",
        (*SETTINGS, f"model.checkpoint={root / 'aligned'}", *overrides),
        stage="pairs",
    )


def test_pairs_are_the_prompts_with_two_responses(root: Path, made: Path) -> None:
    sources = {sample.key: sample for sample in read_shards(root / "data", parse_sample)}
    pairs = list(read_shards(made, parse_sample))
    tokenizer = ChatTokenizer(root / "model")
    assert {pair.source for pair in pairs} == {"correctness", "dropout_ntp"}
    for pair in pairs:
        source = sources[pair.key.rpartition("-pair")[0]]
        for name in ("messages", "answer", "answer_type", "facts", "images", "response"):
            assert getattr(pair, name) == getattr(source, name)
        assert pair.chosen.endswith(f"</think>\\boxed{{{source.answer}}}")
        assert pair.rejected != pair.chosen
        assert "<|im_end|>" not in pair.chosen + pair.rejected
        assert pair.margin == pytest.approx(1.0)  # both are well-formed, one is right
        if pair.source == "dropout_ntp":
            assert pair.images
            half = tokenizer.encode_response(pair.chosen, "<|im_end|>")[:-1]
            assert pair.rejected.startswith(tokenizer.decode(half[: len(half) // 2]))


def test_the_counts_add_up(made: Path) -> None:
    counts = json.loads((made / "pairs.json").read_text())
    keys = [sample.key for sample in read_shards(made, parse_sample)]
    assert (counts["prompts"], counts["responses"]) == (16, 16 * 24)
    assert sum(counts["pairs"].values()) == len(keys)
    assert counts["prompts_with_pairs"] == len({key.rpartition("-pair")[0] for key in keys})
    dropped = counts["dropped"]
    assert {"response/duplicate", "response/ill_formed"} <= dropped.keys()
    assert all(count > 0 for count in dropped.values())
    assert counts["policy_version"] == 12
    assert not list(made.parent.glob(".*"))


def test_an_interrupted_command_goes_on_and_ends_with_the_same_files(
    root: Path, made: Path, tmp_path: Path, capsys
) -> None:
    settings = recipe(root, tmp_path)
    kept = UnfinishedPairs(settings)
    run_pairs(recipe(root, tmp_path, f"run.output_dir={tmp_path / 'other'}"))
    assert "response/duplicate" in capsys.readouterr().out
    # A round on disk is not done again: this one says that its prompts gave one pair that nothing else would give.
    first = [PromptPairs("sample-000", [Preference("good", "bad", 0.5, "correctness")], {})]
    kept.write_round(0, first, PairCounts(prompts=6, prompts_with_pairs=1, pairs={"correctness": 1}))
    (kept.folder / "shards").mkdir()  # as when the writing of shards was interrupted
    run_pairs(settings)
    whole = list(read_shards(tmp_path / "other", parse_sample))
    assert whole == list(read_shards(made, parse_sample))
    resumed = list(read_shards(tmp_path / "pairs", parse_sample))
    assert (resumed[0].key, resumed[0].chosen) == ("sample-000-pair0", "good")
    assert resumed[1:] == [sample for sample in whole if sample.key >= "sample-006"]
    assert any("exists already" in mistake for mistake in start_mistakes(settings))


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), ("parallel.tensor=2",)])
def test_pairs_do_not_depend_on_the_layout(root: Path, made: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    run_ranks(2, _write_pairs, str(root), str(tmp_path), overrides)
    assert list(read_shards(tmp_path / "pairs", parse_sample)) == list(read_shards(made, parse_sample))


def _write_pairs(root: str, folder: str, overrides: tuple[str, ...]) -> None:
    run_pairs(recipe(Path(root), Path(folder), *overrides))


def test_pairs_are_built_again_from_the_model_that_learnt_from_them(root: Path, made: Path, tmp_path: Path) -> None:
    """Iterative MPO: pairs, mpo, pairs with the new model."""
    settings = ("train.steps=2", "train.prompts_per_step=2", "train.parts=[language]", "checkpoint.every_steps=0")
    start = f"model.checkpoint={root / 'aligned'}"
    first = run_stage(recipe_for(root, tmp_path / "mpo-1", (*settings, start, f"data.train={made}"), stage="mpo"))
    again = run_pairs(recipe(root, tmp_path / "round-2", f"model.checkpoint={first}"))
    counts = [json.loads((folder / "pairs.json").read_text()) for folder in (made, again)]
    assert [count["policy_version"] for count in counts] == [12, 2]
    assert counts[1]["model"] == str(first)
    second = run_stage(
        recipe_for(
            root, tmp_path / "mpo-2", (*settings, f"model.checkpoint={first}", f"data.train={again}"), stage="mpo"
        )
    )
    references = [{path.name for path in (run / "reference").glob("*.jsonl")} for run in (first, second)]
    assert references[0].isdisjoint(references[1])


@pytest.mark.usefixtures("made")
def test_pairs_without_answers_are_by_the_margin_of_own_functions(root: Path, tmp_path: Path) -> None:
    samples = [replace(sample, answer="") for sample in read_shards(root / "data", parse_sample)]
    write_shards(samples, tmp_path / "data")
    own = tmp_path / "reward.py"
    own.write_text("def one(response, **_): return float(response.endswith('{1}'))\n")
    settings = (f"data.train={tmp_path / 'data'}", f"reward.functions=[{{path: {own}, name: one}}]")
    run_pairs(recipe(root, tmp_path, *settings, "pairs.dropout_ntp_fraction=0"))
    pairs = list(read_shards(tmp_path / "pairs", parse_sample))
    assert {pair.source for pair in pairs} == {"margin"}
    assert all(pair.chosen.endswith("{1}") and not pair.rejected.endswith("{1}") for pair in pairs)
