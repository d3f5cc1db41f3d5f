from pathlib import Path

import pytest
import torch

from megatron_r1v2.stages.grpo.stage import GrpoStage
from megatron_r1v2.stages.session import open_session
from megatron_r1v2.training.batches import with_old_log_probs
from tests.stages.tiny_run import tiny_recipe


def take_steps(stage: GrpoStage, count: int) -> None:
    """Take steps; some may have nothing to train on."""
    for _ in range(count):
        stage.step()


def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path: Path):
    recipe = tiny_recipe(tmp_path)
    recipe.algorithm.gate_tokens = 0  # it would find the NaN first
    with open_session(recipe, stage="grpo", shown=()) as session, session.loaded.verifiers() as pool:
        stage = GrpoStage(session, pool)
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
        session.policy.skipped.max_in_a_row = 2
        with pytest.raises(RuntimeError, match=f"update {version + 1} was skipped, since its gradient is not finite"):
            take_steps(stage, 9)
        assert session.policy.version == version
        assert session.policy.skipped.in_a_row == 2
        first, _ = sorted((Path(recipe.run.output_dir) / "skipped").iterdir())
        kept = torch.load(first, weights_only=True)
        assert kept["version"] == version
        assert all(batch["token_ids_BS"].dtype == torch.int64 for batch in kept["batches"])
        for name, weight in session.policy.model.named_parameters():
            assert torch.equal(weight, before[name])
