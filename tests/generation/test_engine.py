"""Rollouts on one rank: what is generated, whatever the engine does with its memory, and what it leaves behind."""

from __future__ import annotations

import pytest
import torch

from megatron_r1v2.generation.features import FeatureCache
from tests.generation.worlds import (
    MAX_RESPONSE_TOKENS,
    assert_same_rollouts,
    generate,
    generate_in_segments,
    make_engine,
    make_prompts,
)


@pytest.fixture(scope="module")
def expected(one_rank):
    """Return what a roomy engine generates for six prompts."""
    model, context = one_rank
    return generate(make_engine(model, context), make_prompts(model, 6), FeatureCache(10**9))


def test_samples_steps_and_seeds_draw_their_own_numbers(one_rank, expected):
    model, context = one_rank
    prompts, features = make_prompts(model, 6), FeatureCache(10**9)
    engine = make_engine(model, context)
    assert expected[0].token_ids != expected[1].token_ids
    assert generate(engine, prompts, features) == expected
    for changes in ({"step": 1}, {"seed": 12}):
        others = generate(engine, prompts, features, **changes)
        assert all(one.token_ids != other.token_ids for one, other in zip(others, expected, strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {"max_requests": 3},
        {"max_requests": 8, "max_tokens_per_step": 24},  # chunks end inside images, which have 32 tokens
        {"max_requests": 4, "max_tokens_per_step": 512, "kv_cache_gib": 0.0006},
    ],
    ids=["few at a time", "chunked prefill", "little memory"],
)
def test_scheduling_does_not_change_rollouts(one_rank, expected, settings):
    model, context = one_rank
    engine = make_engine(model, context, **settings)
    assert_same_rollouts(generate(engine, make_prompts(model, 6), FeatureCache(10**9)), expected)


def test_eviction_does_not_change_rollouts(one_rank):
    model, context = one_rank
    prompts = make_prompts(model, 6)
    arguments = {"max_response_tokens": 150, "num_responses": 4}
    roomy = make_engine(model, context)
    roomy.stop_ids = frozenset({100})
    plenty = generate(roomy, prompts, FeatureCache(10**9), **arguments)
    tight = make_engine(model, context, kv_cache_gib=0.001)
    tight.stop_ids = roomy.stop_ids
    results = generate(tight, prompts, FeatureCache(10**9), **arguments)
    assert roomy.num_evictions == 0
    assert tight.num_evictions > 0
    assert_same_rollouts(results, plenty)
    assert all(len(rollout.token_ids) == len(rollout.rollout_log_probs) for rollout in results)


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_requests": 8, "max_tokens_per_step": 24}, {"max_requests": 4, "kv_cache_gib": 0.0006}],
    ids=["roomy", "chunked prefill", "little memory"],
)
def test_a_response_in_segments_is_the_same(one_rank, expected, settings):
    model, context = one_rank
    engine = make_engine(model, context, **settings)
    results, phases = generate_in_segments(engine, make_prompts(model, 6), FeatureCache(10**9), 5)
    assert_same_rollouts(results, expected)
    assert phases == -(-max(len(rollout.token_ids) for rollout in expected) // 5)
    assert phases > 2


def test_a_segment_ends_at_its_bound_and_says_so(one_rank, expected):
    model, context = one_rank
    engine = make_engine(model, context)
    results = generate(engine, make_prompts(model, 6), FeatureCache(10**9), segment_tokens=5, step=3)
    assert {rollout.step for rollout in results} == {3}
    in_one_piece = generate(engine, make_prompts(model, 6), FeatureCache(10**9), step=3)
    for rollout, whole in zip(results, in_one_piece, strict=True):
        goes_on = len(whole.token_ids) > 5
        assert rollout.finish_reason == ("segment" if goes_on else whole.finish_reason)
        assert rollout.token_ids == whole.token_ids[:5]
    exact = generate(engine, make_prompts(model, 6), FeatureCache(10**9), segment_tokens=MAX_RESPONSE_TOKENS)
    assert_same_rollouts(exact, expected)


def test_a_response_does_not_depend_on_its_batch(one_rank, expected):
    model, context = one_rank
    prompts = make_prompts(model, 6)
    results = generate(make_engine(model, context), prompts[3:4], FeatureCache(0))
    assert_same_rollouts(results, expected[6:8])


def test_phases_before_and_after_a_training_step_are_equal(one_rank, expected):
    """Also at the length the engine rounds to, with recompute: nothing made for inference may reach the graph."""
    model, context = one_rank
    prompts, features = make_prompts(model, 6), FeatureCache(10**9)
    engine = make_engine(model, context)
    twins = [prompts[0]] * 4
    model.train()
    first, first_twins = generate(engine, prompts, features), generate(engine, twins, features, temperature=0.0)
    assert model.training
    config = model.language.config
    config.recompute_granularity, config.recompute_method, config.recompute_num_layers = "full", "uniform", 1
    try:
        for length in (128, 96):
            token_ids = torch.randint(0, 100, (1, length))
            gradients_of(model, token_ids, features.get(prompts[0], model))
    finally:
        config.recompute_granularity = config.recompute_method = config.recompute_num_layers = None
    assert first == expected
    assert generate(engine, prompts, features) == first
    again = generate(engine, twins, features, temperature=0.0)
    assert again == first_twins
    assert len({rollout.token_ids for rollout in again}) == 1
    model.eval()


def gradients_of(model, token_ids, features):
    image_tokens = features.shape[0] * features.shape[1]
    token_ids[0, :image_tokens] = model.architecture.image_token_id
    logits = model(token_ids, torch.arange(token_ids.shape[1])[None], features_TFK=features)
    logits.float().square().mean().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "vision" not in name)
    model.zero_grad(set_to_none=True)


def test_prompts_are_taken_as_there_is_room(one_rank):
    model, context = one_rank
    taken, seen = [], []
    prompts = make_prompts(model, 6)

    def source():
        for prompt in prompts:
            taken.append(prompt.key)
            yield prompt

    rollouts = generate(
        make_engine(model, context, max_requests=4),
        source(),
        FeatureCache(10**9),
        progress=lambda finished, tokens: seen.append((len(taken), finished, tokens)),
    )
    assert seen[0] == (2, 0, 0)
    assert seen[-1] == (6, 12, sum(len(rollout.token_ids) for rollout in rollouts))
    assert all(2 * started - finished <= 4 + 2 for started, finished, _ in seen)


def test_more_responses_than_requests_at_once(one_rank, expected):
    model, context = one_rank
    engine = make_engine(model, context, max_requests=4)
    results = generate(engine, make_prompts(model, 2), FeatureCache(10**9), num_responses=7)
    assert len(results) == 14
    assert_same_rollouts([results[0], results[1], results[7], results[8]], expected[:4])


def test_bad_prompts_and_settings_are_named(one_rank):
    model, context = one_rank
    good = make_prompts(model, 1)[0]
    engine, features = make_engine(model, context), FeatureCache(10**9)
    long = type(good)(**{**vars(good), "key": "long", "token_ids": good.token_ids + (9,) * 40})
    with pytest.raises(ValueError, match=r"prompt 'long' has \d+ tokens.*data.max_prompt_tokens=64"):
        generate(engine, [good, long], features)
    lost = type(good)(**{**vars(good), "key": "lost", "tiles_TCHW": good.tiles_TCHW[:1]})
    with pytest.raises(ValueError, match=r"prompt 'lost' has 32 <IMG_CONTEXT> tokens.*1 tiles give 16"):
        generate(engine, [lost], features)
    with pytest.raises(ValueError, match=r"generation.kv_cache_gib=1e-06 holds 0 blocks.*give at least 0\.\d+"):
        generate(make_engine(model, context, kv_cache_gib=1e-6), [good], features)
    with pytest.raises(ValueError, match=r"generation.max_tokens_per_step=8 .*generation.max_requests=64"):
        make_engine(model, context, max_tokens_per_step=8)
    with pytest.raises(ValueError, match=r"generation.cuda_graphs=true needs a CUDA device and there is none"):
        generate(make_engine(model, context, cuda_graphs=True), [good], features)
    assert len(generate(engine, [good], features)) == 2, "a refused prompt leaves the engine usable"
