"""The training phase: old log-probs of fresh samples, the loss of a microbatch, and the metrics of several updates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_r1v2.config.choices import LossAggregation
from megatron_r1v2.config.schema import AlgorithmConfig
from megatron_r1v2.stages.grpo.updates import UpdatePhase, batch_loss, entropy_metrics, mean_of_updates
from megatron_r1v2.stages.session import Session, open_session
from megatron_r1v2.training.batches import RowFormat, collate, response_sample
from megatron_r1v2.types import Prompt, RLTargets, Sample, TrainingBatch
from tests.stages.runs import recipe_for
from tests.stages.scripted import IMAGE_TOKEN, make_prompt, make_sample


def test_metrics_of_updates_are_averaged_over_those_that_have_them() -> None:
    assert mean_of_updates([{"a": 1.0, "b": 4.0}, {"a": 3.0}]) == {"a": 2.0, "b": 4.0}
    assert mean_of_updates([]) == {}


@pytest.fixture
def session(root: Path, tmp_path: Path) -> Iterator[Session]:
    with open_session(recipe_for(root, tmp_path / "run"), stage="grpo", shown=()) as opened:
        yield opened


def phase_of(session: Session) -> UpdatePhase:
    return UpdatePhase(
        session.policy,
        session.microbatcher,
        settings=session.recipe.algorithm,
        aggregation=LossAggregation.sequence,
        reference=session.reference,
        recorder=session.recorder,
    )


def samples_of(session: Session, old: tuple[float, ...]) -> tuple[dict[str, Sample], dict[str, Prompt]]:
    """Return a fresh and an old sample of two prompts, the engine's log-probs those of the training forward."""
    prompts = session.next_prompts()[:2]
    samples = {}
    for index, prompt in enumerate(prompts):
        encoded = session.response_encoder.sample(prompt, "left 3, ")
        targets = RLTargets((0.0, 0.0), 1.0 - 2 * index, 1.0, 0, group_effective=True)
        samples[f"s{index}"] = replace(encoded, rl=targets)
    by_key = {prompt.key: prompt for prompt in prompts}
    (microbatch,) = session.microbatcher.split(samples, by_key)
    (log_probs_BS,) = session.policy.compute_log_probs([microbatch.batch])
    for row, name in enumerate(microbatch.names):
        exact = tuple(log_probs_BS[row, samples[name].response_columns].tolist())
        rl = samples[name].rl
        assert rl is not None
        samples[name] = replace(samples[name], rl=replace(rl, rollout_log_probs=exact))
    last = samples["s1"].rl
    assert last is not None
    samples["s1"] = replace(samples["s1"], rl=replace(last, old_log_probs=old))
    return samples, by_key


def test_fresh_samples_get_old_log_probs_and_replayed_ones_keep_theirs(session: Session) -> None:
    samples, prompts = samples_of(session, old=(-7.0, -8.0))
    result = phase_of(session).add_old_log_probs(samples, prompts)
    assert result is not None
    fresh, replayed = result["s0"].rl, result["s1"].rl
    assert fresh is not None
    assert fresh.old_log_probs == pytest.approx(fresh.rollout_log_probs, abs=1e-5)
    assert replayed is not None
    assert replayed.old_log_probs == (-7.0, -8.0)
    assert session.recorder.values["rollout_corr/log_prob_abs_diff"] == pytest.approx(0, abs=1e-5)


def test_an_engine_that_computed_something_else_ends_the_step(session: Session) -> None:
    samples, prompts = samples_of(session, old=())
    rl = samples["s0"].rl
    assert rl is not None
    samples["s0"] = replace(samples["s0"], rl=replace(rl, rollout_log_probs=(-30.0, -30.0)))
    with pytest.raises(ValueError, match="above algorithm.max_log_prob_difference"):
        phase_of(session).add_old_log_probs(samples, prompts)


def test_log_probs_that_are_not_finite_give_no_samples(session: Session) -> None:
    samples, prompts = samples_of(session, old=())
    session.policy.temperature = float("nan")
    assert phase_of(session).add_old_log_probs(samples, prompts) is None
    assert session.recorder.values["actor/skipped_updates"] == 1.0
    assert session.policy.skipped.in_a_row == 1


@pytest.mark.parametrize("updates", [(("s0", "s1"),), (("s0",), ("s1",)), (("s0",), ("trained elsewhere",))])
def test_each_part_of_the_selection_is_an_optimizer_step(
    session: Session, updates: tuple[tuple[str, ...], ...]
) -> None:
    """A rank that has no sample of a part takes the step with a filler of weight zero."""
    samples, prompts = samples_of(session, old=(-1.0, -1.0))
    phase = phase_of(session)
    trained = phase.add_old_log_probs(samples, prompts)
    assert trained is not None
    selection: Any = SimpleNamespace(updates=updates, plan=SimpleNamespace(replayed=("s1",)), denominator=2.0)
    phase.take_updates(selection, trained, prompts, filler=next(iter(prompts.values())))
    assert session.policy.version == len(updates)
    values = session.recorder.values
    assert (values["actor/updates"], values["actor/skipped_updates"]) == (len(updates), 0.0)
    assert values["actor/lr"] == pytest.approx(1e-3)
    assert values["actor/grad_norm"] > 0


def only_update(*replayed: str) -> Any:
    plan = SimpleNamespace(replayed=replayed)
    return SimpleNamespace(updates=(("s0", "s1"),), plan=plan, denominator=2.0)


def weights_of(session: Session) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in session.model.named_parameters()}


def test_an_only_update_gives_the_old_log_probs_of_fresh_samples(session: Session) -> None:
    samples, prompts = samples_of(session, old=(-1.0, -1.0))
    phase, filler = phase_of(session), next(iter(prompts.values()))
    expected = phase.add_old_log_probs(samples, prompts)
    assert expected is not None
    mismatch = session.recorder.values.pop("rollout_corr/log_prob_abs_diff")
    trained = phase.take_updates(only_update("s1"), samples, prompts, filler=filler)
    assert trained is not None
    ours, theirs = trained["s0"].rl, expected["s0"].rl
    assert ours is not None
    assert theirs is not None
    assert ours.old_log_probs == pytest.approx(theirs.old_log_probs, abs=1e-6), "by the weights before the step"
    assert trained["s1"] == samples["s1"], "what is replayed keeps its own"
    assert session.recorder.values["rollout_corr/log_prob_abs_diff"] == pytest.approx(mismatch, abs=1e-6)
    assert session.recorder.values["actor/updates"] == 1


def test_an_engine_that_computed_something_else_ends_the_only_update_before_the_step(session: Session) -> None:
    samples, prompts = samples_of(session, old=(-1.0, -1.0))
    rl = samples["s0"].rl
    assert rl is not None
    samples["s0"] = replace(samples["s0"], rl=replace(rl, rollout_log_probs=(-30.0, -30.0)))
    before = weights_of(session)
    phase, filler = phase_of(session), next(iter(prompts.values()))
    with pytest.raises(ValueError, match="above algorithm.max_log_prob_difference"):
        phase.take_updates(only_update("s1"), samples, prompts, filler=filler)
    assert session.policy.version == 0
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(session).items())


def test_an_only_update_of_broken_numbers_gives_no_samples(session: Session) -> None:
    samples, prompts = samples_of(session, old=(-1.0, -1.0))
    session.policy.temperature = float("nan")
    phase, filler = phase_of(session), next(iter(prompts.values()))
    assert phase.take_updates(only_update("s1"), samples, prompts, filler=filler) is None
    assert session.recorder.values["actor/skipped_updates"] == 1.0
    assert (session.policy.version, session.policy.skipped.in_a_row) == (0, 1)


def test_an_only_update_above_the_bound_gives_its_samples(session: Session) -> None:
    samples, prompts = samples_of(session, old=(-1.0, -1.0))
    session.policy.skipped.max_gradient_norm = 1e-9
    phase, filler = phase_of(session), next(iter(prompts.values()))
    trained = phase.take_updates(only_update("s1"), samples, prompts, filler=filler)
    assert trained is not None
    assert all(sample.rl is not None and not sample.rl.is_fresh for sample in trained.values())
    assert session.policy.version == 0


def batch_of(*samples: Sample) -> TrainingBatch:
    rows = RowFormat(99, IMAGE_TOKEN, tensor_size=1, device=torch.device("cpu"))
    return collate(samples, {PROMPT.key: PROMPT}, rows)


PROMPT = make_prompt("p", tiles=0)


@pytest.mark.parametrize(("cap", "factor"), [(0.0, 1.0), (2.0, 1.0), (0.25, 0.25)])
def test_the_loss_of_a_row_by_hand(cap: float, factor: float) -> None:
    """Ratio 1 and engine log-probs like the old ones: -advantage / denominator, times the truncated weight."""
    targets = RLTargets((-1.0, -2.0), 3.0, 1.0, 0, group_effective=True, old_log_probs=(-1.0, -2.0))
    batch = batch_of(response_sample(PROMPT, (5, 6), rl=targets))
    log_probs_BS = batch.old_log_probs_BS.clone().requires_grad_()
    loss, _ = batch_loss(
        log_probs_BS, batch, algorithm=AlgorithmConfig(importance_cap=cap), aggregation="sequence", denominator=4.0
    )
    assert loss.item() == pytest.approx(-3.0 * factor / 4)
    loss.backward()
    gradient_BS = log_probs_BS.grad
    assert gradient_BS is not None
    assert (gradient_BS[batch.response_mask_BS.bool()] < 0).all(), "a good response becomes likelier"
    assert not gradient_BS[~batch.response_mask_BS.bool()].any()


def test_fresh_rows_of_an_only_update_have_a_ratio_of_one() -> None:
    """Their old log-probs are their own; the replayed row keeps its stored ones, here e times less likely."""
    targets = RLTargets((-1.0, -2.0), 3.0, 1.0, 0, group_effective=True, old_log_probs=(-1.0, -2.0))
    fresh = response_sample(PROMPT, (5, 6), rl=replace(targets, old_log_probs=()))
    replayed = response_sample(PROMPT, (5, 6), index=1, rl=targets)
    batch = replace(batch_of(fresh, replayed), replayed_B=torch.tensor([False, True]))
    log_probs_BS = (batch.old_log_probs_BS.nan_to_num(-1.0) + batch.response_mask_BS).requires_grad_()
    _, metrics = batch_loss(log_probs_BS, batch, algorithm=AlgorithmConfig(), aggregation="sequence", denominator=4.0)
    assert metrics["actor/ratio_mean"].tolist() == pytest.approx([2 + 2 * 2.7182818, 4.0])
    assert metrics["ssb/ratio_mean_replayed"].tolist() == pytest.approx([2 * 2.7182818, 2.0])


def test_the_entropy_of_a_microbatch_is_that_of_its_response_tokens_by_modality() -> None:
    targets = RLTargets((-1.0, -2.0), 3.0, 1.0, 0, group_effective=True, old_log_probs=(-1.0, -2.0))
    batch = batch_of(*(response_sample(PROMPT, (5, 6), index=index, rl=targets) for index in range(3)))
    values_B1 = torch.tensor([[1.0], [3.0], [9.0]])
    batch = replace(
        batch,
        entropy_BS=torch.where(batch.response_mask_BS.bool(), values_B1, float("nan")),
        has_image_B=torch.tensor([True, False, False]),
        weights_B=torch.tensor([1.0, 1.0, 0.0]),  # the last one is a filler
    )
    pairs = {name: pair.tolist() for name, pair in entropy_metrics(batch).items()}
    assert pairs == {"actor/entropy": [8.0, 4.0], "actor/entropy_image": [2.0, 2.0], "actor/entropy_text": [6.0, 2.0]}
    assert entropy_metrics(replace(batch, entropy_BS=None)) == {}


def test_an_update_measures_the_entropy_of_the_policy(session: Session) -> None:
    samples, prompts = samples_of(session, old=(-1.0, -1.0))
    phase_of(session).take_updates(only_update("s1"), samples, prompts, filler=next(iter(prompts.values())))
    # An untrained model is near the uniform distribution.
    most = math.log(session.policy.vocab_size)
    assert 0.5 * most < session.recorder.values["actor/entropy"] <= most


def test_each_token_is_weighed_against_its_own_segment() -> None:
    """The first token is of an earlier segment, e times less likely then; the second was sampled with these weights."""
    targets = RLTargets((-1.0, -2.0), 3.0, 1.0, 0, group_effective=True, old_log_probs=(-1.0,))
    batch = batch_of(response_sample(PROMPT, (5, 6), rl=targets))
    log_probs_BS = batch.old_log_probs_BS.nan_to_num(-5.0)
    log_probs_BS[batch.old_log_probs_BS == -1.0] = 0.0
    log_probs_BS.requires_grad_()
    settings = AlgorithmConfig(clip_high=10.0)
    loss, metrics = batch_loss(log_probs_BS, batch, algorithm=settings, aggregation="sequence", denominator=1.0)
    assert metrics["actor/ratio_mean"].tolist() == pytest.approx([1 + 2.7182818, 2.0])
    assert loss.item() == pytest.approx(-3.0 * (1 + 2.7182818) / 2)


def test_a_filler_has_no_loss() -> None:
    batch = replace(batch_of(make_sample(PROMPT)), weights_B=torch.zeros(1))
    loss, _ = batch_loss(
        batch.old_log_probs_BS, batch, algorithm=AlgorithmConfig(), aggregation="sequence", denominator=4.0
    )
    assert loss.item() == 0.0
