import json
import math
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1v2.rl.sample_buffer import BufferEntry, SampleBuffer, compose_batch


def entry(name, priority=1.0, modality="image", step=0, length=10, effective=True):
    return BufferEntry(name, name.split("/")[0], priority, modality, step, length, effective)


def make_buffer(capacity=100, max_age=10, exponent=1.0, balance=True):
    return SampleBuffer(capacity, max_age, exponent, balance)


entries_strategy = st.lists(
    st.builds(
        entry,
        st.integers(0, 500).map(lambda number: f"p{number % 40}/{number}"),
        st.floats(0.01, 5.0),
        st.sampled_from(["image", "text"]),
        st.integers(0, 9),
        st.integers(1, 50),
    ),
    max_size=40,
    unique_by=lambda item: item.sample_id,
)


def test_only_effective_entries_with_an_advantage_are_taken():
    buffer = make_buffer()
    refused = buffer.add([entry("a"), entry("b", priority=0.0), entry("c", effective=False)], step=0)
    assert refused == ("b", "c")
    assert [item.sample_id for item in buffer.entries] == ["a"]


def test_bad_entries_are_named():
    buffer = make_buffer()
    buffer.add([entry("a")], step=0)
    with pytest.raises(ValueError, match="'a' is in the buffer already"):
        buffer.add([entry("a")], step=1)
    for priority in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match="priority of sample 'b'"):
            buffer.add([entry("b", priority=priority)], step=1)
    with pytest.raises(ValueError, match=r"buffer\.max_age"):
        make_buffer(max_age=-1)


def test_age_bound():
    buffer = make_buffer(max_age=3)
    buffer.add([entry("old", step=1), entry("new", step=2)], step=2)
    assert buffer.expire(4) == ()
    assert buffer.draw(5, 10, 0) == ["new"]
    assert buffer.expire(5) == ("old",)
    assert buffer.add([entry("newest", step=6)], step=6) == ("new",)


def test_the_oldest_and_then_the_least_telling_are_evicted():
    buffer = make_buffer(capacity=3)
    assert buffer.add([entry("a", 9.0, step=0), entry("b", 1.0, step=1), entry("c", 2.0, step=1)], step=1) == ()
    assert buffer.add([entry("d", 0.1, step=2)], step=2) == ("a",)
    assert buffer.add([entry("e", 0.1, step=2)], step=2) == ("b",)
    assert make_buffer(capacity=0).add([entry("a")], step=0) == ("a",)


@settings(max_examples=50, deadline=None)
@given(entries_strategy, st.integers(0, 20), st.integers(0, 10), st.integers(0, 15))
def test_bounds_hold_and_dropped_ids_tell_the_owner_of_payloads(entries, capacity, max_age, step):
    buffer = make_buffer(capacity=capacity, max_age=max_age)
    payloads = set()
    for start in range(0, len(entries), 7):
        payloads |= {item.sample_id for item in entries[start : start + 7]}
        payloads -= set(buffer.add(entries[start : start + 7], step))
        assert len(buffer) <= capacity
        assert payloads == {item.sample_id for item in buffer.entries}
        assert all(step - item.step <= max_age for item in buffer.entries)


@settings(max_examples=50, deadline=None)
@given(entries_strategy, st.integers(0, 50), st.integers(0, 1000), st.booleans(), st.randoms(use_true_random=False))
def test_draw_is_without_replacement_and_independent_of_insertion_order(entries, count, seed, balance, random):
    shuffled = list(entries)
    random.shuffle(shuffled)
    states, draws = [], []
    for order in (entries, shuffled):
        buffer = make_buffer(capacity=30, balance=balance)
        buffer.add(order, step=9)
        draws.append(buffer.draw(10, count, seed, {"image": 3, "text": 5}))
        states.append(buffer.state_dict())
    assert draws[0] == draws[1]
    assert states[0] == states[1]
    assert len(set(draws[0])) == len(draws[0]) == min(count, len(states[0]["entries"]))


def test_entries_of_this_step_are_not_drawn():
    buffer = make_buffer()
    buffer.add([entry("fresh", step=5), entry("kept", step=4)], step=5)
    assert buffer.draw(5, 2, seed=0) == ["kept"]


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_probability_is_a_power_of_the_advantage(exponent):
    priorities = {"a": 0.5, "b": 1.0, "c": 2.0, "d": 3.0}
    weights = {name: priority**exponent for name, priority in priorities.items()}
    total = sum(weights.values())
    draws = 8000
    first, second = Counter(), Counter()
    buffer = make_buffer(exponent=exponent, max_age=draws)
    buffer.add([entry(name, priority) for name, priority in priorities.items()], step=0)
    for step in range(1, draws + 1):
        drawn = buffer.draw(step, 2, seed=7)
        first[drawn[0]] += 1
        second[drawn[1]] += 1
    expected_first = {name: weight / total for name, weight in weights.items()}
    # Without replacement, the second is drawn from what is left in the same proportion.
    expected_second = {
        name: sum(
            expected_first[other] * weights[name] / (total - weights[other]) for other in weights if other != name
        )
        for name in weights
    }
    for counts, expected in ((first, expected_first), (second, expected_second)):
        chi_square = sum((counts[name] - draws * p) ** 2 / (draws * p) for name, p in expected.items())
        # 3 degrees of freedom: 16.3 is exceeded with probability 0.001; the seed is fixed.
        assert chi_square < 16.3, (counts, expected)


def test_draws_differ_by_seed_and_step():
    buffer = make_buffer(max_age=1000)
    buffer.add([entry(f"s{number}") for number in range(50)], step=0)
    draws = [tuple(buffer.draw(step, 5, seed)) for step, seed in ((1, 0), (2, 0), (1, 1), (1, 0))]
    assert draws[0] == draws[3]
    assert len(set(draws)) == 3


def test_extreme_priorities_can_be_drawn():
    buffer = make_buffer(exponent=50.0)
    buffer.add([entry("tiny", 1e-300), entry("huge", 1e300)], step=0)
    assert buffer.draw(1, 2, seed=0) == ["huge", "tiny"]


def test_modalities_are_drawn_as_generated_and_filled_in_from_the_other():
    buffer = make_buffer()
    # Text has priorities a thousand times larger: only the balance lets images in.
    buffer.add([entry(f"i{n}", 0.001) for n in range(20)], step=0)
    buffer.add([entry(f"t{n}", 1.0, "text") for n in range(6)], step=0)

    def drawn(count, **fresh):
        return Counter(name[0] for name in buffer.draw(1, count, 0, fresh))

    assert drawn(8, image=3, text=1) == {"i": 6, "t": 2}
    assert drawn(4, image=2, text=1) == {"i": 3, "t": 1}
    assert drawn(5, image=1, text=1) == {"i": 3, "t": 2}
    assert drawn(10, image=8, text=0) == {"i": 10}
    assert drawn(16, image=2, text=6) == {"i": 10, "t": 6}
    assert drawn(6) == {"t": 6}
    buffer.balance_modalities = False
    assert drawn(6, image=8, text=0) == {"t": 6}


def test_state_survives_json_and_continues_alike():
    buffer = make_buffer()
    buffer.add([entry(f"s{number}", 0.1 + number / 3, step=number % 3) for number in range(9)], step=2)
    buffer.draw(3, 4, seed=1)
    restored = make_buffer()
    restored.load_state_dict(json.loads(json.dumps(buffer.state_dict())))
    assert restored.state_dict() == buffer.state_dict()
    assert restored.draw(4, 4, seed=1) == buffer.draw(4, 4, seed=1)
    assert restored.statistics(4) == buffer.statistics(4)


def test_a_state_of_another_version_is_refused():
    state = {"entries": [{"sample_id": "a", "reuse": 0}]}
    with pytest.raises(ValueError, match="another version"):
        make_buffer().load_state_dict(state)


def test_statistics_by_hand():
    buffer = make_buffer()
    buffer.add([entry("p/a", 1.0, step=0), entry("p/b", 3.0, step=2), entry("q/c", 2.0, step=4)], step=4)
    assert buffer.statistics(4) == {
        "size": 3,
        "distinct_prompts": 2,
        "priority_mean": 2.0,
        "age_mean": 2.0,
        "age_max": 4,
        "reuse_mean": 0.0,
        "reuse_max": 0,
    }
    buffer.draw(4, 2, seed=0)
    assert buffer.statistics(4, ["p/a", "p/b"])["reuse_mean"] == 1.0
    assert buffer.reuse("q/c") == 0
    assert make_buffer().statistics(4) == {"size": 0, "distinct_prompts": 0}


def fresh_batch(effective, zero, other, step=5):
    return (
        [entry(f"e{n}", 1.0, step=step) for n in range(effective)]
        + [entry(f"z{n}", 0.0, step=step, effective=False, length=7) for n in range(zero)]
        + [entry(f"o{n}", 0.1 + n, step=step, effective=False, length=5) for n in range(other)]
    )


def filled_buffer(count):
    buffer = make_buffer()
    buffer.add([entry(f"r{n}", 1.0, step=4, length=3) for n in range(count)], step=4)
    return buffer


PLAN = {"step": 5, "seed": 0, "batch_size": 10, "target_effective_fraction": 0.55}


def test_fresh_effective_samples_are_topped_up_to_the_target_rounded_up():
    plan = compose_batch(fresh_batch(2, 3, 5), filled_buffer(20), **PLAN)
    assert plan.target_effective == 6
    assert len(plan.replayed) == 4
    # The three with zero advantage go first, then the one with the smallest advantage.
    assert plan.replaced == ("o0", "z0", "z1", "z2")
    assert plan.fresh == ("e0", "e1", "o1", "o2", "o3", "o4")
    assert plan.fresh_zero_advantage == ()
    assert plan.num_sequences == 10
    assert plan.num_tokens == 2 * 10 + 4 * 5 + 4 * 3
    assert (plan.fresh_effective_fraction, plan.trained_effective_fraction) == (0.2, 0.6)
    assert plan.compute == plan.fresh + plan.replayed
    expected = {
        "ssb/replayed": 4,
        "ssb/distinct_samples": 10,
        "ssb/distinct_prompts": 10,
        "ssb/size": 20,
        "ssb/age_mean": 1.0,
        "ssb/age_max": 1,
        "ssb/reuse_mean": 1.0,
        "ssb/fresh_effective_fraction": 0.2,
        "ssb/trained_effective_fraction": 0.6,
    }
    assert plan.metrics == expected


def test_zero_advantage_samples_stay_in_the_denominators():
    plan = compose_batch(fresh_batch(5, 5, 0), filled_buffer(20), **PLAN)
    assert len(plan.replayed) == 1
    assert plan.fresh_zero_advantage == ("z1", "z2", "z3", "z4")
    assert (plan.num_sequences, plan.num_tokens) == (10, 5 * 10 + 4 * 7 + 3)
    assert len(plan.compute) == 6


def test_enough_fresh_effective_samples_need_no_replay():
    buffer = filled_buffer(20)
    plan = compose_batch(fresh_batch(7, 3, 0), buffer, **PLAN)
    assert (plan.replayed, plan.replaced) == ((), ())
    assert plan.trained_effective_fraction == plan.fresh_effective_fraction == 0.7
    assert buffer.statistics(5)["reuse_max"] == 0


@pytest.mark.parametrize("buffer", [None, make_buffer()])
def test_without_buffer_the_fraction_that_is_reached_is_reported(buffer):
    plan = compose_batch(fresh_batch(2, 8, 0), buffer, **PLAN)
    assert plan.trained_effective_fraction == 0.2
    assert (len(plan.fresh), len(plan.fresh_zero_advantage), plan.num_sequences) == (2, 8, 10)
    assert plan.metrics["ssb/replayed"] == 0
    assert "ssb/age_max" not in plan.metrics, "an age of nothing would be a lie"


def test_a_short_buffer_gives_what_it_has():
    plan = compose_batch(fresh_batch(2, 8, 0), filled_buffer(1), **PLAN)
    assert (len(plan.replayed), plan.trained_effective_fraction, plan.target_effective) == (1, 0.3, 6)


def test_replayed_samples_fill_the_room_of_missing_fresh_ones_first():
    plan = compose_batch(fresh_batch(2, 4, 0), filled_buffer(20), **PLAN)
    assert (len(plan.replayed), len(plan.replaced), plan.num_sequences) == (4, 0, 10)
    assert compose_batch([], filled_buffer(20), **PLAN).num_sequences == 6
    assert compose_batch([], None, **PLAN).trained_effective_fraction == 0.0


def test_rounding_up_is_not_fooled_by_floating_point():
    for batch_size, target, expected in ((100, 0.55, 55), (10, 0.7, 7), (128, 0.6, 77), (10, 1.0, 10), (8, 0.0, 0)):
        settings_ = PLAN | {"batch_size": batch_size, "target_effective_fraction": target}
        assert compose_batch(fresh_batch(0, batch_size, 0), None, **settings_).target_effective == expected


def test_impossible_batches_are_refused():
    with pytest.raises(ValueError, match="at most 10 samples with distinct ids, got 11"):
        compose_batch(fresh_batch(11, 0, 0), None, **PLAN)
    with pytest.raises(ValueError, match="distinct ids"):
        compose_batch(fresh_batch(1, 0, 0) * 2, None, **PLAN)
    with pytest.raises(ValueError, match="target_effective_fraction"):
        compose_batch([], None, **(PLAN | {"target_effective_fraction": 1.1}))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 8),
    st.integers(0, 8),
    st.integers(0, 8),
    st.integers(0, 30),
    st.floats(0.0, 1.0),
    st.randoms(use_true_random=False),
)
def test_every_plan_keeps_the_rules(effective, zero, other, held, target, random):
    generated = fresh_batch(effective, zero, other)
    generated = [replace(item, modality=random.choice(["image", "text"])) for item in generated]
    settings_ = PLAN | {"batch_size": max(len(generated), 1), "target_effective_fraction": target}
    plan = compose_batch(generated, filled_buffer(held), **settings_)
    shuffled = random.sample(generated, len(generated))
    assert compose_batch(shuffled, filled_buffer(held), **settings_) == plan
    batch = plan.fresh + plan.fresh_zero_advantage + plan.replayed
    assert len(set(batch)) == len(batch) == plan.num_sequences <= settings_["batch_size"]
    assert set(plan.fresh + plan.fresh_zero_advantage + plan.replaced) == {item.sample_id for item in generated}
    assert not [name for name in plan.replaced if name.startswith("e")]
    trained = effective + len(plan.replayed)
    assert trained == max(effective, min(plan.target_effective, effective + held))
    assert plan.target_effective >= target * settings_["batch_size"] - 1e-6
    assert not plan.replayed or trained <= plan.target_effective
    # A sample with an advantage is never replaced while one without is kept.
    assert not (plan.fresh_zero_advantage and [name for name in plan.replaced if name.startswith("o")])


def test_clearing_drops_everything():
    buffer = make_buffer()
    buffer.add([entry("a"), entry("b")], step=0)
    assert buffer.clear() == ("a", "b")
    assert len(buffer) == 0
    assert buffer.state_dict() == {"entries": []}
