"""Tails by hand, and lengths that are found again in what a run has written."""

import json
import random
from statistics import fmean

import pytest

from megatron_r1v2.planning.hardware import HARDWARE, Host
from megatron_r1v2.planning.parameters import Layout
from megatron_r1v2.planning.roofline import DecodeCost
from megatron_r1v2.planning.tails import Lengths, Replica, cut_mean, read_lengths, simulate_tail, simulate_tails
from tests.planning.plans import ARCHITECTURE, workload

# A second a step, however many responses decode.
FREE = Host(0, 0, 0.0, 0.0, 0.0)
SECOND = DecodeCost(
    weights=1.0, cache_token=0.0, response=0.0, attended_token=0.0, latency=0.0, launching=0.0, host=FREE
)


def replica(**changes):
    values = {"cost": SECOND, "max_requests": 4, "cache_tokens": 1e9, "prompt_tokens": 10, "responses": 64}
    return Replica(**(values | changes))


class Fixed(Lengths):
    """Lengths that come round in turns."""

    def draw(self, count, source):
        return [10, 20, 30, 40][:count] * -(-count // 4) if count else []


ROUND = Fixed(mean=25.0, cut=40, spread=1.0)


def test_a_phase_lasts_as_long_as_its_longest_response():
    tail = simulate_tail(replica(responses=4), ROUND, replicas=1)
    assert (tail.seconds, tail.tokens) == (40.0, 100.0)
    assert tail.lost == 0.0, "four fifths of the responses are over with the last: it was full to the end"
    two = simulate_tail(replica(responses=4), ROUND, replicas=2)
    assert (two.seconds, two.tokens) == (40.0, 200.0)


def test_what_does_not_fit_waits_for_its_place():
    one = simulate_tail(replica(responses=4, max_requests=1), ROUND, replicas=1)
    assert (one.seconds, one.lost) == (100.0, 0.0), "one after the other"
    # 80 tokens hold the four prompts and ten tokens of each, and after the first response six more of each: then the
    # newest has to go. It has a place again when the second response has ended, and 24 tokens to go.
    cache = simulate_tail(replica(responses=4, cache_tokens=80), ROUND, replicas=1)
    assert (cache.seconds, cache.tokens) == (10 + 6 + 4 + 24, 100)


def test_responses_share_their_prompt_in_the_cache():
    # With one prompt at most 70 tokens are in the cache, at the end of the second and of the third response.
    shared, own = (
        simulate_tail(replica(responses=4, cache_tokens=75, responses_per_prompt=count), ROUND, replicas=1)
        for count in (4, 1)
    )
    assert shared.seconds == 40
    assert own.seconds > 40


def test_a_replica_that_is_done_takes_the_next_prompt():
    class Uneven(Lengths):
        def draw(self, count, source):
            return [40, 10, 10, 10][:count]

    lengths = Uneven(mean=20.0, cut=40, spread=1.0)
    # 40, 10, 40 and 10 tokens: the second replica has room first, takes the third, and the first one the last.
    assert simulate_tail(replica(responses=2, max_requests=1), lengths, replicas=2).seconds == 50
    # The responses to a prompt begin together: a place for one is no room for two.
    two, three = (
        simulate_tail(replica(responses=4, max_requests=slots, responses_per_prompt=2), lengths, replicas=1)
        for slots in (2, 3)
    )
    assert (two.seconds, three.seconds) == (40 + 10, 40)


def test_the_part_that_is_lost_by_hand():
    # Sixteen responses of 10 tokens and four of 100, all at once: 20 tokens a second for 10 seconds, then 4 for 90.
    class Two(Lengths):
        def draw(self, count, source):
            return [10] * 16 + [100] * 4

    tail = simulate_tail(replica(responses=20, max_requests=20), Two(mean=28.0, cut=100, spread=1.0), replicas=1)
    assert (tail.seconds, tail.tokens) == (100.0, 560.0)
    assert tail.lost == pytest.approx(1 - 560 / 20 / 100)


def test_segments_end_a_phase_and_lose_less():
    lengths = Lengths(mean=400, cut=4000, spread=1.0)
    whole, parts = (
        simulate_tail(replica(responses=128, max_requests=1024), lengths, replicas=8, segment_tokens=tokens)
        for tokens in (0, 200)
    )
    assert parts.seconds <= 200
    assert whole.seconds > 3000
    assert parts.lost < whole.lost / 2
    cases = simulate_tails(replica(responses=8), lengths, segment_tokens=200)
    assert [(case.replicas, case.segment_tokens) for case in cases] == [
        (replicas, tokens) for replicas in (1, 8, 64) for tokens in (0, 200)
    ]
    losses = [case.lost for case in cases if not case.segment_tokens]
    assert losses[0] < losses[2], "more replicas wait for a longer response"


def test_lengths_have_the_mean_and_the_cut_that_are_asked_for():
    lengths = Lengths(mean=4096, cut=8192, spread=0.8)
    drawn = lengths.draw(20_000, random.Random(3))
    assert fmean(drawn) == pytest.approx(4096, rel=0.02)
    assert max(drawn) == 8192
    assert drawn.count(8192) / len(drawn) == pytest.approx(lengths.clipped(), abs=0.01)
    assert cut_mean(0.0, 1e-6, 10.0) == pytest.approx(1.0, rel=1e-4)
    assert cut_mean(10.0, 1.0, 2.0) == pytest.approx(2.0)


@pytest.mark.parametrize("spread", [0.3, 0.8, 1.2])
def test_a_runs_metrics_give_its_lengths_back(tmp_path, spread):
    lengths = Lengths(mean=1000, cut=2500, spread=spread)
    source = random.Random(5)
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for _ in range(20):
            drawn = lengths.draw(512, source)
            row = {
                "response_length/mean": fmean(drawn),
                "response_length/max": max(drawn),
                "response_length/clip_ratio": sum(length == 2500 for length in drawn) / len(drawn),
            }
            file.write(json.dumps(row) + "\n" + json.dumps({"train/epoch": 1}) + "\n")
    found = read_lengths(tmp_path, 2500)
    assert found.mean == pytest.approx(1000, rel=0.03)
    assert found.spread == pytest.approx(spread, rel=0.15)
    assert read_lengths(tmp_path / "metrics.jsonl", 2500) == found


def test_metrics_without_lengths_are_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"actor/loss": 1.0}\n')
    with pytest.raises(ValueError, match=r"has no response_length/mean in any line; give the metrics.jsonl of a grpo"):
        read_lengths(tmp_path, 100)
    with pytest.raises(ValueError, match="cannot be read as a metrics.jsonl"):
        read_lengths(tmp_path / "missing", 100)
    (tmp_path / "metrics.jsonl").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as a metrics.jsonl"):
        read_lengths(tmp_path, 100)


def test_what_goes_on_is_computed_again():
    class Twice(Lengths):
        def draw(self, count, source):
            return [20] * count

    tail = simulate_tail(replica(responses=2), Twice(mean=20.0, cut=20, spread=1.0), replicas=1, segment_tokens=10)
    assert tail.continued == 2 * (10 + 10), "in each phase two responses go on, with ten tokens and their prompts"
    assert (tail.seconds, tail.tokens) == (10.0, 2 * 10 + 2 * 10)


def test_a_group_goes_on_where_it_began():
    # Each replica has one response of 10 tokens and one of 40 a phase, and two slots: those of 40 go on before others.
    class Mixed(Lengths):
        def draw(self, count, source):
            return [10, 40]

    tail = simulate_tail(
        replica(responses=2, max_requests=8), Mixed(mean=25.0, cut=40, spread=1.0), replicas=2, segment_tokens=20
    )
    assert tail.tokens == 2 * (10 + 40)
    assert tail.seconds == 20.0
    assert tail.continued == 2 * (20 + 10)


def test_a_replica_has_its_share_of_a_step():
    work = workload()
    planned = Replica.planned(ARCHITECTURE, Layout(8, 1, 4, 0, True), work, HARDWARE["h100"])
    assert (planned.responses, planned.prompt_tokens) == (64 * 8 // 4, 4096)
    assert planned.max_requests == work.max_requests
