"""One number for each response token: the same padded, packed, batched otherwise, or with features from the cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_r1v2.config.schema import Packing
from megatron_r1v2.stages.loaded_model import LoadedModel, open_model
from megatron_r1v2.stages.supervised_data import ResponseEncoder
from megatron_r1v2.training import forward as forward_module
from megatron_r1v2.training.forward import Forward
from megatron_r1v2.types import Sample
from tests.stages.runs import recipe_for

SCORED = ("train.parts=[adapter, score]",)


@pytest.fixture
def loaded(root: Path, tmp_path: Path) -> Iterator[LoadedModel]:
    """Return a reward model, whose output is one number for each token."""
    with open_model(recipe_for(root, tmp_path / "run", SCORED, stage="reward_model"), score_head=True) as opened:
        opened.model.requires_grad_(False).eval()
        yield opened


def values_by_sample(loaded: LoadedModel, forward: Forward, *, tokens: int) -> dict[str, torch.Tensor]:
    prompts = list(loaded.read_prompts(loaded.recipe.data.train, 6))
    encoder = ResponseEncoder(loaded.tokenizer, "<|im_end|>")
    samples: dict[str, Sample] = {prompt.key: encoder.sample(prompt, prompt.response or "") for prompt in prompts}
    settings = loaded.recipe.train.changed(packing=forward.packing, tokens_per_microbatch=tokens)
    microbatcher = loaded.microbatcher(settings)
    microbatches = microbatcher.split(samples, {prompt.key: prompt for prompt in prompts})
    results = forward.compute_values([part.batch for part in microbatches])
    found = {}
    for part, values_BS in zip(microbatches, results, strict=True):
        assert values_BS.shape == part.batch.token_ids_BS.shape
        assert not values_BS.requires_grad
        assert not values_BS[~part.batch.response_mask_BS.bool()].any(), "zero outside the responses"
        for row, name in enumerate(part.names):
            found[name] = values_BS[row, samples[name].response_columns]
    assert all(bool(values.all()) for values in found.values())
    return found


def test_no_batch_gives_no_value(loaded: LoadedModel) -> None:
    assert Forward(model=loaded.model, context=loaded.context).compute_values([]) == []


@pytest.mark.parametrize("change", ["batched otherwise", "shared", "cached features"])
def test_values_do_not_depend_on_how_they_are_computed(loaded: LoadedModel, change: str) -> None:
    separate = Forward(model=loaded.model, context=loaded.context, packing=Packing.first_fit_decreasing)
    alone = values_by_sample(loaded, separate, tokens=1)
    features = loaded.feature_cache() if change == "cached features" else None
    packing = Packing.shared if change == "shared" else Packing.first_fit_decreasing
    other = values_by_sample(loaded, replace(separate, packing=packing, features=features), tokens=1024)
    assert other.keys() == alone.keys()
    for name, values in alone.items():
        torch.testing.assert_close(other[name], values, rtol=1e-4, atol=1e-5)
    if features is not None:
        assert features.prompts_computed == len(features) > 0


def test_no_input_of_a_stage_outlives_its_pass(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_schedule(**_: object) -> list[str]:
        loaded.model.set_input_tensor([torch.ones(3, 1, 2)])  # as megatron-core's does on a later stage
        return ["a result"]

    monkeypatch.setattr(forward_module, "get_forward_backward_func", lambda: run_schedule)
    prompt = next(loaded.read_prompts(loaded.recipe.data.train))
    batch = loaded.microbatcher(loaded.recipe.train).filler(prompt, rows=1)
    forward = Forward(model=loaded.model, context=loaded.context)
    assert forward.run([batch], lambda values_BS, _: (values_BS.sum(), ""), forward_only=True) == ["a result"]
    assert loaded.model.language.decoder.input_tensor is None


def test_what_the_schedule_returns_is_what_finish_gave(loaded: LoadedModel) -> None:
    forward = Forward(model=loaded.model, context=loaded.context)
    prompt = next(loaded.read_prompts(loaded.recipe.data.train))
    batches = [loaded.microbatcher(loaded.recipe.train).filler(prompt, rows=rows) for rows in (1, 1)]
    names = iter(("first", "second"))
    results = forward.run(batches, lambda values_BS, batch: (values_BS.sum(), next(names)), forward_only=True)
    assert results == ["first", "second"]
