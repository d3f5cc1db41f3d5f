"""The types at a boundary: the columns of a response, and the mark of a fresh sample."""

from dataclasses import replace

import pytest
import torch

from megatron_r1v2.types import RLTargets, Sample
from tests.stages.scripted import make_prompt

SAMPLE = Sample("a", 0, token_ids=(5, 6, 7, 8, 9), prompt_length=3, modality="text")


def test_the_response_begins_one_column_early():
    labels_S = torch.tensor(SAMPLE.token_ids[1:])
    assert labels_S[SAMPLE.response_columns].tolist() == [8, 9]
    assert SAMPLE.response_length == 2


def test_a_given_response_is_not_for_reinforcement_learning():
    assert SAMPLE.rl is None


def test_a_sample_is_fresh_until_it_has_old_log_probs():
    targets = RLTargets((-1.0, -2.0), 0.5, 1.0, 3, group_effective=True)
    assert targets.is_fresh
    assert not replace(targets, old_log_probs=(-1.0, -2.0)).is_fresh
    assert replace(targets, old_log_probs=(-1.0,)).is_fresh, "of the first segment only"


@pytest.mark.parametrize(("tiles", "modality"), [(0, "text"), (1, "image")])
def test_a_prompt_is_visual_when_it_has_a_tile(tiles, modality):
    assert make_prompt("p", tiles=tiles).modality == modality
