"""A step of the reward model on every layout gives the loss, the gradients and the scores of transformers' autograd."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

from megatron_r1v2.checkpoint.hf.mapping import canonical_hf_name
from megatron_r1v2.config.schema import Packing, ParallelConfig, Recompute
from megatron_r1v2.parallel import objects
from megatron_r1v2.stages.reward_model import pair_loss
from megatron_r1v2.training.batches import RowFormat, collate, filler_sample, response_sample
from megatron_r1v2.training.score_positions import append_pad_token, last_scores
from megatron_r1v2.types import Prompt, Sample
from tests.distributed.steps import gather_gradients, make_policy, make_prompts, parameters_out_of_step
from tests.distributed.test_step import check_gradients
from tests.parallel_layouts import start_layout
from tests.ranks import run_ranks
from tests.tiny_hf import tiny_hf_model, tiny_text_config, tiny_vision_config

VARIANTS: dict[str, dict[str, Any]] = {
    "6b": {
        "family": "6b",
        "vision": tiny_vision_config("6b", heads=5),
        "text": tiny_text_config(vocab_size=301, heads=8),
    },
    "tied": {"family": "300m", "tied": True},
}
# Rows of 8 n + 1 tokens with the end token: without a successor the place of the score would not be in the batch.
LENGTHS = {"two": (9, 4), "one": (12, 2), "other": (7, 7), "text": (5, 14)}
PAIRS = tuple(LENGTHS)
CENTRING = 0.03
SEED = 11
Split = list[list[list[str]]]
"""Of each data-parallel rank: the pairs of each of its microbatches."""
TOGETHER: Split = [[["two", "text"], ["one"], ["other"]]]
UNEQUAL: Split = [[["two", "text"], ["one"]], [["other"]]]
EMPTY: Split = [TOGETHER[0], []]
ALL_PARTS = ("vision", "adapter", "language", "score")


@dataclass(frozen=True)
class Case:
    variant: str
    parallel: dict = field(default_factory=dict)
    split: Split = field(default_factory=lambda: TOGETHER)
    parts: tuple[str, ...] = ALL_PARTS
    packing: Packing = Packing.first_fit_decreasing


@dataclass(frozen=True)
class Expected:
    """The results of autograd."""

    loss: float
    scores: dict[str, float]
    gradients: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Outcome:
    metrics: dict[str, float]
    scores: dict[str, float]
    gradients: dict[str, torch.Tensor]
    out_of_step: list[str]


TP2, SP2, PP2 = {"tensor": 2}, {"tensor": 2, "sequence": True}, {"pipeline": 2}
ONE_RANK = {
    "6b": Case("6b"),
    "tied": Case("tied"),
    "tied, shared": Case("tied", packing=Packing.shared),
    "6b, head alone": Case("6b", parts=("score",)),
}
TWO_RANKS = {
    "6b TP2": Case("6b", TP2),
    "6b SP2": Case("6b", SP2),
    "tied SP2, shared": Case("tied", SP2, packing=Packing.shared),
    "tied PP2": Case("tied", PP2),
    "6b DP2": Case("6b", split=UNEQUAL),
    "6b DP2, a rank without pairs": Case("6b", split=EMPTY),
    "6b SP2, adapter": Case("6b", SP2, parts=("adapter", "score")),
    "6b PP2, head alone": Case("6b", PP2, parts=("score",)),
}


def make_pairs(prompts: dict[str, Prompt]) -> dict[str, Sample]:
    generator = torch.Generator().manual_seed(6)
    samples = {}
    for key, lengths in LENGTHS.items():
        for side, length in enumerate(lengths):
            response = torch.randint(0, 250, (length,), generator=generator).tolist()
            sample = response_sample(prompts[key], response)
            samples[f"{key}/{side}"] = append_pad_token(sample, 0)
    return samples


def head_weight(hidden_size: int) -> torch.Tensor:
    """Return the weight that every layout must start from."""
    return torch.randn(1, hidden_size, generator=torch.Generator().manual_seed(SEED)) / hidden_size**0.5


def transformers_score(model: Any, head: torch.Tensor, sample: Sample, prompt: Prompt) -> torch.Tensor:
    ids = torch.tensor([sample.token_ids[:-1]])
    hidden = model.get_input_embeddings()(ids)
    if prompt.tiles_TCHW.shape[0]:
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        features = model.model.get_image_features(pixel_values=(prompt.tiles_TCHW / 255 - mean) / std).pooler_output
        is_image = ids == model.config.image_token_id
        hidden = hidden.masked_scatter(is_image.unsqueeze(-1), features.reshape(-1, hidden.shape[-1]))
    hidden = model.model.language_model(inputs_embeds=hidden).last_hidden_state
    return hidden[0, -1] @ head[0]


def expect(model: Any) -> Expected:
    prompts = make_prompts(model.config.image_token_id, model.config.image_seq_length)
    head = head_weight(model.config.text_config.hidden_size).requires_grad_()
    model.zero_grad()
    scores = {
        name: transformers_score(model, head, sample, prompts[sample.prompt_key])
        for name, sample in make_pairs(prompts).items()
    }
    pairs = [(scores[f"{key}/0"], scores[f"{key}/1"]) for key in PAIRS]
    losses = [-logsigmoid(chosen - rejected) + CENTRING * (chosen + rejected) ** 2 for chosen, rejected in pairs]
    loss = torch.stack(losses).mean()
    loss.backward()
    gradients = {
        canonical_hf_name(name): weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }
    gradients["score.weight"] = head.grad.clone()
    return Expected(loss.item(), {name: float(score) for name, score in scores.items()}, gradients)


def run_step(folder: str, case: Case) -> Outcome:
    parallel = ParallelConfig(**case.parallel)
    context = start_layout(parallel)
    policy = make_policy(folder, parallel, context, case.parts, Recompute.none, score_seed=SEED)
    policy.packing = case.packing
    model, architecture = policy.model, policy.model.architecture
    prompts = make_prompts(architecture.image_token_id, architecture.tokens_per_tile)
    samples = make_pairs(prompts)

    def batch_of(rows: list[Sample], weight: float = 1.0) -> Any:
        layout = RowFormat(0, architecture.image_token_id, tensor_size=context.tensor_size, device=context.device)
        return collate(rows, prompts, layout, weights=[weight] * len(rows))

    mine = case.split[context.data_rank] if context.data_rank < len(case.split) else []
    names = [[f"{key}/{side}" for key in pairs for side in (0, 1)] for pairs in mine]
    batches = [batch_of([samples[name] for name in rows]) for rows in names]
    scores = {
        name: float(score)
        for rows, batch, values_BS in zip(names, batches, policy.compute_values(batches), strict=True)
        for name, score in zip(rows, last_scores(values_BS, batch), strict=True)
    }
    batches = batches or [batch_of([filler_sample(prompts["two"])] * 2, weight=0.0)]
    loss = partial(pair_loss, denominator=len(PAIRS), centring_weight=CENTRING)
    metrics = policy.update(batches, loss).logged()
    out_of_step = parameters_out_of_step(model, context)
    head = model.score.weight.main_grad.clone() if model.score is not None else None
    if head is not None and context.data_size > 1:
        head = None  # reduce-scattered: `gather_gradients` puts it together
    gradients = gather_gradients(policy, context)
    if head is None and model.score is not None:
        head = model.score.weight.data.clone()
    head = objects.all_gather(head)[-1]
    return Outcome(metrics, scores, gradients | ({"score.weight": head} if context.is_main else {}), out_of_step)


def run_cases(folders: dict[str, str], cases: dict[str, Case]) -> dict[str, Outcome]:
    by_layout = sorted(cases.items(), key=lambda item: str(item[1].parallel))  # their groups start once
    return {name: run_step(folders[case.variant], case) for name, case in by_layout}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, tuple[str, Expected]]:
    root = tmp_path_factory.mktemp("reward")
    return {name: (str(root / name), expect(tiny_hf_model(root / name, **v))) for name, v in VARIANTS.items()}


def on_ranks(world_size: int, models, cases: dict[str, Case]) -> list[dict[str, Outcome]]:
    return run_ranks(world_size, run_cases, {name: folder for name, (folder, _) in models.items()}, cases)


@pytest.fixture(scope="module")
def one_rank(models) -> list[dict[str, Outcome]]:
    return on_ranks(1, models, ONE_RANK)


@pytest.fixture(scope="module")
def two_ranks(models) -> list[dict[str, Outcome]]:
    return on_ranks(2, models, TWO_RANKS)


def check(case: Case, outcomes: list[Outcome], expected: Expected) -> None:
    prefixes = {"vision": "vision_tower.", "adapter": "multi_modal_projector.", "language": "language_model."}
    trained = tuple(prefixes.get(part, "score.") for part in case.parts)
    gradients = {name: value for name, value in expected.gradients.items() if name.startswith(trained)}
    main = outcomes[0]
    check_gradients(main.gradients, gradients)
    assert main.metrics["actor/loss"] == pytest.approx(expected.loss, rel=1e-5)
    norm = sum(float(gradient.double().pow(2).sum()) for gradient in gradients.values()) ** 0.5
    assert main.metrics["actor/grad_norm"] == pytest.approx(norm, rel=1e-5)
    margins = [expected.scores[f"{key}/0"] - expected.scores[f"{key}/1"] for key in PAIRS]
    assert main.metrics["reward_model/margin"] == pytest.approx(sum(margins) / len(PAIRS), rel=1e-4)
    assert main.metrics["reward_model/accuracy"] == sum(margin > 0 for margin in margins) / len(PAIRS)
    found: set[str] = set()
    for outcome in outcomes:
        assert outcome.metrics == main.metrics, "metrics are the same on every rank"
        assert outcome.out_of_step == []
        assert outcome.scores == {n: pytest.approx(expected.scores[n], rel=1e-5, abs=1e-5) for n in outcome.scores}
        found |= outcome.scores.keys()
    assert found == expected.scores.keys()


@pytest.mark.parametrize("name", ONE_RANK)
def test_one_rank_gives_the_step_of_transformers(name, models, one_rank):
    case = ONE_RANK[name]
    check(case, [rank[name] for rank in one_rank], models[case.variant][1])


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks_give_the_step_of_transformers(name, models, two_ranks):
    case = TWO_RANKS[name]
    check(case, [rank[name] for rank in two_ranks], models[case.variant][1])


def test_the_pairs_are_what_the_test_needs(models):
    """Won and lost pairs; a row whose end token is the last of a full batch row."""
    for _, expected in models.values():
        won = [expected.scores[f"{key}/0"] > expected.scores[f"{key}/1"] for key in PAIRS]
        assert any(won)
        assert not all(won)
