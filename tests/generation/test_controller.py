"""Images, draws and stop tokens in a step of the engine: as in the training forward."""

from __future__ import annotations

import pytest
import torch

from megatron_r1v2.generation.features import FeatureCache
from megatron_r1v2.models.log_probs import token_log_probs
from tests.generation.worlds import (
    MAX_RESPONSE_TOKENS,
    STOP,
    VOCABULARY,
    assert_same_rollouts,
    generate,
    make_engine,
    make_prompts,
    make_requests,
    run,
)


@pytest.fixture(scope="module")
def expected(one_rank):
    """Return what a roomy engine generates for six prompts."""
    model, context = one_rank
    return generate(make_engine(model, context), make_prompts(model, 6), FeatureCache(10**9))


def training_log_probs(model, context, prompt, rollout, temperature):
    """Score a rollout by the training forward, images through the vision tower."""
    token_ids = torch.tensor([prompt.token_ids + rollout.token_ids])
    logits = model(token_ids[:, :-1], torch.arange(token_ids.shape[1] - 1)[None], tiles_TCHW=prompt.tiles_TCHW)
    log_probs = token_log_probs(
        logits, token_ids[:, 1:], temperature=temperature, vocab_size=VOCABULARY, groups=context.groups
    )
    return log_probs[0, len(prompt.token_ids) - 1 :], logits[0, len(prompt.token_ids) - 1 :, :VOCABULARY]


@pytest.mark.parametrize("temperature", [0.0, 0.25, 1.0])
def test_log_probs_are_those_of_the_training_forward(one_rank, temperature):
    model, context = one_rank
    prompts = make_prompts(model, 3)
    rollouts = generate(make_engine(model, context), prompts, FeatureCache(10**9), temperature=temperature)
    assert len(rollouts) == 6
    with torch.no_grad():
        for number, rollout in enumerate(rollouts):
            log_probs, logits = training_log_probs(model, context, prompts[number // 2], rollout, temperature or 1.0)
            torch.testing.assert_close(torch.tensor(rollout.rollout_log_probs), log_probs, atol=2e-5, rtol=0)
            if temperature == 0:
                assert logits.argmax(dim=1).tolist() == list(rollout.token_ids)


def test_responses_end_at_the_first_stop_token_or_at_the_limit(expected):
    lengths = set()
    for rollout in expected:
        assert not STOP & set(rollout.token_ids[:-1])
        stopped = rollout.token_ids[-1] in STOP
        assert rollout.finish_reason == ("stop" if stopped else "length")
        assert stopped or len(rollout.token_ids) == MAX_RESPONSE_TOKENS
        assert len(rollout.token_ids) == len(rollout.rollout_log_probs)
        assert max(rollout.token_ids) < VOCABULARY
        lengths.add(len(rollout.token_ids))
    assert {r.finish_reason for r in expected} == {"stop", "length"}
    assert len(lengths) > 3


def test_images_are_looked_at(one_rank, expected):
    model, context = one_rank
    others = make_prompts(model, 6, seed=0)
    for prompt in others:
        prompt.tiles_TCHW.mul_(3).add_(17)
    results = generate(make_engine(model, context), others, FeatureCache(10**9))
    for number, (one, other) in enumerate(zip(results, expected, strict=True)):
        same = one.rollout_log_probs[0] == other.rollout_log_probs[0]
        assert same == (number // 2 % 3 == 2), "text-only prompts stay, the others change"


def test_a_generated_image_token_is_a_token_like_any_other(one_rank):
    """Only positions of the prompt hold images, also when an evicted response is prefilled again."""
    model, context = one_rank
    prompts = make_prompts(model, 2)
    image_token = model.architecture.image_token_id
    engine = make_engine(model, context, kv_cache_gib=0.0008)
    engine.stop_ids = frozenset()
    rollouts = generate(engine, prompts, FeatureCache(10**9), max_response_tokens=150, num_responses=8)
    assert engine.num_evictions > 0
    having = [number for number, rollout in enumerate(rollouts) if image_token in rollout.token_ids[:-1]]
    assert having
    for number in having:
        prompt, rollout = prompts[number // 8], rollouts[number]
        token_ids = torch.tensor([prompt.token_ids + rollout.token_ids])
        positions = torch.arange(token_ids.shape[1] - 1)[None]
        with torch.no_grad():
            hidden = model.language.embedding(input_ids=token_ids[:, :-1], position_ids=positions)
            image_positions = [at for at, token in enumerate(prompt.token_ids) if token == image_token]
            hidden[image_positions, 0] = model.adapt(model.encode_tiles(prompt.tiles_TCHW))
            logits = model.language(token_ids[:, :-1], positions, None, decoder_input=hidden)
        log_probs = torch.log_softmax(logits[0, len(prompt.token_ids) - 1 :, :VOCABULARY], dim=1)
        expected = log_probs.gather(1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(rollout.rollout_log_probs), expected, atol=2e-5, rtol=0)


def test_top_p_narrows_what_is_drawn(one_rank):
    model, context = one_rank
    arguments = {"top_p": 1e-6, "num_responses": 2}
    results = generate(make_engine(model, context), make_prompts(model, 2), FeatureCache(10**9), **arguments)
    greedy = generate(make_engine(model, context), make_prompts(model, 2), FeatureCache(10**9), temperature=0.0)
    assert_same_rollouts(results, greedy)


def test_alternatives_are_the_most_probable_tokens(one_rank):
    model, context = one_rank
    requests = make_requests(model, 8)
    responses = run(make_engine(model, context), {0: requests})
    for request in requests:
        for token in responses[request.request_id]:
            assert len(token.alternatives) == request.draw.num_alternatives
            values = [log_prob for _, log_prob in token.alternatives]
            assert values == sorted(values, reverse=True)
            if values:
                assert token.log_prob <= values[0]
                log_probs_by_token = dict(token.alternatives)
                assert log_probs_by_token.get(token.token_id, token.log_prob) == token.log_prob
                assert max(log_probs_by_token) < VOCABULARY
            if values and request.draw.top_p < 0.1:
                assert token.token_id == token.alternatives[0][0]
