"""The position of a reward model's score: the response's last token."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_r1v2.types import Sample, TrainingBatch


def append_pad_token(sample: Sample, pad_id: int) -> Sample:
    """Return the sample with one more token at its end.

    Column s of a batch belongs to the step from token s to token s + 1, so the last token of a sample is no input. A
    score is read at the end-of-turn token; with a pad token behind it, which no earlier token sees, it is an input.

    Args:
        sample: ends with the end-of-turn token.
    """
    return replace(sample, token_ids=(*sample.token_ids, pad_id))


def last_scores(values_BS: torch.Tensor, batch: TrainingBatch) -> torch.Tensor:
    """Read the score of each row: float32 [B], differentiable.

    Args:
        values_BS: float32 [B, S]: of every token.
        batch: of samples with an appended pad token.
    """
    tokens = zip(batch.num_prompt_tokens_B, batch.num_response_tokens_B, strict=True)
    # The pad token makes the last column; the end-of-turn token stands before it.
    last_B = torch.tensor([prompt + response - 2 for prompt, response in tokens], device=values_BS.device)
    return values_BS.gather(1, last_B[:, None]).squeeze(1)
