"""Image features are computed once a prompt, within the byte limit, and again when they did not fit."""

import torch

from megatron_r1v2.generation.features import FeatureCache
from tests.generation.worlds import generate, make_engine, make_prompts


def size_of_one(model, prompt):
    return model.encode_tiles(prompt.tiles_TCHW).numel() * 4


def test_features_are_those_of_the_vision_tower_and_carry_no_graph(one_rank):
    model, _ = one_rank
    prompts = make_prompts(model, 2)
    features = FeatureCache(10**9, tiles_per_pass=3).fill(prompts, model)
    for prompt, features_TFK in zip(prompts, features, strict=True):
        torch.testing.assert_close(features_TFK, model.encode_tiles(prompt.tiles_TCHW).detach())
        assert not features_TFK.requires_grad
        assert not features_TFK.is_inference()


def test_rollouts_and_update_share_one_computation(one_rank):
    model, context = one_rank
    prompts, features = make_prompts(model, 3), FeatureCache(10**9)
    generate(make_engine(model, context), prompts, features, num_responses=4)
    assert (features.prompts_computed, len(features)) == (2, 2)  # the third prompt has no image
    batch_TFK = torch.cat(features.fill(prompts[:2], model))
    assert features.prompts_computed == 2
    features.clear()
    assert (len(features), features.bytes_used) == (0, 0)
    torch.testing.assert_close(torch.cat(features.fill(prompts[:2], model)), batch_TFK)
    assert features.prompts_computed == 4


def test_what_does_not_fit_is_computed_again(one_rank):
    model, _ = one_rank
    prompts = [prompt for prompt in make_prompts(model, 5) if prompt.modality == "image"]
    one = size_of_one(model, prompts[0])
    features = FeatureCache(2 * one + one // 2)
    first = features.fill(prompts, model)
    assert (len(features), features.bytes_used, features.prompts_computed) == (2, 2 * one, len(prompts))
    again = [features.get(prompt, model) for prompt in prompts]
    assert features.prompts_computed == len(prompts) + len(prompts) - 2
    assert features.hits == 2
    for one_TFK, other_TFK in zip(first, again, strict=True):
        torch.testing.assert_close(one_TFK, other_TFK)


def test_rollouts_do_not_depend_on_the_limit(one_rank):
    model, context = one_rank
    prompts = make_prompts(model, 3)
    engine = make_engine(model, context)
    none, all_of_them = (generate(engine, prompts, FeatureCache(limit)) for limit in (0, 10**9))
    assert [rollout.token_ids for rollout in none] == [rollout.token_ids for rollout in all_of_them]


def test_prompts_are_grouped_by_the_tiles_of_a_pass(one_rank):
    model, _ = one_rank
    prompts = [prompt for prompt in make_prompts(model, 5) if prompt.modality == "image"]
    tiles = [prompt.tiles_TCHW.shape[0] for prompt in prompts]
    assert len(prompts) > 2
    for limit in (1, max(tiles), 2 * max(tiles), sum(tiles)):
        groups = list(FeatureCache(0, tiles_per_pass=limit).in_passes(prompts))
        assert [prompt for group in groups for prompt in group] == prompts
        counts = [sum(prompt.tiles_TCHW.shape[0] for prompt in group) for group in groups]
        assert all(count <= limit or len(group) == 1 for count, group in zip(counts, groups, strict=True))
        # No group has room for the first prompt of the next.
        assert all(
            count + following[0].tiles_TCHW.shape[0] > limit
            for count, following in zip(counts, groups[1:], strict=False)
        )
    assert list(FeatureCache(0).in_passes([])) == []


def test_the_engine_embeds_prompts_pass_by_pass(one_rank, monkeypatch):
    model, context = one_rank
    prompts, together = make_prompts(model, 3), []
    fill = FeatureCache.fill
    monkeypatch.setattr(FeatureCache, "fill", lambda cache, few, of: together.append(len(few)) or fill(cache, few, of))
    generate(make_engine(model, context), prompts, FeatureCache(0, tiles_per_pass=1), num_responses=1)
    assert together == [1, 1], "two prompts with images, which never are in memory together"
