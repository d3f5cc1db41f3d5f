"""Rollouts of an interrupted step: what is on the disk is what the step goes on with, and only what belongs to it."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

from megatron_r1v2.config.schema import GenerationConfig, ModelConfig, ParallelConfig
from megatron_r1v2.parallel import groups
from megatron_r1v2.resilience import rollout_cache
from megatron_r1v2.resilience.rollout_cache import RolloutCache, rollout_fingerprint
from megatron_r1v2.stages.grpo.stage import GrpoStage
from megatron_r1v2.stages.session import open_session
from megatron_r1v2.types import Prompt, Rollout
from tests.ranks import run_ranks
from tests.stages.runs import recipe_for
from tests.stages.tiny_run import write_model

PROMPTS, RESPONSES = 6, 4


def rollouts_of_first_step(root: Path, run: Path, overrides: tuple[str, ...] = ()) -> dict[tuple[str, int], Rollout]:
    """Generate and score, or take up, the first step of a run, and leave it there."""
    recipe = recipe_for(root, run, overrides)
    with open_session(recipe, stage="grpo", shown=()) as session, session.loaded.verifiers() as pool:
        _, scored = GrpoStage(session, recipe, pool).rollouts.generate_and_score()
    assert len(scored) == PROMPTS * RESPONSES
    return {(each.rollout.prompt_key, each.rollout.sample_index): each.rollout for each in scored}


def files(run: Path) -> list[Path]:
    return sorted((run / "unfinished" / "step-00000000").glob("*.pt"))


def times(run: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in files(run)}


def test_finished_rollouts_are_not_generated_again(
    root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A file is written when its prompt is generated from: one that keeps its time was not."""
    run = tmp_path / "run"
    first = rollouts_of_first_step(root, run)
    before = times(run)
    assert len(before) == PROMPTS
    for path in files(run)[:2]:
        path.unlink()
    capfd.readouterr()
    again = rollouts_of_first_step(root, run)
    assert f"step 1: rollouts of {PROMPTS - 2} of {PROMPTS} prompts are there from before" in capfd.readouterr().err
    after = times(run)
    assert [name for name in after if after[name] != before[name]] == sorted(before)[:2]
    assert {key: each.token_ids for key, each in again.items()} == {key: each.token_ids for key, each in first.items()}


def test_what_is_damaged_is_generated_again(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    first = rollouts_of_first_step(root, run)
    empty, short, flipped_first, flipped, *_ = files(run)
    os.truncate(empty, 0)
    os.truncate(short, short.stat().st_size - 1)
    for path, place in ((flipped_first, 0), (flipped, flipped.stat().st_size // 2)):
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)
    again = rollouts_of_first_step(root, run)
    for path in (empty, short, flipped_first, flipped):
        assert f"{path} is damaged: its rollouts are generated again" in caplog.text
    assert {key: each.token_ids for key, each in again.items()} == {key: each.token_ids for key, each in first.items()}


@pytest.mark.parametrize("override", ["generation.temperature=0.7", "generation.max_response_tokens=5"])
def test_what_other_settings_have_made_is_not_taken(root: Path, tmp_path: Path, override: str) -> None:
    run = tmp_path / "run"
    rollouts_of_first_step(root, run)
    before = times(run)
    again = rollouts_of_first_step(root, run, (override,))
    after = times(run)
    assert {name for name in after if after[name] == before.get(name)} == set()
    assert max(len(each.token_ids) for each in again.values()) <= (5 if "tokens" in override else 6)


def test_what_other_weights_have_made_is_not_taken(root: Path, tmp_path: Path) -> None:
    """The same settings and policy version, from a model that was made anew in the same folder."""
    for name in ("model", "data"):
        shutil.copytree(root / name, tmp_path / name)
    rollouts_of_first_step(tmp_path, tmp_path / "run")
    before = times(tmp_path / "run")
    write_model(tmp_path / "model", seed=3)
    rollouts_of_first_step(tmp_path, tmp_path / "run")
    after = times(tmp_path / "run")
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] == before[name]} == set()


def prompt(number: int, *, tile: int = 0) -> Prompt:
    tiles_TCHW = torch.full((1, 3, 2, 2), tile, dtype=torch.uint8)
    return Prompt(f"digits-{number}", (), (1, 2, number), tiles_TCHW, answer="8")


def rollouts(number: int) -> list[Rollout]:
    return [Rollout(f"digits-{number}", index, (5, 6), (-0.5, -0.25), 0, "stop") for index in range(2)]


def fingerprint(
    *,
    version: int = 3,
    weights: int = 7,
    stop_ids: tuple[int, ...] = (9, 8),
    model: ModelConfig | None = None,
    **settings: object,
):
    generation = GenerationConfig(**settings)
    return rollout_fingerprint(1, version, generation, stop_ids, {"adapter": weights}, model or ModelConfig())


def save_and_load(run: str) -> tuple[dict[str, list[Rollout]], list[str], list[str]]:
    """Save one of the prompts 0 and 1 on each of two replicas, then load three."""
    context = groups.initialize(ParallelConfig(), seed=1)
    cache = RolloutCache(Path(run), context, enabled=True)
    cache.begin_step(4, fingerprint())
    cache.save(prompt(context.data_rank), rollouts(context.data_rank))
    torch.distributed.barrier()
    cached, missing = cache.load([prompt(number) for number in range(3)])
    cache.drop_before(4)
    kept = sorted(path.name for path in Path(run, "unfinished").iterdir())
    torch.distributed.barrier()
    cache.drop_before(5)
    torch.distributed.barrier()
    assert not list(Path(run, "unfinished").iterdir())
    return cached, [each.key for each in missing], kept


def test_what_was_saved_is_dealt_out_to_the_replicas_and_deleted_with_its_step(tmp_path: Path) -> None:
    first, second = run_ranks(2, save_and_load, str(tmp_path))
    assert first == ({"digits-0": rollouts(0)}, ["digits-2"], ["step-00000004"])
    assert second == ({"digits-1": rollouts(1)}, ["digits-2"], ["step-00000004"])


def test_saving_holds_nobody_up_and_is_done_when_the_block_ends(tmp_path: Path, monkeypatch) -> None:
    context = groups.initialize(ParallelConfig(), seed=1)
    cache = RolloutCache(tmp_path, context, enabled=True)
    cache.begin_step(4, fingerprint())
    is_given, write = threading.Event(), rollout_cache.write_file

    def slow(path: Path, content: bytes) -> None:
        assert is_given.wait(60)
        write(path, content)

    monkeypatch.setattr(rollout_cache, "write_file", slow)
    prompts = [prompt(number) for number in range(3)]

    def abandon() -> None:
        with cache.saving() as save:
            for number, each in enumerate(prompts):
                save(each, rollouts(number))
            assert cache.load(prompts) == ({}, prompts), "no file is waited for"
            is_given.set()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        abandon()
    assert cache.load(prompts) == ({each.key: rollouts(number) for number, each in enumerate(prompts)}, [])
    groups.shut_down()


@pytest.mark.parametrize("is_last", [True, False])
def test_a_file_that_cannot_be_written_ends_the_phase(tmp_path: Path, monkeypatch, is_last: bool) -> None:
    context = groups.initialize(ParallelConfig(), seed=1)
    cache = RolloutCache(tmp_path, context, enabled=True)
    cache.begin_step(4, fingerprint())
    has_failed = threading.Event()

    def fail(path: Path, content: bytes) -> None:
        has_failed.set()
        raise OSError("the disk is full")

    monkeypatch.setattr(rollout_cache, "write_file", fail)
    saved = []

    def generate() -> None:
        with cache.saving() as save:
            for number in range(1 if is_last else 1000):
                save(prompt(number), rollouts(number))
                saved.append(number)
                assert has_failed.wait(60)
                time.sleep(0.01)

    with pytest.raises(OSError, match="the disk is full"):
        generate()
    assert len(saved) < 1000
    groups.shut_down()


def test_what_does_not_belong_to_the_step_is_generated_again(tmp_path: Path) -> None:
    context = groups.initialize(ParallelConfig(), seed=1)
    cache = RolloutCache(tmp_path, context, enabled=True)
    cache.begin_step(4, fingerprint())
    cache.save(prompt(0), rollouts(0))
    assert cache.load([prompt(0)]) == ({"digits-0": rollouts(0)}, [])
    assert cache.load([prompt(0, tile=1)])[0] == {}, "another picture is another prompt"
    for other in (
        fingerprint(version=4),
        fingerprint(weights=8),
        fingerprint(temperature=0.5),
        fingerprint(stop_ids=(9,)),
        fingerprint(model=ModelConfig(transformer_config={"rotary_base": 500})),
    ):
        cache.begin_step(4, other)
        assert cache.load([prompt(0)])[0] == {}
    for same in (fingerprint(max_requests=3), fingerprint(model=ModelConfig(hf_path="moved"))):
        cache.begin_step(4, same)
        assert cache.load([prompt(0)])[1] == [], "memory, speed and folders decide nothing"
    off = RolloutCache(tmp_path, context, enabled=False)
    off.begin_step(4, fingerprint())
    assert off.load([prompt(0)])[0] == {}
    groups.shut_down()
