"""A model that is loaded: what is refused at the door, what may be sampled, and the prompts that it reads."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from megatron_r1v2.checkpoint.hf.folders import read_json
from megatron_r1v2.checkpoint.manifest import MANIFEST, Manifest, write_manifest
from megatron_r1v2.checkpoint.sources import CheckpointSpec
from megatron_r1v2.data.tokenizer import ChatTokenizer
from megatron_r1v2.generation.engine import Sampling
from megatron_r1v2.resilience.files import write_json
from megatron_r1v2.rewards.verifiers import VerifierPool
from megatron_r1v2.stages.loaded_model import open_model
from megatron_r1v2.stages.session import open_session
from megatron_r1v2.types import Rollout
from tests.checkpoint.chat_reference import image_embeddings, write_chat_folder
from tests.ranks import run_ranks
from tests.stages.runs import last_checkpoint, recipe_for, run_stage


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


def test_the_gate_has_a_small_engine_that_never_captures_graphs(root: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("megatron_r1v2.generation.engine.decide_cuda_graphs", lambda wanted, *_: f"wanted: {wanted}")
    with open_model(recipe_for(root, tmp_path / "run")) as loaded:
        assert loaded.engine().without_graphs == "wanted: auto"
        gate = loaded.engine(max_requests=2)
        assert (gate.without_graphs, gate.settings.max_requests) == ("wanted: False", 2)


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


def test_a_model_is_frozen_until_a_stage_trains_parts_of_it(root: Path, tmp_path: Path) -> None:
    """Pairs, evaluate and serve take it as it is; a session unfreezes what its recipe names."""
    run = run_stage(recipe_for(root, tmp_path / "align", ("train.steps=1",), stage="align"))
    for start in ("", str(run)):
        with open_model(recipe_for(root, tmp_path / "run", (f"model.checkpoint={start}",))) as loaded:
            assert not [name for name, weight in loaded.model.named_parameters() if weight.requires_grad]
    with open_session(recipe_for(root, tmp_path / "run", stage="align"), stage="align", shown=()) as session:
        trained = {name for name, weight in session.loaded.model.named_parameters() if weight.requires_grad}
        assert {name.split(".")[0] for name in trained} == {"adapter"}


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


def test_all_ends_of_the_folder_end_a_response_and_are_said_once(root: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "model"
    shutil.copytree(root / "model", folder)
    tokenizer = ChatTokenizer(folder)
    ends = tokenizer.stop_ids(["<|im_end|>", "<|endoftext|>"])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    for given, expected in ((), ends), (("</think>",), [tokenizer.token_id("</think>"), *ends]):
        settings = (f"model.hf_path={folder}", f"generation.stop_tokens={json.dumps(given)}")
        with open_model(recipe_for(root, tmp_path / "run", settings)) as loaded:
            assert loaded.engine().stop_ids == loaded.engine(prefix_tokens=3).stop_ids == frozenset(expected)
            prompts = list(loaded.read_prompts(loaded.recipe.data.train, 2))
            sampling = Sampling(num_responses=24, policy_version=0, temperature=1.5, max_response_tokens=24)
            rollouts = loaded.engine().generate(prompts, sampling, features=loaded.feature_cache())
            assert {rollout.token_ids[-1] for rollout in rollouts if rollout.finish_reason == "stop"} == set(expected)
            assert not any(number in rollout.token_ids[:-1] for rollout in rollouts for number in expected)
        told = capsys.readouterr().out
        assert told.count("a response ends with") == 1
        assert all(f"({number})" in told for number in expected)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_folder_of_the_chat_layout_is_loaded_as_it_is(root: Path, tmp_path: Path, version: str) -> None:
    """The first pixel shuffle cannot be written in transformers' layout at all."""
    tensors = write_chat_folder(tmp_path / "chat", family="6b", version=version)
    recipe = recipe_for(root, tmp_path / "run", (f"model.hf_path={tmp_path / 'chat'}",))
    tiles_TCHW = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = image_embeddings(tensors, (tiles_TCHW / 255 - mean) / std, family="6b", version=version)
    with open_model(recipe) as loaded, torch.no_grad():
        got = loaded.model.adapt(loaded.model.encode_tiles(tiles_TCHW))
    assert float((got.reshape(expected.shape) - expected).abs().max() / expected.abs().max()) < 1e-5


def test_a_reward_function_is_checked_before_the_model_is_read(root: Path, tmp_path: Path) -> None:
    own = tmp_path / "reward.py"
    own.write_text("def near(response, answer): return 1\n")
    settings = (f"reward.functions=[{{path: {own}, name: near}}]", f"model.hf_path={tmp_path / 'nowhere'}")
    with (
        pytest.raises(ValueError, match=r"reward.functions: .*reward.py: near\(response, answer\) is called with"),
        open_model(recipe_for(root, tmp_path / "run", settings)),
    ):
        pass


def test_a_random_adapter_is_trained_by_align_and_refused_by_others(root: Path, tmp_path: Path, caplog) -> None:
    model = tmp_path / "model"
    shutil.copytree(root / "model", model)
    write_manifest(model, {"config.json": {"bytes": 1}}, random_parts=["adapter"])
    start = f"model.hf_path={model}"
    told = (
        rf"the adapter of model.hf_path='{model}' is random .* and grpo would train on noise: .*allow_random_parts=true"
    )
    with pytest.raises(ValueError, match=told), open_model(recipe_for(root, tmp_path / "run", (start,))):
        pass
    for overrides in ((start, "model.allow_random_parts=true"), (f"model.hf_path={root / 'model'}",)):
        with open_model(recipe_for(root, tmp_path / "run", overrides)):
            pass
    with open_model(recipe_for(root, tmp_path / "run", (start,), stage="evaluate")):
        assert "is random" in caplog.text
    run = run_stage(recipe_for(root, tmp_path / "align", (start, "train.steps=1"), stage="align"))
    with open_model(recipe_for(root, tmp_path / "run", (start, f"model.checkpoint={run}"))):
        pass


def test_a_random_part_of_a_checkpoint_stays_marked_until_a_stage_trains_it(root: Path, tmp_path: Path) -> None:
    first = run_stage(recipe_for(root, tmp_path / "first", ("train.steps=1",), stage="align"))
    marked = last_checkpoint(first) / MANIFEST
    write_json(marked, read_json(marked) | {"random_parts": ["adapter"]})

    def align(name: str, parts: str, steps: int) -> Path:
        settings = (f"model.checkpoint={first}", f"train.parts=[{parts}]", f"train.steps={steps}")
        return last_checkpoint(run_stage(recipe_for(root, tmp_path / name, settings, stage="align")))

    for steps in (1, 2):  # resumed too
        assert Manifest(align("language", "language", steps)).random_parts == {"adapter"}
    with (
        pytest.raises(ValueError, match="is random"),
        open_model(recipe_for(root, tmp_path / "run", (f"model.checkpoint={tmp_path / 'language'}",))),
    ):
        pass
    with CheckpointSpec(last_checkpoint(tmp_path / "language"), root / "model").open() as source:
        assert source.random_parts == {"adapter"}
    assert Manifest(align("adapter", "adapter", 1)).random_parts == frozenset()


def settings_of_determinism(root: Path, output: Path, deterministic: bool) -> tuple[object, ...]:
    with open_model(recipe_for(root, output, (f"run.deterministic={str(deterministic).lower()}",))) as loaded:
        config = loaded.model.language.config
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
            config.deterministic_mode,
            os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
            os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO"),
            os.environ.get("NCCL_ALGO"),
        )


def test_deterministic_kernels_are_asked_for_before_the_model_is_built(root: Path, tmp_path: Path) -> None:
    """In processes of their own: the switch is torch's, for the whole process."""
    (off,) = run_ranks(1, settings_of_determinism, root, tmp_path / "off", False)
    assert off == (False, False, True, False, None, None, None)
    (on,) = run_ranks(1, settings_of_determinism, root, tmp_path / "on", True)
    assert on == (True, True, False, True, ":4096:8", "0", "^NVLS")
