"""The demands of recipes: rows, microbatches, phases, and what the engine holds at once."""

from dataclasses import replace

import pytest

from megatron_r1v2.config.choices import StageName
from megatron_r1v2.config.load import load_recipe
from megatron_r1v2.data.packing import PromptLengths, share_prompts
from megatron_r1v2.planning.parameters import Layout
from megatron_r1v2.planning.workload import RehearsedStep, Workload
from tests.planning.plans import ARCHITECTURE, RECIPE, small_work, workload

WHOLE = RehearsedStep(images=2, rows=8, validated=1)


@pytest.mark.parametrize(
    ("stage", "changes", "phases"),
    [
        (StageName.grpo, {}, ["gate", "generate", "update"]),
        (StageName.grpo, {"updates_per_step": 2}, ["gate", "generate", "log_probs", "update"]),
        (StageName.grpo, {"has_reward_model": True}, ["gate", "generate", "reward", "update"]),
        (StageName.grpo, {"validated": 4}, ["gate", "generate", "update", "evaluate"]),
        (StageName.align, {"validated": 4}, ["update", "evaluate"]),
        (StageName.mpo, {}, ["reference", "update"]),
        (StageName.reward_model, {}, ["update"]),
        (StageName.reward_model, {"validated": 4}, ["update", "validate"]),
        (StageName.pairs, {"has_reward_model": True}, ["generate"]),
    ],
)
def test_each_stage_has_its_phases(stage, changes, phases):
    assert list(small_work(stage=stage, **changes).phases) == phases


@pytest.mark.parametrize(
    ("overrides", "lies_beside"),
    [
        ((), False),
        (("reward.model_weight=0.5", "reward_model.checkpoint=runs/reward"), True),
        (("reward.model_weight=0.5", "reward_model.url=http://127.0.0.1:8001/pooling"), False),
    ],
)
def test_a_reward_model_is_loaded_where_it_is_weighed_and_not_served(overrides, lies_beside):
    assert workload(*overrides).has_reward_model is lies_beside
    recipe = load_recipe(RECIPE, overrides)
    assert not Workload.from_recipe(recipe, ARCHITECTURE, stage=StageName.mpo).has_reward_model


@pytest.mark.parametrize(
    ("prompt", "response", "responses", "packed"),
    [(10, 7, 2, 40), (10, 7, 4, 40), (10, 7, 8, 200), (3, 30, 8, 64), (50, 7, 3, 300), (9, 8, 8, 16)],
)
def test_the_longest_rows_are_packed_as_the_stages_pack_them(prompt, response, responses, packed):
    work = small_work(
        shares_prompts=True,
        prompt_tokens=prompt,
        response_tokens=response,
        responses_per_prompt=responses,
        packed_tokens=packed,
        rehearsed=replace(WHOLE, rows=12 * responses),
    )
    groups = [PromptLengths(prompt - 1, {f"{key}/{n}": response for n in range(responses)}) for key in range(12)]
    rows = share_prompts(groups, packed // 8 * 8)
    prompts = [{name.split("/")[0] for name in row} for row in rows]
    tokens = [len(keys) * (prompt - 1) + len(row) * response for keys, row in zip(prompts, rows, strict=True)]
    fullest = max(range(len(rows)), key=lambda row: tokens[row])
    shape = work.microbatch(1)
    assert shape.tokens == -(-tokens[fullest] // 8) * 8
    assert shape.tiles == 2 * len(prompts[fullest])
    assert work.rows_of_microbatch(1) == len(rows[fullest])


@pytest.mark.parametrize(
    ("shares", "rows", "tokens", "held", "tiles"),
    [
        # Rows of 16 tokens; shared: 9 of the prompt and 7 of each response.
        (False, 1, 16, 1, 2),
        (False, 3, 48, 3, 4),
        (False, 99, 192, 12, 12),
        (True, 1, 16, 1, 2),
        (True, 3, 40, 3, 4),
        (True, 99, 184, 16, 16),
    ],
)
def test_a_microbatch_holds_no_more_than_the_rows_of_a_rehearsed_step(shares, rows, tokens, held, tiles):
    step = RehearsedStep(images=8, rows=rows, validated=1)
    work = small_work(shares_prompts=shares, responses_per_prompt=2, packed_tokens=200, rehearsed=step)
    shape = work.microbatch(1)
    assert (shape.tokens, work.rows_of_microbatch(1), shape.tiles) == (tokens, held, tiles)
    assert work.microbatches(Layout()) == 1


def test_the_bytes_of_microbatches_by_hand():
    # Four rows of 17 tokens: one a microbatch; 37 bytes a token, and no tiles.
    work = small_work(packed_tokens=16)
    assert work.batch_bytes(Layout()) == 4 * 16 * 37
    assert work.batch_bytes(Layout(data=2)) == 2 * 16 * 37


def test_the_engine_of_a_replica_holds_what_it_is_given():
    work = small_work(max_requests=6, responses_per_prompt=2, prompts_per_step=10, validated=9, validated_runs=3)
    assert [work.requests(Layout(), phase) for phase in ("gate", "generate", "evaluate")] == [2, 6, 6]
    assert [work.images_in_flight(Layout(), phase) for phase in ("gate", "generate", "evaluate")] == [1, 3, 2]
    spread = Layout(data=5)
    assert [work.requests(spread, phase) for phase in ("generate", "evaluate")] == [4, 6]
    assert work.images_in_flight(spread, "generate") == 2
    step = replace(work, rehearsed=WHOLE)
    assert (step.requests(Layout(), "evaluate"), step.images_in_flight(Layout(), "generate")) == (1, 2)
    # 32 tiles at once: 16 prompts of two.
    crowd = replace(work, max_requests=100, prompts_per_step=50)
    assert (crowd.images_in_flight(Layout(), "generate"), crowd.images_of_pass(Layout(), "generate")) == (50, 16)


def test_a_validation_of_an_unknown_number_of_prompts_fills_the_engine():
    given = ["data.validation=somewhere", "evaluation.every_steps=5"]
    assert workload(*given, "evaluation.prompts=30").validated == 30
    assert workload(*given, "evaluation.prompts=0").validated == workload().max_requests
    assert workload("evaluation.every_steps=0").validated == 0
    pairs = Workload.from_recipe(load_recipe(RECIPE, given), ARCHITECTURE, stage=StageName.pairs)
    assert pairs.validated == 0


def test_a_score_is_read_at_the_last_token_of_a_response():
    work = small_work(stage=StageName.reward_model, responses_per_prompt=2, shares_prompts=True, packed_tokens=8)
    assert work.row_tokens(1) == 24, "10 + 7 tokens, all of them inputs"
    assert work.microbatch(1).tokens == 32, "9 + 2 x 8"
    assert replace(work, stage=StageName.mpo).row_tokens(1) == 16
