"""torch's generators go on where they were saved; a rank that is new starts with its own."""

import logging
import random

import torch

from megatron_r1v2.training.random_states import random_states, restore_random_states


def test_the_next_draw_is_the_same_after_a_restore(tmp_path):
    path = tmp_path / "rng-0.pt"
    torch.rand(random.Random(0).randrange(1, 9))
    torch.save(random_states(), path)
    expected = torch.rand(5)
    torch.manual_seed(99)
    restore_random_states(path)
    assert torch.equal(torch.rand(5), expected)


def test_a_rank_without_a_file_keeps_its_state_and_says_so(tmp_path, caplog):
    before = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        restore_random_states(tmp_path / "rng-7.pt")
    assert torch.equal(torch.get_rng_state(), before)
    assert f"no random states for this rank in {tmp_path}" in caplog.text
