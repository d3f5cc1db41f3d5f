"""Tokens in arrays: what a step drew, and the responses that grow from it."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1v2.generation.tokens import DrawnToken, ResponseTokens, StepTokens


def step_of(tokens: dict[int, int], ended: frozenset[int] = frozenset()) -> StepTokens:
    ids = list(tokens)
    return StepTokens(
        np.array(ids, dtype=np.int64),
        np.array(list(tokens.values()), dtype=np.int64),
        np.array([-float(token) for token in tokens.values()]),
        np.array([request in ended for request in ids], dtype=bool),
        {request: ((request, -0.5),) for request in ids if request % 2},
    )


def test_a_step_gives_its_tokens_one_by_one():
    step = step_of({4: 7, 5: 9}, frozenset({5}))
    assert len(step) == 2
    assert list(step) == [DrawnToken(4, 7, -7.0), DrawnToken(5, 9, -9.0, ((5, -0.5),), is_last=True)]
    assert list(step.select(step.request_ids == 5)) == list(step)[1:]


@given(st.lists(st.dictionaries(st.integers(0, 40), st.booleans(), max_size=30), max_size=12))
def test_responses_get_their_own_tokens_back(steps):
    """The booleans say which responses end in a step."""
    responses, expected = ResponseTokens(12), {}
    for number, ends in enumerate(steps):
        responses.append(step_of({request: 100 * number + request for request in ends}))
        for request, is_last in ends.items():
            expected.setdefault(request, []).append(100 * number + request)
            if is_last:
                tokens = tuple(expected.pop(request))
                assert responses.pop(request) == (tokens, tuple(-float(token) for token in tokens))
