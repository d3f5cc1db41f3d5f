"""Which ranks are rehearsed, and processes that end badly."""

import pytest

from megatron_r1v2.config.choices import StageName
from megatron_r1v2.planning.parameters import Layout
from megatron_r1v2.rehearsal.ledger import PhaseMemory
from megatron_r1v2.rehearsal.rank import RankResult, RankSpec
from megatron_r1v2.rehearsal.run import planned_memory, ranks_to_rehearse, rehearse_ranks
from tests.planning.plans import plan_of


@pytest.mark.parametrize(
    ("layout", "all_ranks", "ranks"),
    [
        (Layout(8, 1, 1, 0, True), False, [0]),
        (Layout(8, 2, 2, 0, True), False, [0, 16]),
        (Layout(8, 2, 2, 0, True), True, [0, 7, 8, 15, 16, 23, 24, 31]),
        (Layout(1, 1, 1, 0, False), True, [0]),
    ],
)
def test_one_rank_of_each_stage_or_the_corners(layout, all_ranks, ranks):
    assert ranks_to_rehearse(layout, all_ranks=all_ranks) == ranks


def test_phases_have_their_plan():
    plan = plan_of()
    of_phase = {
        name: planned_memory(plan, RankResult(0), PhaseMemory(name, 0, 0)) for name in ("generate", "update", "save")
    }
    assert (of_phase["generate"].phase, of_phase["update"].phase, of_phase["save"]) == ("generate", "update", None)


def test_a_process_that_dies_is_a_finding(tmp_path):
    spec = RankSpec(str(tmp_path / "missing.yaml"), StageName.grpo, 0, 1, 8, 80.0)
    (result,) = rehearse_ranks([spec], tmp_path)
    assert "status 1" in result.error
    assert "missing.yaml" in result.error
