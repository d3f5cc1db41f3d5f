"""The study's arms, order and budget, with stages that only leave what a run leaves."""

import hashlib
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from examples.digits import ablation_buffer as study_module
from examples.digits.ablation_buffer import ARMS, LEARNING_RATES, SEEDS, TUNING_SEED, BudgetSpent, Study
from examples.stages import StageRunner
from megatron_r1v2.config.load import load_recipe

ROOT = Path("runs/digits-ablations")


def recipe_checksums(stage):
    recipes = [argument for argument in stage.command if argument.endswith(".yaml")]
    return {recipe: hashlib.sha256(Path(recipe).read_bytes()).hexdigest() for recipe in recipes}


def settings_of(stage):
    return [argument for argument in stage.command if "=" in argument]


class Recorder:
    """Takes the place of the runner: each run leaves its metrics and its record, and takes 100 s."""

    def __init__(self, root, fail=""):
        self.root, self.fail = root, fail
        self.ran, self.at_once = [], []

    def run(self, *stages):
        self.run_chains([[stage] for stage in stages], at_once=1)

    def run_chains(self, chains, *, at_once):
        self.at_once.append(len(chains))
        for (stage,) in chains:
            record = self.root / "stages" / f"{stage.name}.json"
            if record.is_file():
                continue
            if stage.name == self.fail:
                raise study_module.StageError(stage.name)
            self.ran.append(stage.name)
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps({"seconds": 0.0 if "-seed-" not in stage.name else 100.0}))
            given = dict(setting.split("=", 1) for setting in settings_of(stage))
            if stage.name.startswith("buffer-") and "train.learning_rate" in given:
                self.leave_metrics(Path(given["run.output_dir"]), float(given["train.learning_rate"]))

    @staticmethod
    def leave_metrics(folder, rate):
        folder.mkdir(parents=True)
        # The middle rate is the best one.
        level = 0.9 if rate == LEARNING_RATES[1] else 0.8
        rows = [
            {
                "step": step,
                "rollout/responses": 192,
                "rollout/tokens": 4000,
                "ssb/fresh_effective_fraction": 0.25,
                "ssb/trained_effective_fraction": 0.6,
                "validation/pass_at_1": level,
            }
            for step in range(1, 7)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_arm_differs_from_its_reference_in_one_thing():
    study = Study(ROOT)
    by_name = {arm.name: arm for arm in ARMS}
    assert len(by_name) == len(ARMS) == 12
    for arm in ARMS:
        own = set(settings_of(study.stage(arm, 2e-5, 1)))
        reference = set(settings_of(study.stage(by_name[arm.reference], 2e-5, 1)))
        differing = {setting.split("=")[0] for setting in own ^ reference} - {"run.output_dir"}
        assert len(differing) == (arm.reference != arm.name), (arm.name, differing)
        assert all(name.startswith("buffer.") for name in differing)


def test_runs_have_settings_that_exist_and_folders_of_their_own():
    study = Study(ROOT, overrides=("generation.max_requests=96",))
    folders = set()
    for arm in ARMS:
        for rate in LEARNING_RATES:
            for seed in (TUNING_SEED, *SEEDS):
                stage = study.stage(arm, rate, seed)
                recipe = load_recipe(stage.command[2], settings_of(stage))
                assert (recipe.run.seed, recipe.train.learning_rate) == (seed, rate)
                assert recipe.generation.max_requests == 96
                folders.add(recipe.run.output_dir)
    assert len(folders) == len(ARMS) * len(LEARNING_RATES) * (1 + len(SEEDS))


def test_rates_are_tuned_before_the_seeds_and_comparisons_come_whole(tmp_path):
    runner = Recorder(tmp_path)
    study = Study(tmp_path)
    study_module.run_study(study, runner, arms=ARMS[:2], jobs=2, budget_hours=0)
    runs = [name for name in runner.ran if name.startswith("buffer-middle")]
    assert len(runs) == len(set(runs)) == 2 * (len(LEARNING_RATES) + len(SEEDS))
    assert all(name.endswith("seed-0") for name in runs[:6])
    assert runs[6:8] == ["buffer-middle-plain-0.00032-seed-1", "buffer-middle-0.00032-seed-1"]
    assert all("-0.00032-" in name for name in runs[6:])
    assert max(runner.at_once) == 2
    text = (tmp_path / "table-buffer.md").read_text()
    assert "| middle: buffer | 0.00032 | 5 |" in text


def test_the_budget_counts_all_calls_and_a_larger_one_goes_on(tmp_path):
    study = Study(tmp_path)
    # A run takes 100 s, two at a time: 3 pairs of runs in 300 s.
    budget = 301 / 3600
    runner = Recorder(tmp_path)
    with pytest.raises(BudgetSpent, match=r"a run takes 100 s; go on with a larger --budget-hours. Next: buffer-"):
        # Before one is measured a run is guessed to take longer.
        study_module.run_study(study, runner, arms=ARMS, jobs=2, budget_hours=400 / 3600)
    first = [name for name in runner.ran if "-seed-" in name and name.startswith("buffer-")]
    assert 2 <= len(first) < 10
    again = Recorder(tmp_path)
    with pytest.raises(BudgetSpent):
        study_module.run_study(study, again, arms=ARMS, jobs=2, budget_hours=budget)
    assert again.ran == []
    study_module.run_study(study, again, arms=ARMS[:2], jobs=2, budget_hours=0)
    assert not set(first) & set(again.ran)
    assert len(first) + len(again.ran) == 16


def test_a_failed_run_keeps_the_finished_ones(tmp_path):
    study = Study(tmp_path)
    runner = Recorder(tmp_path, fail="buffer-middle-0.00032-seed-3")
    with pytest.raises(study_module.StageError):
        study_module.run_study(study, runner, arms=ARMS[:2], jobs=2, budget_hours=0)
    again = Recorder(tmp_path)
    study_module.run_study(study, again, arms=ARMS[:2], jobs=2, budget_hours=0)
    assert again.ran[0] == "buffer-middle-0.00032-seed-3"
    assert not set(runner.ran) & set(again.ran)


def test_finished_runs_of_other_settings_are_refused(tmp_path):
    study_module.run_study(Study(tmp_path), Recorder(tmp_path), arms=ARMS[:2], jobs=2, budget_hours=0)
    runner = StageRunner(tmp_path, threads=1, console=Console(file=io.StringIO()))
    other = Study(tmp_path, steps=7)
    for stage in [*other.before_stages(), *(other.stage(arm, rate, 0) for arm in ARMS[:2] for rate in LEARNING_RATES)]:
        # As the runner itself writes it: the sizes of the runs alone have changed.
        longer = stage.name == "buffer-middle-plain-0.00016-seed-0"
        made = Study(tmp_path).stage(ARMS[0], 1.6e-4, 0) if longer else stage
        record = {"command": made.command, "recipes": recipe_checksums(made), "seconds": 1.0}
        (tmp_path / "stages" / f"{stage.name}.json").write_text(json.dumps(record))
    with pytest.raises(
        study_module.StageError, match=r"buffer-middle-plain-0.00016-seed-0 was done with another command"
    ):
        study_module.run_study(other, runner, arms=ARMS[:2], jobs=2, budget_hours=0)


def test_the_plan_says_what_is_left(tmp_path):
    study = Study(tmp_path)
    empty = study_module.plan(study, ARMS, 2)
    assert "before the arms: 16 of 16 stages are left" in empty
    assert "96 runs of 200 s, 2 at a time; 0.00 hours are spent" in empty
    assert "middle-plain, middle: 6 runs to tune, 10 of the seeds; done 0.44 hours from now" in empty
    study_module.run_study(study, Recorder(tmp_path), arms=ARMS[:2], jobs=2, budget_hours=0)
    left = study_module.plan(study, ARMS, 2)
    assert "before the arms: 0 of 16" in left
    assert "middle-plain, middle: 0 runs to tune, 0 of the seeds" in left
    assert "80 runs of 100 s" in left
