"""Logits of models in checkpoints of any kind, for one input."""

from __future__ import annotations

import torch

from checkpoint_tools import parts
from megatron_r1v2.checkpoint.logits import logits_of_both
from megatron_r1v2.checkpoint.sources import CheckpointSpec, HfSpec
from tests.checkpoint.damage import run
from tests.ranks import run_ranks


def compared(made, adapter) -> list[torch.Tensor | str]:
    whole, saved, other = HfSpec(made / "hf"), CheckpointSpec(made / "megatron"), HfSpec(made / "other")
    found: list[torch.Tensor | str] = [*logits_of_both(whole, saved), logits_of_both(other, whole)[0]]
    try:
        logits_of_both(whole, HfSpec(adapter, made / "hf", ("adapter",), "transformers"))
    except ValueError as error:
        found.append(str(error))
    return found


def test_one_model_has_the_same_logits_in_two_formats_and_another_model_others(made, tmp_path):
    run(parts, "export", "--checkpoint", made / "run", "--output", tmp_path / "adapter", "--quiet")
    ((one, two, other, told),) = run_ranks(1, compared, made, tmp_path / "adapter")
    assert one.shape == (1, 16 + 16, 300)
    assert torch.equal(one, two)
    assert (one - other).abs().max() > 1e-3
    assert told == "logits need a whole model, and one of the two has adapter only"
