"""Updates that are skipped: when, what is kept of them, and after how many the run ends."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_r1v2.config.schema import ParallelConfig
from megatron_r1v2.parallel import groups
from megatron_r1v2.resilience.skipped_updates import SkippedUpdates
from megatron_r1v2.types import Prompt, TrainingBatch


@pytest.fixture
def skipped(tmp_path: Path) -> Iterator[SkippedUpdates]:
    context = groups.initialize(ParallelConfig(), seed=1)
    yield SkippedUpdates(tmp_path / "run" / "skipped", max_gradient_norm=10.0, context=context)
    groups.shut_down()


def batch() -> TrainingBatch:
    numbers_BS = torch.arange(6).view(2, 3)
    prompt = Prompt("digits-0", (), (1, 2), torch.zeros(1, 3, 2, 2, dtype=torch.uint8), answer="8")
    return TrainingBatch(
        token_ids_BS=numbers_BS,
        position_ids_BS=numbers_BS,
        labels_BS=numbers_BS,
        response_mask_BS=numbers_BS.float(),
        image_mask_BS=numbers_BS > 2,
        tiles_TCHW=prompt.tiles_TCHW,
        tile_index=torch.tensor([0, 0]),
        image_prompts=(prompt,),
        advantages_B=torch.ones(2),
        old_log_probs_BS=numbers_BS.float(),
        rollout_log_probs_BS=numbers_BS.float(),
        replayed_B=torch.zeros(2, dtype=torch.bool),
        weights_B=torch.ones(2),
        num_prompt_tokens_B=(2, 2),
        num_response_tokens_B=(1, 1),
        num_tiles_B=(1, 1),
        rows_per_prompt=(2,),
        has_image_B=torch.ones(2, dtype=torch.bool),
    )


@pytest.mark.parametrize(
    ("finite", "norm", "reason"),
    [
        (True, 10.0, None),
        (True, None, None),
        (False, 1.0, "its gradient is not finite"),
        (True, 10.5, "its gradient norm 10.5 is above train.skip_above_grad_norm=10"),
        (True, math.nan, "its gradient norm nan is above train.skip_above_grad_norm=10"),
    ],
)
def test_an_update_is_skipped_for_a_reason(
    skipped: SkippedUpdates, finite: bool, norm: float | None, reason: str | None
) -> None:
    assert skipped.reason(finite=finite, gradient_norm=norm) == reason


def test_without_a_bound_only_what_is_not_finite_is_skipped(skipped: SkippedUpdates) -> None:
    skipped.max_gradient_norm = 0.0
    assert skipped.reason(finite=True, gradient_norm=1e30) is None
    assert skipped.reason(finite=False, gradient_norm=None) is not None


def test_the_batches_are_kept_with_the_reason(skipped: SkippedUpdates) -> None:
    skipped.add([batch(), batch()], version=4, reason="because")
    (path,) = skipped.folder.iterdir()
    assert path.name == "update-00000005-1-replica-0.pt"
    kept = torch.load(path, weights_only=True)
    assert (kept["reason"], kept["version"], len(kept["batches"])) == ("because", 4, 2)
    assert torch.equal(kept["batches"][0]["labels_BS"], batch().labels_BS)
    assert kept["batches"][0]["image_prompts"] == ["digits-0"]


def test_too_many_in_a_row_end_the_run_and_one_that_is_applied_ends_the_row(skipped: SkippedUpdates) -> None:
    skipped.add([batch()], version=4, reason="because")
    skipped.add([batch()], version=4, reason="because")
    skipped.end_row()
    skipped.add([batch()], version=5, reason="because")
    skipped.add([batch()], version=5, reason="because")
    with pytest.raises(RuntimeError, match=r"update 6 was skipped, since because; .*with it 3 in a row"):
        skipped.add([batch()], version=5, reason="because")
    assert [path.name for path in sorted(skipped.folder.iterdir())] == [
        "update-00000005-1-replica-0.pt",
        "update-00000005-2-replica-0.pt",
        "update-00000006-1-replica-0.pt",
        "update-00000006-2-replica-0.pt",
        "update-00000006-3-replica-0.pt",
    ]
