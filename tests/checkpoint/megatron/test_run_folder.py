"""The files beside the tensors of a checkpoint, and the refusals of others."""

from __future__ import annotations

import pytest
import torch

from megatron_r1v2.checkpoint.megatron.run_folder import load_state, save_state

GOOD = {"format": 1, "step": 1, "parts": ["adapter"], "trained": []}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([1, 2], "holds a list"),
        ({"format": 1, "step": 1, "trained": []}, "parts=None"),
        ({"step": 1, "parts": ["adapter"], "trained": []}, "earlier development version .*train again"),
        ({**GOOD, "format": 2}, "has format 2; accepted: 1"),
        ({**GOOD, "parts": 5}, "parts=5"),
        ({**GOOD, "parts": [5]}, r"parts=\[5\]"),
        ({**GOOD, "parts": ["nonsense"]}, "accepted: a list of vision"),
        ({**GOOD, "trained": "adapter"}, "trained='adapter'"),
    ],
)
def test_a_state_of_something_else_is_refused(tmp_path, content, told):
    torch.save(content, tmp_path / "state.pt")
    with pytest.raises(ValueError, match=told):
        load_state(tmp_path)


def test_a_state_is_read_and_a_missing_one_named(tmp_path):
    with pytest.raises(ValueError, match=r"state.pt is missing; copy"):
        load_state(tmp_path)
    save_state(tmp_path, {"step": 1, "parts": ["adapter"], "trained": []})
    assert load_state(tmp_path) == GOOD
