"""Given responses as samples: their tokens, their pairs, their shares of the ranks, and the update on them."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_r1v2.config.schema import TrainConfig
from megatron_r1v2.data.tokenizer import ChatTokenizer
from megatron_r1v2.stages.supervised_data import (
    SIDES,
    PairSource,
    ResponseEncoder,
    pair_samples,
    shard_samples,
    take_update,
)
from megatron_r1v2.training.batches import RowFormat
from megatron_r1v2.training.microbatches import Microbatcher
from megatron_r1v2.training.policy import UpdateResult
from megatron_r1v2.types import Preference, Prompt
from tests.stages.scripted import IMAGE_TOKEN, make_prompt, make_sample

SOURCE = PairSource("mpo", "data.train='/pairs'")


def with_pair(key: str, chosen: str = "left 3, ", rejected: str = "left 4, </think>") -> Prompt:
    prompt = make_prompt(key, tiles=1)
    return type(prompt)(**vars(prompt) | {"preference": Preference(chosen, rejected)})


@pytest.fixture
def encoder(root: Path) -> ResponseEncoder:
    return ResponseEncoder(ChatTokenizer(root / "model"), "<|im_end|>")


def test_a_response_gets_the_end_token(encoder: ResponseEncoder) -> None:
    prompt = make_prompt("p", tiles=1)
    sample = encoder.sample(prompt, "left 3, </think>", index=1)
    response = sample.token_ids[sample.prompt_length :]
    assert sample.token_ids[: sample.prompt_length] == prompt.token_ids
    assert encoder.tokenizer.decode(list(response[:-1])) == "left 3, </think>"
    assert response[-1] == encoder.tokenizer.token_id("<|im_end|>")
    assert (sample.sample_index, sample.rl) == (1, None)


def test_the_two_of_a_pair_are_named_and_ordered(encoder: ResponseEncoder) -> None:
    prompts = [with_pair("a"), with_pair("b", chosen="left 4, ", rejected="left 3, </think>")]
    samples, units = pair_samples(prompts, SOURCE, encoder)
    assert units == {"a": ("a/chosen", "a/rejected"), "b": ("b/chosen", "b/rejected")}
    assert samples["a/chosen"] == encoder.sample(prompts[0], "left 3, ")
    assert samples["b/rejected"] == encoder.sample(prompts[1], "left 3, </think>", index=1)
    chosen, units = pair_samples(prompts, SOURCE, encoder, sides=SIDES[:1])
    assert (list(chosen), units["b"]) == (["a/chosen", "b/chosen"], ("b/chosen",))


def test_a_prompt_without_a_pair_is_named_with_its_data_set_and_stage(encoder: ResponseEncoder) -> None:
    with pytest.raises(
        ValueError, match="'p' of data.train='/pairs' has no pair of responses; the mpo stage trains on"
    ):
        pair_samples([make_prompt("p", tiles=0)], SOURCE, encoder)


@pytest.mark.parametrize("paired", [False, True])
def test_ranks_share_the_samples_and_pairs_stay_together(paired: bool) -> None:
    prompts = [make_prompt(f"p{index}", tiles=0) for index in range(3)]
    samples = {
        f"{prompt.key}/{side}": make_sample(prompt, side, length=3 + 4 * index + side)
        for index, prompt in enumerate(prompts)
        for side in range(2)
    }
    units = {prompt.key: (f"{prompt.key}/0", f"{prompt.key}/1") for prompt in prompts} if paired else None
    rows = RowFormat(99, IMAGE_TOKEN, tensor_size=1, device=torch.device("cpu"))
    microbatcher = Microbatcher(TrainConfig(tokens_per_microbatch=1), rows)
    held = []
    for rank in range(2):
        context: Any = SimpleNamespace(data_size=2, data_rank=rank)
        parts = shard_samples(samples, prompts, units, microbatcher=microbatcher, context=context)
        held.append([name for part in parts for name in part.names])
        if paired:
            assert all(part.names[0][:-1] == part.names[1][:-1] for part in parts)
    assert sorted(held[0] + held[1]) == sorted(samples)
    assert min(map(len, held)) >= 2


@pytest.mark.parametrize("reason", [None, "its gradient is not finite"])
def test_an_update_is_noted_with_its_rate_and_whether_it_was_made(reason: str | None) -> None:
    result = UpdateResult(reason, None if reason else 0.5, 1.5, (), {} if reason else {"actor/nll": 0.5})
    noted: dict[str, float] = {}
    recorder: Any = SimpleNamespace(note=noted.update, timed=lambda phase: nullcontext())
    policy: Any = SimpleNamespace(
        optimizer=SimpleNamespace(param_groups=[{"lr": 0.25}]),
        update=lambda batches, loss: result,
        count_tokens=lambda phase, batches: {},
    )
    assert take_update(policy, [], lambda values_BS, batch: (values_BS, {}), recorder=recorder) is result
    made = {"actor/nll": 0.5, "actor/loss": 0.5, "actor/grad_norm": 1.5}
    assert noted == {"actor/lr": 0.25, "actor/skipped_updates": float(bool(reason)), **({} if reason else made)}
