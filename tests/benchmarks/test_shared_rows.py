"""The table of shared beside separate rows."""

import pytest

from benchmarks import shared_rows
from benchmarks.shared_rows import Row, case, measure, table_lines
from megatron_r1v2.config.choices import Packing
from megatron_r1v2.rehearsal.few_layers import Layers


@pytest.mark.parametrize("length", [8192, 65536])
def test_a_microbatch_has_a_group_of_responses_either_way(length):
    shared, separate = case(Packing.shared, length), case(Packing.first_fit_decreasing, length)
    prompt = shared.data.max_prompt_tokens
    assert shared.train.tokens_per_microbatch == prompt + 8 * length
    assert separate.train.tokens_per_microbatch == 8 * (prompt + length)
    same = ("parallel", "data", "generation", "algorithm", "model")
    assert all(getattr(shared, section) == getattr(separate, section) for section in same)


def test_two_layer_counts_are_extended_to_all(monkeypatch):
    def rehearse_case(_, layers: Layers):
        return [Row(phase, 7, 10.0 * layers.language + 1, 3.0 * layers.vision) for phase in ("log_probs", "update")]

    monkeypatch.setattr(shared_rows, "rehearse_case", rehearse_case)
    assert measure(Packing.shared, 8192) == [Row(phase, 7, 641.0, 135.0) for phase in ("log_probs", "update")]


def test_the_lines_have_both_and_their_ratio():
    (line,) = table_lines(8192, [Row("update", 700, 1e15, 2**30)], [Row("update", 1000, 4e15, 2**31)])
    assert line == "| 8,192 | update | 700 | 1,000 | 0.70 | 1.00 | 4.00 | 0.25 | 1.0 | 2.0 | 0.50 |"


@pytest.mark.slow
def test_a_prompt_of_half_a_row_is_computed_once():
    shared, separate = (measure(packing, 4096) for packing in (Packing.shared, Packing.first_fit_decreasing))
    for ours, theirs in zip(shared, separate, strict=True):
        # A group has 4,096 + 8 x 4,096 tokens, or 8 x 8,192; the last token of a row is a label only.
        assert (ours.tokens, theirs.tokens) == (2 * (9 * 4096 - 1), 2 * 8 * (8192 - 1))
        assert 0.4 < ours.flops / theirs.flops < 0.6
        assert ours.peak < theirs.peak
