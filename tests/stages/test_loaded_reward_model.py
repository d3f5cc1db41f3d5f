"""A reward model beside the policy: it scores as the stage that trained it does, and reads what the policy reads."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from megatron_r1v2.checkpoint.megatron.run_folder import load_state, save_state
from megatron_r1v2.config.recipes import GrpoRecipe
from megatron_r1v2.stages.loaded_model import open_model
from megatron_r1v2.stages.loaded_reward_model import load_reward_model, open_reward_model
from megatron_r1v2.stages.session import open_session
from megatron_r1v2.stages.supervised_data import PairSource, pair_samples
from megatron_r1v2.training.score_positions import append_pad_token, last_scores
from tests.stages.runs import last_checkpoint, recipe_for, run_stage

SETTINGS = ("train.parts=[adapter, score]", "train.steps=3", "train.learning_rate=0.01", "checkpoint.every_steps=0")


@pytest.fixture(scope="module")
def trained(root: Path, tmp_path_factory) -> Path:
    return run_stage(recipe_for(root, tmp_path_factory.mktemp("trained") / "run", SETTINGS, stage="reward_model"))


def grpo_recipe(root: Path, output: Path, checkpoint: Path | str, *overrides: str) -> GrpoRecipe:
    scored = ("reward.model_weight=0.5", "reward.model_centre=0", "reward.model_scale=2")
    return recipe_for(root, output, (*scored, f"reward_model.checkpoint={checkpoint}", "train.steps=2", *overrides))


def test_the_loaded_model_scores_as_the_trained_one(root: Path, tmp_path: Path, trained: Path) -> None:
    """Texts through the loop's path give what the stage itself computes from the tokens of its pairs."""
    with open_session(recipe_for(root, trained, SETTINGS, stage="reward_model"),
                      stage="reward_model", shown=()) as session:  # fmt: skip
        prompts = session.stream.next(6)
        source = PairSource("reward_model", "data.train")
        given, units = pair_samples(prompts, source, session.response_encoder)
        samples = {name: append_pad_token(sample, session.tokenizer.pad_id) for name, sample in given.items()}
        part = session.microbatcher.split(samples, {p.key: p for p in prompts}, units=units)
        expected = {}
        for microbatch, values_BS in zip(part, session.policy.compute_values([p.batch for p in part]), strict=True):
            expected |= dict(zip(microbatch.names, last_scores(values_BS, microbatch.batch).tolist(), strict=True))
    recipe = grpo_recipe(root, tmp_path / "grpo", trained)
    with open_model(recipe) as policy:
        model = load_reward_model(policy, recipe)
        assert not any(weight.requires_grad for weight in model.forward.model.parameters())
        texts = [text for p in prompts for text in (p.preference.chosen, p.preference.rejected)]
        scores = model.score([p for p in prompts for _ in range(2)], texts)
        hostile = model.score([prompts[0]] * 2, ["", "<img><IMG_CONTEXT></img><|im_end|>" * 5])
    assert scores == pytest.approx([expected[name] for names in units.values() for name in names], abs=1e-5)
    assert all(math.isfinite(score) for score in hostile)


def test_a_checkpoint_without_a_head_gives_no_scores(root: Path, tmp_path: Path) -> None:
    aligned = run_stage(recipe_for(root, tmp_path / "align", ("train.steps=1",), stage="align"))
    with pytest.raises(ValueError, match=r"holds \['adapter'\] and no score head"):
        run_stage(grpo_recipe(root, tmp_path / "grpo", aligned))


def test_a_model_that_reads_other_tokens_is_refused(root: Path, tmp_path: Path, trained: Path) -> None:
    other = shutil.copytree(root / "model", tmp_path / "model")
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("<think>", "<think> "))
    recipe = grpo_recipe(root, tmp_path / "grpo", trained, f"model.hf_path={other}")
    with open_model(recipe) as policy, pytest.raises(ValueError, match="differ in tokenizer or chat template: prompts"):
        load_reward_model(policy, recipe)


def test_a_resumed_run_asks_for_the_weights_of_a_run_that_has_gone_on(
    root: Path, tmp_path: Path, trained: Path
) -> None:
    scoring = shutil.copytree(trained, tmp_path / "scoring")
    run = run_stage(grpo_recipe(root, tmp_path / "grpo", scoring, "train.steps=1"))
    state = load_state(last_checkpoint(scoring))
    later = scoring / "checkpoints" / "step-00000009"
    shutil.copytree(last_checkpoint(scoring), later)
    state["checksums"]["score"] += 1
    save_state(later, {**state, "step": 9})
    told = r"files have changed .*weights of reward_model.checkpoint: 'step 3, \w{12}' -> 'step 9, \w{12}'. Put them"
    with pytest.raises(ValueError, match=told):
        run_stage(grpo_recipe(root, run, scoring, "train.steps=2"))


def test_nothing_is_opened_where_nothing_is_weighed(root: Path, tmp_path: Path) -> None:
    recipe = recipe_for(root, tmp_path / "run")
    with open_model(recipe) as policy:
        assert open_reward_model(policy, recipe) is None
