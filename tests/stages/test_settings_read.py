"""Each recipe has the settings that its stage reads, as a run in miniature shows, and no others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_r1v2
from megatron_r1v2.config.recipes import Recipe, ServeRecipe, every_section
from megatron_r1v2.config.schema import RewardConfig, Section
from megatron_r1v2.generation.engine import Sampling
from megatron_r1v2.stages.evaluate import run_evaluation
from megatron_r1v2.stages.loaded_model import open_model
from megatron_r1v2.stages.pairs import run_pairs
from tests.stages.runs import recipe_for, run_stage

SECTIONS = {kind: name for name, kind in every_section().items()}
# Read where a switch is on which a run in miniature leaves off; or by pydantic's name, to decide the stage.
ELSEWHERE = {
    "run.stage",
    "checkpoint.accept_changes",  # a run is resumed with other settings
    "train.tokens_per_microbatch",  # rows are packed
    "hallucination.max_margin",  # the calibrator of mpo raises it
    "reward_model.checkpoint",
    "reward_model.url",
    "reward.model_centre",
    "reward.model_scale",  # there is a reward model
    "evaluation.endpoint_url",
    "evaluation.endpoint_model",
    "evaluation.judge_model",  # the model, or a judge, is served
    "logging.wandb_project",
    "logging.wandb_entity",
    "logging.wandb_group",
    "logging.wandb_tags",  # wandb is on
}
# Read by what stages share, at the value that the stage's recipe always has.
SHARED = {
    "data.max_corrupt_fraction",  # of a data set, which a server does not have
    "train.updates_per_step",  # the schedule counts updates
    "checkpoint.keep_rollouts",  # supervised stages have none
    "reward.model_weight",
    "reward.functions",  # they are checked before a model is loaded, if there are any
}
VALIDATED = ("evaluation.every_steps=1", "train.steps=2", "train.warmup_steps=1")


class Reads:
    """The settings of one recipe that were read, also from changed copies of its sections."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.sections: list[Section] = []

    def watch(self, recipe: Recipe) -> None:
        self.sections = [getattr(recipe, name) for name in recipe.sections()]
        self.names.clear()

    def note(self, section: Section, *keys: str) -> None:
        if any(section is watched for watched in self.sections):
            self.names |= {f"{SECTIONS[type(section)]}.{key}" for key in keys}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reads]:
    """Return what is read of the recipe that it watches."""
    found = Reads()
    changed, weights = Section.changed, RewardConfig.weights.fget

    def get(self: Section, key: str) -> object:
        if type(self) in SECTIONS and key in type(self).model_fields:
            found.note(self, key)
        return object.__getattribute__(self, key)

    def change(self: Section, **settings: object) -> Section:
        copy = changed(self, **settings)
        if any(self is watched for watched in found.sections):
            found.sections.append(copy)
        return copy

    def all_weights(self: RewardConfig) -> dict[str, float]:
        found.note(self, *(f"{part}_weight" for part in weights(self)))
        return weights(self)

    monkeypatch.setattr(Section, "__getattribute__", get, raising=False)
    monkeypatch.setattr(Section, "changed", change)
    monkeypatch.setattr(RewardConfig, "weights", property(all_weights))
    return found


def check(recipe: Recipe, reads: Reads) -> None:
    own = {f"{name}.{key}" for name, keys in recipe.settings().items() for key in keys}
    assert reads.names - own - SHARED == set(), "read, and refused in a recipe"
    assert own - reads.names - ELSEWHERE == set(), "in the recipe, and never read"


def test_what_such_a_run_leaves_off_is_read_somewhere() -> None:
    package = Path(megatron_r1v2.__file__).parent
    rooms = [path.read_text() for path in package.rglob("*.py") if path.parent.name != "config"]
    for name in ELSEWHERE - {"run.stage"}:
        assert any(f".{name.rpartition('.')[2]}" in text for text in rooms), name


@pytest.mark.parametrize("stage", ["align", "mpo", "reward_model", "grpo"])
def test_a_stage_reads_its_settings(root: Path, tmp_path: Path, reads: Reads, stage: str) -> None:
    overrides = (*VALIDATED, f"data.validation={root / 'data'}")
    if stage == "mpo":
        overrides += ("hallucination.target_rate=0.9",)
    recipe = recipe_for(root, tmp_path / "run", overrides, stage=stage)
    reads.watch(recipe)
    run_stage(recipe)
    check(recipe, reads)


def test_pairs_read_their_settings(root: Path, tmp_path: Path, reads: Reads) -> None:
    overrides = ("generation.responses_per_prompt=24", "generation.max_response_tokens=8")
    recipe = recipe_for(root, tmp_path / "run", overrides, stage="pairs")
    reads.watch(recipe)
    with pytest.raises(ValueError, match="no preference pair came of 384 responses"):  # of random weights
        run_pairs(recipe)
    # What packs the rows of a reward model in process.
    reads.names |= {"train.tokens_per_microbatch", "train.packing"}
    check(recipe, reads)


def test_an_evaluation_reads_its_settings(root: Path, tmp_path: Path, reads: Reads) -> None:
    recipe = recipe_for(root, tmp_path / "run", (f"evaluation.data={root / 'data'}",), stage="evaluate")
    reads.watch(recipe)
    run_evaluation(recipe, "e")
    check(recipe, reads)


def test_what_serves_a_model_reads_its_settings(root: Path, tmp_path: Path, reads: Reads) -> None:
    whole = recipe_for(root, tmp_path / "run")
    recipe = ServeRecipe(**{name: getattr(whole, name) for name in ServeRecipe.sections()})
    reads.watch(recipe)
    with open_model(recipe) as loaded:
        prompts = list(loaded.read_prompts(str(root / "data"), 2))
        sampling = Sampling(num_responses=1, policy_version=loaded.version, max_response_tokens=4, temperature=0.0)
        loaded.engine().generate(prompts, sampling, features=loaded.feature_cache())
    # The server's own: where a request does not say, and how many may wait.
    reads.names |= {"generation.temperature", "generation.max_response_tokens"}
    check(recipe, reads)
