"""Rollouts on one rank: what is generated, whatever the engine does with its memory, and what it leaves behind."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch

from megatron_r1v2.generation.cuda_graphs import check_cuda_graphs
from megatron_r1v2.generation.features import FeatureCache
from megatron_r1v2.models.log_probs import token_log_probs
from tests.generation.worlds import MAX_RESPONSE_TOKENS, STOP, VOCABULARY, generate, make_engine, make_prompts


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


def assert_same(found, expected, atol=1e-5):
    assert [(r.prompt_key, r.sample_index, r.finish_reason) for r in found] == [
        (r.prompt_key, r.sample_index, r.finish_reason) for r in expected
    ]
    assert [r.token_ids for r in found] == [r.token_ids for r in expected]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(
            torch.tensor(one.rollout_log_probs), torch.tensor(other.rollout_log_probs), atol=atol, rtol=0
        )


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


def test_samples_policies_and_seeds_draw_their_own_numbers(one_rank, expected):
    model, context = one_rank
    prompts, features = make_prompts(model, 6), FeatureCache(10**9)
    engine = make_engine(model, context)
    assert expected[0].token_ids != expected[1].token_ids
    assert generate(engine, prompts, features) == expected
    for changes in ({"policy_version": 1}, {"seed": 12}):
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
    assert_same(generate(engine, make_prompts(model, 6), FeatureCache(10**9)), expected)


def test_eviction_does_not_change_rollouts(one_rank):
    model, context = one_rank
    prompts = make_prompts(model, 6)
    arguments = {"max_response_tokens": 150, "num_responses": 4}
    roomy = make_engine(model, context)
    roomy.stop_ids = frozenset({100})
    plenty = generate(roomy, prompts, FeatureCache(10**9), **arguments)
    tight = make_engine(model, context, kv_cache_gib=0.001)
    tight.stop_ids = roomy.stop_ids
    found = generate(tight, prompts, FeatureCache(10**9), **arguments)
    assert roomy.num_evictions == 0
    assert tight.num_evictions > 0
    assert_same(found, plenty)
    assert all(len(rollout.token_ids) == len(rollout.rollout_log_probs) for rollout in found)


def test_a_response_does_not_depend_on_its_batch(one_rank, expected):
    model, context = one_rank
    prompts = make_prompts(model, 6)
    found = generate(make_engine(model, context), prompts[3:4], FeatureCache(0))
    assert_same(found, expected[6:8])


def test_images_are_looked_at(one_rank, expected):
    model, context = one_rank
    others = make_prompts(model, 6, seed=0)
    for prompt in others:
        prompt.tiles_TCHW.mul_(3).add_(17)
    found = generate(make_engine(model, context), others, FeatureCache(10**9))
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
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


def test_cache_memory_is_given_back(one_rank):
    model, context = one_rank
    engine = make_engine(model, context, max_requests=64, kv_cache_gib=1.0)

    def live_bytes() -> int:
        storages = {}
        for thing in gc.get_objects():
            if isinstance(thing, torch.Tensor) and type(thing) is torch.Tensor and thing.device.type == "cpu":
                storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        return sum(storages.values())

    gc.collect()
    before, during = live_bytes(), []
    gc.disable()  # the cache must not wait for the garbage collector
    try:
        generate(
            engine, make_prompts(model, 2), FeatureCache(0), progress=lambda *_: during or during.append(live_bytes())
        )
        after = live_bytes()
    finally:
        gc.enable()
    # 64 requests x 2 blocks x 64 tokens x 2 layers x (keys, values) x 2 heads x 24 channels x 4 bytes
    assert during[0] - before > 64 * 2 * 64 * 2 * 2 * 2 * 24 * 4
    assert after - before < 200_000


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
    found = generate(engine, make_prompts(model, 2), FeatureCache(10**9), num_responses=7)
    assert len(found) == 14
    assert_same([found[0], found[1], found[7], found[8]], expected[:4])


def test_top_p_narrows_what_is_drawn(one_rank):
    model, context = one_rank
    arguments = {"top_p": 1e-6, "num_responses": 2}
    found = generate(make_engine(model, context), make_prompts(model, 2), FeatureCache(10**9), **arguments)
    greedy = generate(make_engine(model, context), make_prompts(model, 2), FeatureCache(10**9), temperature=0.0)
    assert_same(found, greedy)


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
    on_gpu = replace(context, device=torch.device("cuda"), tensor_size=2)
    with pytest.raises(ValueError, match=r"parallel.tensor=2 needs NCCL.*the ranks talk over gloo"):
        check_cuda_graphs(on_gpu)
    assert len(generate(engine, [good], features)) == 2, "a refused prompt leaves the engine usable"
