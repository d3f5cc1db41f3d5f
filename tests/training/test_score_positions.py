"""A score is read at the end-of-turn token, which must be an input for that."""

import torch

from megatron_r1v2.training.batches import RowFormat, collate, response_sample
from megatron_r1v2.training.score_positions import append_pad_token, last_scores
from tests.stages.scripted import IMAGE_TOKEN, make_prompt

END, PAD = 77, 99
PROMPT = make_prompt("p", tiles=1)


def test_the_pad_token_makes_the_end_token_an_input():
    sample = append_pad_token(response_sample(PROMPT, (5, END)), PAD)
    assert sample.token_ids == (*PROMPT.token_ids, 5, END, PAD)
    assert sample.prompt_length == len(PROMPT.token_ids)


def test_each_row_is_read_at_its_end_token():
    samples = [append_pad_token(response_sample(PROMPT, (*words, END)), PAD) for words in ((1, 2, 3), (), (4,))]
    rows = RowFormat(PAD, IMAGE_TOKEN, tensor_size=1, device=torch.device("cpu"))
    batch = collate(samples, {PROMPT.key: PROMPT}, rows)
    values_BS = torch.randn(batch.token_ids_BS.shape, requires_grad=True)
    scores_B = last_scores(values_BS, batch)
    is_end_BS = batch.token_ids_BS == END
    assert torch.equal(scores_B, values_BS[is_end_BS])
    scores_B.sum().backward()
    assert torch.equal(values_BS.grad, is_end_BS.float())
