"""A model that is loaded: what is refused at the door, what may be sampled, and the prompts that it reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_r1v2.generation.engine import Sampling
from megatron_r1v2.rewards.verifiers import VerifierPool
from megatron_r1v2.stages.loaded_model import open_model
from megatron_r1v2.types import Rollout
from tests.stages.runs import recipe_for, run_stage


def test_a_folder_whose_tokenizer_and_config_disagree_is_refused(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(root / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    config["image_token_id"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    recipe = recipe_for(root, tmp_path / "run", (f"model.hf_path={folder}",))
    with pytest.raises(ValueError, match=r"config.json says image_token_id=3; .*reassemble"), open_model(recipe):
        pass


def test_ids_that_the_tokenizer_does_not_have_are_never_sampled(root: Path, tmp_path: Path) -> None:
    with open_model(recipe_for(root, tmp_path / "run")) as loaded:
        assert loaded.sampled_vocab_size == loaded.tokenizer.vocab_size < loaded.architecture.language.vocab_size


def test_prompts_are_read_in_their_order(root: Path, tmp_path: Path) -> None:
    with open_model(recipe_for(root, tmp_path / "run")) as loaded:
        folder = loaded.recipe.data.train
        keys = [prompt.key for prompt in loaded.read_prompts(folder)]
        assert keys == [f"sample-{index:03d}" for index in range(16)]
        assert [prompt.key for prompt in loaded.read_prompts(folder, 3)] == keys[:3]
        assert {prompt.key for prompt in loaded.training_stream().next(16)} == set(keys)


def test_a_checkpoint_brings_its_parts_and_its_version(root: Path, tmp_path: Path) -> None:
    run = run_stage(recipe_for(root, tmp_path / "align", ("train.steps=2", "checkpoint.every_steps=0"), stage="align"))
    with open_model(recipe_for(root, tmp_path / "run")) as loaded:
        assert (loaded.changed_parts, loaded.version) == ([], 0)
    with open_model(recipe_for(root, tmp_path / "run", (f"model.checkpoint={run}",))) as loaded:
        assert ([part.value for part in loaded.changed_parts], loaded.version) == (["adapter"], 2)


def test_the_leader_of_a_replica_has_verifiers_and_the_engine_answers(root: Path, tmp_path: Path) -> None:
    recipe = recipe_for(root, tmp_path / "run")
    with open_model(recipe) as loaded, loaded.verifiers() as pool:
        assert isinstance(pool, VerifierPool)
        prompts = list(loaded.read_prompts(loaded.recipe.data.train, 2))
        evaluator = loaded.evaluator(loaded.engine(), pool, settings=recipe.evaluation, reward=recipe.reward)
        result = evaluator.run(prompts, name="test", step=0)
        assert result.num_prompts == 2
        longer: list[Rollout] = loaded.engine(prefix_tokens=5).generate(
            prompts,
            Sampling(num_responses=1, policy_version=0, temperature=1.0, max_response_tokens=2),
            features=loaded.feature_cache(),
        )
        assert [rollout.prompt_key for rollout in longer] == [prompt.key for prompt in prompts]
