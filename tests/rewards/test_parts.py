import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1v2.config.schema import RewardConfig
from megatron_r1v2.rewards import parts, verifiers
from megatron_r1v2.rewards.parts import PARTS, Response, score_parts, weighted_total
from megatron_r1v2.rewards.verifiers import Call, VerifierPool, answer_call
from megatron_r1v2.types import Prompt, Rollout

EVERY_PART = RewardConfig(**{f"{name}_weight": 1.0 for name in PARTS})
GOOD = r"left 3, right 5, 3+5=8</think>\boxed{8}"


def _response(text=GOOD, claims=(("left", "3"),), facts=None, token_ids=(1, 2, 3), finish="stop", model_score=-3.5):
    prompt = Prompt(
        key="a",
        messages=(),
        token_ids=(1,),
        tiles_TCHW=torch.zeros(0, 3, 4, 4, dtype=torch.uint8),
        answer="8",
        answer_type="numeric",
        facts={"left": "3", "right": "5"} if facts is None else facts,
    )
    rollout = Rollout("a", 0, tuple(token_ids), (0.0,) * len(token_ids), policy_version=0, finish_reason=finish)
    return Response(prompt, rollout, text, claims, max_response_tokens=10, model_score=model_score)


@pytest.fixture(scope="module")
def pool():
    with VerifierPool(1, 5.0) as made:
        yield made


def test_every_part_has_a_weight_of_its_name():
    assert RewardConfig().weights.keys() == PARTS.keys()
    used = {name for name, weight in RewardConfig().weights.items() if weight > 0}
    assert used == {"answer", "format"}


def test_each_part_of_three_responses(pool, monkeypatch):
    monkeypatch.setattr(parts, "REPEATED_TOKENS", 2)
    monkeypatch.setattr(parts, "OVERLONG_SHARE", 0.4)
    responses = [
        _response(),
        _response(
            r"left 3, right 6, 3+6=9</think>\boxed{9}", claims=(("left", "3"), ("right", "6")), token_ids=(1, 2) * 4
        ),
        _response("no", claims=(), facts={}, token_ids=(7,) * 10, finish="length", model_score=None),
    ]
    (first, second, third), _ = score_parts(responses, settings=EVERY_PART, pool=pool)
    assert first == {
        "answer": 1, "format": 1, "consistency": 1, "steps": 1, "repetition": 1, "overlong": 1, "model": 0.5,
    }  # fmt: skip
    assert second == pytest.approx(
        {"answer": 0, "format": 1, "consistency": 0, "steps": 1, "repetition": 2 / 7, "overlong": 0.5, "model": 0.5}
    )
    # Neither facts nor a model: these parts do not apply.
    assert third == pytest.approx({"answer": 0, "format": 0, "steps": 0, "repetition": 1 / 9, "overlong": 0})


def test_parts_without_a_weight_are_left_out(pool):
    [rewards], _ = score_parts([_response(model_score=None)], settings=RewardConfig(), pool=pool)
    assert rewards.keys() == {"answer", "format"}
    nothing = RewardConfig(answer_weight=0.0, format_weight=0.0)
    [rewards], _ = score_parts([_response()], settings=nothing, pool=pool)
    assert rewards == {"answer": 1, "format": 1, "model": 0.5}


def test_a_part_that_hangs_in_its_worker_is_0_and_counted(monkeypatch):
    monkeypatch.setattr(parts, "REPEATED_TOKENS", 400_000)
    with VerifierPool(1, 0.2) as pool:
        looping = dataclasses.replace(_response(), rollout=dataclasses.replace(_response().rollout, token_ids=(7,)))
        long = dataclasses.replace(looping, rollout=dataclasses.replace(looping.rollout, token_ids=(7,) * 1_000_000))
        found, checked = score_parts([long, _response()], settings=EVERY_PART, pool=pool)
        assert found[0]["repetition"] == 0.0
        assert found[1]["repetition"] == 1.0
        assert checked == [False, True]
        assert pool.timeouts + pool.crashes == 1


def _answers(pool, boxes, **fields):
    """Return the answer part of a box each, and whether all of its checks ended."""
    response = _response()
    asked = dataclasses.replace(response.prompt, **fields)
    responses = [dataclasses.replace(response, prompt=asked, text=f"x</think>\\boxed{{{box}}}") for box in boxes]
    rewards, checked = score_parts(responses, settings=RewardConfig(), pool=pool)
    return [part["answer"] for part in rewards], checked


def test_alternatives_and_tolerances_are_right_too(pool):
    asked = {"answer": "1.2", "answer_type": "math", "alternatives": ("six fifths",), "tolerances": (0.05,)}
    boxes = ("1.24", "1.3", "six fifths", "7/5", "Six  Fifths")
    assert _answers(pool, boxes, **asked) == ([1, 0, 1, 0, 1], [True] * 5)


def test_the_text_of_an_option_is_no_letter(pool):
    boxes = ("A", "A. thaliana", "C", "B")
    asked = {"answer": "C", "answer_type": "choice", "alternatives": ("A. thaliana", "c")}
    assert _answers(pool, boxes, **asked)[0] == [0, 1, 1, 0]


def test_a_check_that_crashes_leaves_a_doubt_unless_another_one_says_right(pool, monkeypatch):
    def crash_on(reference):
        def call(text, answer, answer_type, numeric_tolerance=1e-6):
            if answer == reference:
                return Call("os", "abort", ())
            return answer_call(text, answer, answer_type, numeric_tolerance)

        return call

    monkeypatch.setattr(verifiers, "answer_call", crash_on("five"))
    asked = {"answer": "8", "answer_type": "exact", "alternatives": ("five", "eight")}
    assert _answers(pool, ("8", "eight", "9"), **asked) == ([1, 1, 0], [True, True, False])


def test_the_weighted_sum():
    weights = {"answer": 1.0, "format": 0.25, "consistency": 0.5, "steps": 0.0}
    assert weighted_total({"answer": 1.0, "format": 0.5, "consistency": 1.0}, weights) == 1.625
    assert weighted_total({"answer": 0.0, "format": 1.0, "consistency": 0.5}, weights) == 0.5


def test_the_weight_of_a_part_that_does_not_apply_goes_to_the_others():
    weights = {"answer": 1.0, "format": 0.25, "consistency": 0.75}
    # W = 2, of which 1.25 apply: 2 / 1.25 = 1.6.
    assert weighted_total({"answer": 1.0, "format": 1.0}, weights) == pytest.approx(2.0)
    assert weighted_total({"answer": 1.0, "format": 0.0}, weights) == pytest.approx(1.6)
    assert weighted_total({"answer": 0.0, "format": 1.0}, weights) == pytest.approx(0.4)
    assert weighted_total({"answer": 0.0, "format": 0.0}, weights) == 0.0
    # Nothing that has a weight applies: the prompt teaches nothing.
    assert weighted_total({"answer": 1.0}, {"answer": 0.0, "consistency": 1.0}) == 0.0


@given(
    st.dictionaries(st.sampled_from(sorted(PARTS)), st.floats(0, 1)),
    st.fixed_dictionaries({name: st.floats(0, 10) for name in PARTS}),
)
def test_every_prompt_has_the_same_range(rewards, weights):
    whole = sum(weights.values())
    assert 0.0 <= weighted_total(rewards, weights) <= whole * (1 + 1e-9)
    if any(weights[name] > 1e-6 for name in rewards):
        assert weighted_total(dict.fromkeys(rewards, 1.0), weights) == pytest.approx(whole)
        assert weighted_total(dict.fromkeys(rewards, 0.0), weights) == 0.0


@given(
    st.text() | st.text(alphabet="8, \n\\boxed{}</think>"),
    st.lists(st.integers(0, 5), max_size=12),
    st.lists(st.tuples(st.sampled_from(["left", "up"]), st.sampled_from("35"))),
    st.floats(allow_nan=False, allow_infinity=False),
)
@settings(max_examples=50, deadline=None)
def test_every_part_of_any_response_is_in_bounds(pool, text, token_ids, claims, score):
    response = _response(text, claims=tuple(claims), token_ids=token_ids, model_score=score)
    [rewards], _ = score_parts([response], settings=EVERY_PART, pool=pool)
    assert rewards.keys() == PARTS.keys()
    assert all(0.0 <= value <= 1.0 for value in rewards.values())
