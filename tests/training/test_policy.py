"""One optimizer step: what it returns and moves, and that a step which must not be taken changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_r1v2.resilience.skipped_updates import MAX_IN_A_ROW
from megatron_r1v2.rl.supervised import supervised_loss
from megatron_r1v2.stages.grpo import rollouts
from megatron_r1v2.stages.grpo.stage import GrpoStage
from megatron_r1v2.stages.session import Session, open_session
from megatron_r1v2.training.batches import with_old_log_probs
from megatron_r1v2.training.policy import LossFunction, add_pairs, combine, is_finite
from megatron_r1v2.types import TrainingBatch
from tests.stages.runs import recipe_for
from tests.stages.tiny_run import tiny_recipe

SKIPS = ("train.skip_above_grad_norm=1e-6",)


@pytest.fixture
def session(root: Path, tmp_path: Path) -> Iterator[Session]:
    with open_session(recipe_for(root, tmp_path / "run"), stage="align", shown=()) as opened:
        yield opened


def batches_of(session: Session) -> list[TrainingBatch]:
    """Return two microbatches of reference responses."""
    prompts = session.next_prompts()[:4]
    samples = {prompt.key: session.response_encoder.sample(prompt, prompt.response or "") for prompt in prompts}
    by_key = {prompt.key: prompt for prompt in prompts}
    names = list(samples)
    halves = [{name: samples[name] for name in part} for part in (names[:3], names[3:])]
    return [part.batch for half in halves for part in session.microbatcher.split(half, by_key)]


def negative_log_likelihood(batches: list[TrainingBatch]) -> LossFunction:
    tokens = float(sum(batch.response_mask_BS.sum() for batch in batches))
    return lambda values_BS, batch: supervised_loss(
        values_BS, batch.response_mask_BS, denominator=tokens, weights_B=batch.weights_B
    )


def weights_of(session: Session) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in session.model.named_parameters()}


def test_an_update_returns_its_loss_and_the_log_probs_before_it(session: Session) -> None:
    batches = batches_of(session)
    before, expected = weights_of(session), session.policy.compute_log_probs(batches)
    session.policy.skipped.in_a_row = 1
    result = session.policy.update(batches, negative_log_likelihood(batches))
    assert (result.applied, result.reason, session.policy.version) == (True, None, 1)
    assert session.policy.skipped.in_a_row == 0, "an applied update ends the row"
    tokens = sum(batch.response_mask_BS.sum() for batch in batches)
    assert result.loss == pytest.approx(float(-sum(values_BS.sum() for values_BS in expected) / tokens), rel=1e-5)
    assert result.metrics["actor/nll"] == pytest.approx(result.loss, rel=1e-5)
    assert result.gradient_norm > 0
    assert len(result.log_probs) == len(batches) == 2
    for ours, theirs in zip(result.log_probs, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert not ours.requires_grad
    assert result.logged().keys() >= {"actor/loss", "actor/grad_norm", "actor/nll"}
    moved = {
        name.split(".")[0] for name, weight in weights_of(session).items() if not torch.equal(weight, before[name])
    }
    assert moved == {"adapter"}
    again = session.policy.update(batches, negative_log_likelihood(batches))
    assert again.loss is not None
    assert again.loss < result.loss


def test_an_update_above_the_bound_is_not_applied(root: Path, tmp_path: Path) -> None:
    with open_session(recipe_for(root, tmp_path / "run", SKIPS), stage="align", shown=()) as session:
        before, batches = weights_of(session), batches_of(session)
        loss = negative_log_likelihood(batches)
        result = session.policy.update(batches, loss)
        assert not result.applied
        assert "above train.skip_above_grad_norm" in (result.reason or "")
        assert (result.loss, result.logged(), session.policy.version) == (None, {}, 0)
        assert result.finite, "too large, not broken: the log-probs are worth keeping"
        assert len(result.log_probs) == len(batches), "they were computed"
        assert all(torch.equal(weight, before[name]) for name, weight in weights_of(session).items())
        assert session.policy.skipped.in_a_row == 1


def test_log_probs_are_looked_at_before_the_weights_move(session: Session) -> None:
    before, batches = weights_of(session), batches_of(session)
    expected = session.policy.compute_log_probs(batches)

    def refuse(log_probs: Sequence[torch.Tensor]) -> None:
        for ours, theirs in zip(log_probs, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        raise ValueError("seen")

    with pytest.raises(ValueError, match="seen"):
        session.policy.update(batches, negative_log_likelihood(batches), before_step=refuse)
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(session).items())
    assert (session.policy.version, session.policy.skipped.in_a_row) == (0, 0)
    session.policy.temperature = float("nan")
    result = session.policy.update(batches, negative_log_likelihood(batches), before_step=refuse)
    assert (result.finite, result.reason) == (False, "a log-prob of the training forward is not finite")
    assert session.policy.skipped.in_a_row == 1, "one record of a skip"
    assert len(list(session.policy.skipped.folder.iterdir())) == 1
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(session).items())


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_log_probs_that_are_not_finite_skip_the_update(session: Session, value: float) -> None:
    log_probs = [torch.zeros(2, 3), torch.full((1, 4), value)]
    assert session.policy.skip_update_if_not_finite([], log_probs) is (value != 0.0)
    assert session.policy.skipped.in_a_row == int(value != 0.0)


def test_sums_add_up_by_name(session: Session) -> None:
    parts = [{"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([5.0, 6.0])}]
    for added in (add_pairs(parts), combine(parts, session.context)):
        assert {name: pair.tolist() for name, pair in added.items()} == {"a": [4.0, 6.0], "b": [5.0, 6.0]}
        assert all(pair.dtype == torch.float64 for pair in added.values())


def take_steps(stage: GrpoStage, count: int) -> None:
    """Take steps; some may have nothing to train on."""
    for _ in range(count):
        stage.step()


def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = tiny_recipe(tmp_path)
    # It would find the NaN first.
    monkeypatch.setattr(rollouts, "check_engine", lambda *_, **__: {})
    # With one update the log-probs would be looked at too.
    recipe = recipe.changed(train=recipe.train.changed(updates_per_step=2))
    with open_session(recipe, stage="grpo", shown=()) as session, session.loaded.verifiers() as pool:
        stage = GrpoStage(session, recipe, pool)
        stage.step()
        computed = session.policy.features.prompts_computed
        assert computed == len(session.policy.features), "features of an image are computed once a step"
        before = {name: weight.clone() for name, weight in session.policy.model.named_parameters()}
        version = session.policy.version
        session.policy.temperature = float("nan")
        # Reaches the loss as NaN through the log-probs of the update.
        stage.updates.add_old_log_probs = lambda samples, prompts: {  # type: ignore[method-assign]
            name: with_old_log_probs(sample, torch.zeros(len(sample.token_ids))) for name, sample in samples.items()
        }
        with pytest.raises(RuntimeError, match=f"update {version + 1} was skipped, since its gradient is not finite"):
            take_steps(stage, 9)
        assert session.policy.version == version
        assert session.policy.skipped.in_a_row == MAX_IN_A_ROW
        first, *_ = sorted((Path(recipe.run.output_dir) / "skipped").iterdir())
        kept = torch.load(first, weights_only=True)
        assert kept["version"] == version
        assert all(batch["token_ids_BS"].dtype == torch.int64 for batch in kept["batches"])
        for name, weight in session.policy.model.named_parameters():
            assert torch.equal(weight, before[name])


class LargestResult(TorchDispatchMode):
    """Keeps the size of the largest tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 517, 999])
def test_a_value_that_is_not_finite_is_found_without_a_copy_of_the_gradients(value: float, place: int) -> None:
    values = torch.linspace(-1e38, 1e38, 1000)
    values[place] = value
    with LargestResult() as largest:
        assert is_finite(values) == (value == 0.0)
    assert largest.elements == 1
