"""TRL's DPOTrainer on the same weights and pairs: the same loss, gradients and metrics."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import InternVLForConditionalGeneration, Qwen2ForCausalLM
from trl import DPOConfig, DPOTrainer

from megatron_r1v2.checkpoint.hf.mapping import canonical_hf_name
from megatron_r1v2.config.schema import ParallelConfig, PreferenceConfig, Recompute
from megatron_r1v2.parallel import groups
from megatron_r1v2.rl.mpo import response_log_probs
from megatron_r1v2.stages.mpo import batch_loss
from megatron_r1v2.types import Prompt, Sample, TrainingBatch
from tests.distributed.steps import Material, collate_microbatch, gather_gradients, make_policy
from tests.tiny_hf import randomise, tiny_byte_tokenizer, tiny_hf_model

WEIGHTS = (0.8, 0.2, 1.0)
BETA = 0.3
PAIRS = (
    ("What is 3 + 5?", "3+5=8</think>8", "9"),
    ("Left?", "left 4", "left 4, I think, or 5"),
    ("a", "b", "c"),
)


def language_of(model: InternVLForConditionalGeneration) -> Qwen2ForCausalLM:
    language = Qwen2ForCausalLM(model.config.text_config)
    language.model.load_state_dict(model.model.language_model.state_dict())
    language.lm_head.load_state_dict(model.lm_head.state_dict())
    return language


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Return a policy and its reference, which differ a little."""
    root = tmp_path_factory.mktemp("models")
    policy = tiny_hf_model(root / "policy")
    other = tiny_hf_model(root / "reference")
    noise = Qwen2ForCausalLM(policy.config.text_config)
    randomise(noise, seed=9)
    with torch.no_grad():
        for name, weight in other.model.language_model.named_parameters():
            weight.add_(0.05 * noise.model.get_parameter(name))
    other.save_pretrained(root / "reference")
    return root / "policy", root / "reference"


@pytest.fixture(scope="module")
def theirs(folders: tuple[Path, Path], tmp_path_factory) -> dict[str, Any]:
    """Run TRL's trainer up to the gradients of its first batch."""
    policy, reference = (language_of(InternVLForConditionalGeneration.from_pretrained(path)) for path in folders)
    rows = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in PAIRS]
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=DPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            loss_type=["sigmoid", "bco_pair", "sft"],
            loss_weights=list(WEIGHTS),
            beta=BETA,
            per_device_train_batch_size=len(PAIRS),
            use_cpu=True,
            bf16=False,
            report_to="none",
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_byte_tokenizer(),
    )
    loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    loss.backward()
    return {
        "loss": loss.item(),
        "gradients": {name: weight.grad for name, weight in policy.named_parameters()},
        "metrics": {name: values[0] for name, values in trainer._metrics["train"].items()},
        "rows": list(trainer.train_dataset),
    }


def material_of(rows: list[dict]) -> Material:
    prompts, samples = {}, {}
    for index, row in enumerate(rows):
        key = str(index)
        tiles = torch.zeros(0, 3, 32, 32, dtype=torch.uint8)
        prompts[key] = Prompt(key, (), tuple(row["prompt_ids"]), tiles, "", "exact")
        for side in ("chosen", "rejected"):
            samples[f"{key}/{side}"] = Sample(
                key,
                0,
                (*row["prompt_ids"], *row[f"{side}_ids"]),
                len(row["prompt_ids"]),
                "text",
            )
    return Material(prompts, samples)


@pytest.mark.parametrize("pairs_together", [1, 3])
def test_loss_gradients_and_metrics_are_those_of_trl(
    folders: tuple[Path, Path], theirs: dict[str, Any], pairs_together: int
) -> None:
    material = material_of(theirs["rows"])
    settings = PreferenceConfig(
        preference_weight=WEIGHTS[0], quality_weight=WEIGHTS[1], generation_weight=WEIGHTS[2], beta=BETA
    )
    tokens = sum(sample.response_length for name, sample in material.samples.items() if name.endswith("chosen"))
    parallel = ParallelConfig()
    context = groups.initialize(parallel, seed=1)
    try:
        names = list(material.samples)
        batches: list[TrainingBatch] = []
        for folder in reversed(folders):
            policy = make_policy(str(folder), parallel, context, ("language",), Recompute.none)
            policy.temperature, policy.vocab_size = 1.0, 300
            if not batches:
                batches = [
                    collate_microbatch(material, names[at : at + 2 * pairs_together], policy.model, context)
                    for at in range(0, len(names), 2 * pairs_together)
                ]
                batches = [
                    replace(batch, reference_sums_B=response_log_probs(log_probs_BS, batch.response_mask_BS))
                    for batch, log_probs_BS in zip(batches, policy.compute_log_probs(batches), strict=True)
                ]
        loss = partial(
            batch_loss,
            settings=settings,
            aggregation="token",
            delta=0.0,
            num_pairs=len(PAIRS),
            generation_denominator=tokens,
        )
        metrics = policy.update(batches, loss).logged()
        gradients = gather_gradients(policy, context)
    finally:
        groups.shut_down()
    assert metrics["actor/loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    assert abs(metrics["rewards/margins"]) > 0.05, "a policy that is its reference would hide the signs"
    for name in ("chosen", "rejected", "margins", "accuracies"):
        assert metrics[f"rewards/{name}"] == pytest.approx(theirs["metrics"][f"rewards/{name}"], rel=1e-4, abs=1e-5)
    for name in ("logps/chosen", "logps/rejected"):
        assert metrics[name] == pytest.approx(theirs["metrics"][name], rel=1e-5)
    wrong = {}
    for name, expected in theirs["gradients"].items():
        hf_name = (
            name.replace("model.", "language_model.model.", 1)
            if name.startswith("model.")
            else f"language_model.{name}"
        )
        got = gradients[canonical_hf_name(hf_name)]
        error = float((got - expected).abs().max() / expected.abs().max())
        if not error < 1e-4:
            wrong[name] = error
    assert not wrong
