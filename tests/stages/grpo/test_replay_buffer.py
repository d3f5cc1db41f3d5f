"""The buffer of a running stage: what it keeps, what it gives to trainers, what empties it, what a checkpoint holds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_r1v2.config.schema import BufferConfig, ParallelConfig, RewardConfig
from megatron_r1v2.parallel import groups
from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.rl.sample_buffer import BufferEntry
from megatron_r1v2.stages.grpo.replay_buffer import ReplayBuffer
from megatron_r1v2.stages.resume import Restored
from tests.stages.scripted import make_prompt, make_sample, same_prompt

PROMPTS = [make_prompt(f"p{tiles}", tiles=tiles) for tiles in range(3)]
SAMPLES = {f"{prompt.key}/0/0": make_sample(prompt) for prompt in PROMPTS}


@pytest.fixture
def context() -> Iterator[ParallelContext]:
    yield groups.initialize(ParallelConfig(), seed=1)
    groups.shut_down()


def buffer_of(
    context: ParallelContext,
    *,
    enabled: bool = True,
    restored: Restored | None = None,
    reward: RewardConfig | None = None,
) -> ReplayBuffer:
    settings = BufferConfig(capacity=10 if enabled else 0)
    return ReplayBuffer(
        settings, context, reward=reward or RewardConfig(), model_weight=1.0, restored=restored or Restored()
    )


def selection_of(*fresh: str, trainer: tuple[str, ...] = ()) -> Any:
    """Return what the buffer reads of a selection: effective fresh samples, and who trains what."""
    entries = [
        BufferEntry(name, name.split("/")[0], 1.0, "image", step=0, response_length=5, effective=True) for name in fresh
    ]
    plan = SimpleNamespace(fresh=fresh)
    return SimpleNamespace(fresh_entries=entries, plan=plan, trainer=dict.fromkeys(trainer, 0))


def filled(context: ParallelContext, **arguments: Any) -> ReplayBuffer:
    buffer = buffer_of(context, **arguments)
    prompts = {prompt.key: prompt for prompt in PROMPTS}
    buffer.add(selection_of("p0/0/0", "p1/0/0"), SAMPLES, prompts, step=0)
    return buffer


def test_only_what_the_plan_calls_fresh_is_kept(context: ParallelContext) -> None:
    buffer = filled(context)
    assert buffer.samples.samples == {name: SAMPLES[name] for name in ("p0/0/0", "p1/0/0")}
    assert set(buffer.samples.prompts) == {"p0", "p1"}
    assert buffer.index is not None
    assert len(buffer.index) == 2


def test_replayed_and_fresh_samples_go_to_their_trainers(context: ParallelContext) -> None:
    buffer = filled(context)
    fresh = {"p2/1/0": make_sample(PROMPTS[2], 7)}
    selection = selection_of(trainer=("p1/0/0", "p2/1/0"))
    samples, prompts = buffer.exchange_samples(selection, fresh, PROMPTS[2:])
    assert samples == {"p1/0/0": SAMPLES["p1/0/0"], **fresh}
    assert set(prompts) == {"p1", "p2"}


def test_a_lower_weight_of_the_reward_model_empties_it(context: ParallelContext) -> None:
    buffer = filled(context)
    buffer.invalidate(1.0)
    assert len(buffer.samples.samples) == 2
    buffer.invalidate(0.5)
    assert buffer.samples.samples == buffer.samples.prompts == {}
    assert buffer.index is not None
    assert len(buffer.index) == 0
    buffer.add(selection_of("p0/0/0"), SAMPLES, {prompt.key: prompt for prompt in PROMPTS}, step=1)
    buffer.invalidate(0.8)
    assert len(buffer.samples.samples) == 1, "a higher weight spoils nothing"


def test_it_comes_back_from_a_checkpoint(context: ParallelContext) -> None:
    buffer = filled(context)
    buffer.model_weight = 0.25
    restored = Restored(buffer.state_dict(), [buffer.samples.state_dict()])
    again = buffer_of(context, restored=restored)
    assert again.state_dict() == buffer.state_dict()
    assert again.model_weight == 0.25
    assert again.samples.samples == buffer.samples.samples
    assert all(same_prompt(again.samples.prompts[key], prompt) for key, prompt in buffer.samples.prompts.items())


def test_switched_off_it_stays_empty_but_still_brings_samples(context: ParallelContext) -> None:
    buffer = filled(context, enabled=False)
    assert buffer.index is None
    assert buffer.samples.samples == {}
    assert buffer.state_dict() == {}
    buffer.invalidate(0.0)
    samples, _ = buffer.exchange_samples(selection_of(trainer=("p0/0/0",)), SAMPLES, PROMPTS)
    assert samples == {"p0/0/0": SAMPLES["p0/0/0"]}


def test_the_settings_reach_the_index(context: ParallelContext) -> None:
    settings = BufferConfig(capacity=7, max_age=3, priority_exponent=0.5)
    index = ReplayBuffer(settings, context, reward=RewardConfig(), model_weight=1.0, restored=Restored()).index
    assert index is not None
    assert (index.capacity, index.max_age, index.priority_exponent) == (7, 3, 0.5)


def test_another_reward_function_empties_it(context: ParallelContext, tmp_path: Path) -> None:
    path = tmp_path / "reward.py"
    path.write_text("def f(**_): return 1")
    reward = RewardConfig(functions=[{"path": str(path), "name": "f"}])
    for before, now, file, held in (
        (None, None, None, 2),
        (reward, reward, None, 2),
        (None, reward, None, 0),
        (reward, None, None, 0),
        (reward, reward.changed(functions=[{"path": str(path), "name": "f", "weight": 0.5}]), None, 0),
        (reward, reward, "def f(**_): return 0", 0),
    ):
        buffer = filled(context, reward=before)
        saved = Restored(json.loads(json.dumps(buffer.state_dict())), [buffer.samples.state_dict()])
        if file is not None:
            path.write_text(file)
        again = buffer_of(context, restored=saved, reward=now)
        assert again.index is not None
        assert len(again.index) == len(again.samples.samples) == held
