"""One optimizer step in some layout, beside what transformers' autograd gives for the same samples."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch.nn.functional import log_softmax

from megatron_r1v2.checkpoint.hf.architecture import r1v2_architecture
from megatron_r1v2.checkpoint.hf.mapping import canonical_hf_name
from megatron_r1v2.checkpoint.hf.weights import load_hf_weights
from megatron_r1v2.config.schema import AlgorithmConfig, Packing, ParallelConfig, Part, Recompute, TrainConfig
from megatron_r1v2.models.r1v2 import R1V2Model, build_r1v2, freeze_all_but
from megatron_r1v2.models.settings import ComputeSettings
from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.resilience.skipped_updates import SkippedUpdates
from megatron_r1v2.stages.grpo.updates import batch_loss
from megatron_r1v2.training.batches import RowFormat, collate, filler_sample
from megatron_r1v2.training.optimizer import build_optimizer, wrap_with_ddp
from megatron_r1v2.training.policy import Policy, UpdateResult
from megatron_r1v2.types import Prompt, RLTargets, Sample, TrainingBatch
from tests.parallel_layouts import start_layout
from tests.whole_weights import gather_hf_weights

TEMPERATURE = 0.7
VOCABULARY = 265
"""Ids that can be drawn; the embedding has 300 rows."""
ALL_PARTS = ("vision", "adapter", "language")
LEFT_OUT = 3
"""Samples of zero advantage: they are in the denominator only."""
CLIP = 0.2

Split = Sequence[Sequence[Sequence[str]]]
"""Of each data-parallel rank: sample ids of each of its microbatches."""


@dataclass(frozen=True)
class Material:
    """Prompts and samples with old log-probs near those of the model, and what a step on them must give."""

    prompts: dict[str, Prompt]
    samples: dict[str, Sample]
    log_probs: dict[str, torch.Tensor] = field(default_factory=dict)
    logits: dict[str, torch.Tensor] = field(default_factory=dict)
    """Of every token of a row, the whole vocabulary."""
    loss: float = 0.0
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """The result of a step; gradients and log-probs on the main rank and empty elsewhere."""

    metrics: dict[str, float]
    gradients: dict[str, torch.Tensor]
    log_probs: dict[str, torch.Tensor]
    logits: dict[str, torch.Tensor]
    """Of the padded rows, on the last stage; empty where they are shared."""
    out_of_step: list[str]
    """Parameters that ranks which should hold the same no longer agree about."""
    largest_padding: float
    """Largest weight of a head that is only there to make the heads divide, after the step."""


def make_prompts(image_token_id: int, tokens_per_tile: int) -> dict[str, Prompt]:
    """Return prompts with an image of two tiles, one of one tile, two images of one and two tiles, and none."""
    generator = torch.Generator().manual_seed(5)
    prompts = {}
    for key, images in (("two", (2,)), ("one", (1,)), ("other", (1, 2)), ("text", ())):
        words = torch.randint(0, 250, (5 + len(prompts),), generator=generator).tolist()
        token_ids = words[:2]
        for number, tiles in enumerate(images):
            token_ids += [*[image_token_id] * (tiles * tokens_per_tile), words[2 + number]]
        prompts[key] = Prompt(
            key=key,
            messages=(),
            token_ids=(*token_ids, *words[2 + len(images) :]),
            tiles_TCHW=torch.randint(0, 256, (sum(images), 3, 32, 32), generator=generator, dtype=torch.uint8),
        )
    return prompts


def make_samples(prompts: Mapping[str, Prompt], image_token_id: int) -> dict[str, Sample]:
    """Return samples of unequal lengths; in two of them `<IMG_CONTEXT>` is a word of the response."""
    generator = torch.Generator().manual_seed(6)
    samples = {}
    lengths = {"two/0": 9, "two/1": 1, "one/0": 12, "one/1": 4, "other/0": 7, "text/0": 5, "text/1": 14}
    for index, (name, length) in enumerate(lengths.items()):
        prompt = prompts[name.split("/")[0]]
        response = torch.randint(0, 250, (length,), generator=generator).tolist()
        if name in ("one/0", "text/0"):
            response[2] = image_token_id
        samples[name] = Sample(
            prompt_key=prompt.key,
            sample_index=int(name[-1]),
            token_ids=(*prompt.token_ids, *response),
            prompt_length=len(prompt.token_ids),
            modality=prompt.modality,
            rl=targets(length, advantage=(1.3, -0.7, -1.1, 0.4, 0.9, 1.7, -0.6)[index]),
        )
    return samples


def targets(length: int, *, advantage: float, old_log_probs: tuple[float, ...] = ()) -> RLTargets:
    return RLTargets((0.0,) * length, advantage, 0.0, 0, group_effective=True, old_log_probs=old_log_probs)


def rl_of(sample: Sample) -> RLTargets:
    assert sample.rl is not None
    return sample.rl


def logits_of(model: Any, sample: Sample, prompt: Prompt) -> torch.Tensor:
    """Compute the logits of a row with transformers, image features only where the prompt has them."""
    ids = torch.tensor([sample.token_ids])
    hidden = model.get_input_embeddings()(ids)
    if prompt.tiles_TCHW.shape[0]:
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        pixels = ((prompt.tiles_TCHW / 255 - mean) / std).to(hidden.dtype)
        features = model.model.get_image_features(pixel_values=pixels).pooler_output
        is_image = ids == model.config.image_token_id
        is_image[:, sample.prompt_length :] = False
        hidden = hidden.masked_scatter(is_image.unsqueeze(-1), features.reshape(-1, hidden.shape[-1]))
    hidden = model.model.language_model(inputs_embeds=hidden).last_hidden_state
    return model.lm_head(hidden)[0, :-1]


def response_log_probs(logits_SV: torch.Tensor, sample: Sample) -> torch.Tensor:
    labels = torch.tensor(sample.token_ids[sample.prompt_length :])
    tempered = logits_SV[sample.prompt_length - 1 :, :VOCABULARY].float() / TEMPERATURE
    return log_softmax(tempered, -1).gather(1, labels[:, None])[:, 0]


def make_material(model: Any) -> Material:
    """Write down by transformers' autograd and the formula (equation 8, sequence mean) what a step must give."""
    prompts = make_prompts(model.config.image_token_id, model.config.image_seq_length)
    samples = make_samples(prompts, model.config.image_token_id)
    noise = torch.Generator().manual_seed(7)
    for name, sample in samples.items():
        with torch.no_grad():
            values = response_log_probs(logits_of(model, sample, prompts[sample.prompt_key]), sample)
        old = values + 0.2 * torch.randn(values.shape, generator=noise)
        samples[name] = replace(sample, rl=replace(rl_of(sample), old_log_probs=tuple(old.tolist())))
    return step_of_transformers(model, prompts, samples)


def step_of_transformers(model: Any, prompts: dict[str, Prompt], samples: dict[str, Sample]) -> Material:
    """Compute log-probs, logits, loss and gradients of given samples in the dtype of the model."""
    model.zero_grad()
    log_probs, logits, losses = {}, {}, []
    for name, sample in samples.items():
        row = logits_of(model, sample, prompts[sample.prompt_key])
        values = response_log_probs(row, sample)
        ratio = (values - torch.tensor(rl_of(sample).old_log_probs)).exp()
        advantage = rl_of(sample).advantage
        objective = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
        losses.append(-objective.mean() / (len(samples) + LEFT_OUT))
        log_probs[name], logits[name] = values.detach(), row.detach()
    loss = torch.stack(losses).sum()
    loss.backward()
    gradients = {canonical_hf_name(name): weight.grad.float().clone() for name, weight in model.named_parameters()}
    return Material(prompts, samples, log_probs, logits, loss.item(), gradients)


def run_step(
    folder: str,
    material: Material,
    parallel: ParallelConfig,
    split: Split,
    *,
    parts: Sequence[str] = ALL_PARTS,
    recompute: Recompute = Recompute.none,
    packing: Packing = Packing.first_fit_decreasing,
    compute: Mapping[str, Any] | None = None,
) -> Outcome:
    """Set up a layout, after another one if need be, and take one step there; `compute` changes ComputeSettings."""
    context = start_layout(parallel)
    policy = make_policy(folder, parallel, context, parts, recompute, **(compute or {}))
    policy.packing = packing
    batches = [
        collate_microbatch(material, names, policy.model, context)
        for names in (split[context.data_rank] if context.data_rank < len(split) else ())
    ]
    by_forward = policy.compute_log_probs(batches)
    log_probs = named_log_probs(material, split, by_forward, context)
    logits = named_logits(material, split, [] if packing is Packing.shared else whole_logits(policy, batches))
    batches = batches or [filler(material, policy.model, context)]
    loss = partial(
        batch_loss,
        algorithm=AlgorithmConfig(clip_low=CLIP, clip_high=CLIP),
        aggregation="sequence",
        denominator=len(material.samples) + LEFT_OUT,
    )
    result = policy.update(batches, loss)
    check_log_probs_of_update(result, by_forward, context)
    out_of_step = parameters_out_of_step(policy.model, context)
    padding = largest_padding(policy.model, context)
    return Outcome(result.logged(), gather_gradients(policy, context), log_probs, logits, out_of_step, padding)


def check_log_probs_of_update(
    result: UpdateResult, by_forward: Sequence[torch.Tensor], context: ParallelContext
) -> None:
    """Compare the log-probs that an update gives with those of the forward pass before it, where there are any."""
    if not context.is_last_stage:
        assert result.log_probs == ()
        return
    for ours, theirs in zip(result.log_probs, by_forward, strict=False):  # a filler has no forward pass before
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert len(result.log_probs) == max(1, len(by_forward))
    assert not any(log_probs_BS.requires_grad for log_probs_BS in result.log_probs)


def make_policy(
    folder: str,
    parallel: ParallelConfig,
    context: ParallelContext,
    parts: Sequence[str],
    recompute: Recompute,
    *,
    score_seed: int | None = None,
    **compute: Any,
) -> Policy:
    """Load the model and wrap it as the stages do; no clipping, which would scale the gradients.

    With `score_seed` it is a reward model, whose head is drawn from it.
    """
    architecture = r1v2_architecture(json.loads((Path(folder) / "config.json").read_text()))
    settings = ComputeSettings(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        sequence=parallel.sequence,
        first_stage_layers=parallel.first_stage_layers,
        recompute=recompute,
        **compute,
    )
    model = build_r1v2(architecture, settings, groups=context.groups, device=context.device, score_seed=score_seed)
    load_hf_weights(model, folder, context, cast=True)
    freeze_all_but(model, [Part(part) for part in parts])
    ddp = wrap_with_ddp(model, context)
    optimizer, scheduler = build_optimizer(ddp, TrainConfig(clip_grad=0.0, learning_rate=1e-3, steps=2))
    return Policy(
        model=model,
        ddp=ddp,
        optimizer=optimizer,
        scheduler=scheduler,
        context=context,
        temperature=TEMPERATURE,
        skipped=SkippedUpdates(Path("skipped"), max_gradient_norm=0.0, context=context),
        vocab_size=VOCABULARY,
    )


def collate_microbatch(
    material: Material,
    names: Sequence[str],
    model: R1V2Model,
    context: ParallelContext,
    weights: Sequence[float] | None = None,
) -> TrainingBatch:
    return collate(
        [material.samples[name] for name in names],
        material.prompts,
        RowFormat(0, model.architecture.image_token_id, tensor_size=context.tensor_size, device=context.device),
        replayed=[name.endswith("1") for name in names],
        weights=weights,
    )


def filler(material: Material, model: R1V2Model, context: ParallelContext) -> TrainingBatch:
    """Return what a rank without samples runs: a row whose weight is 0 but whose advantage would be felt."""
    sample = replace(filler_sample(material.prompts["two"]), rl=targets(1, advantage=9.0, old_log_probs=(-3.0,)))
    return collate_microbatch(replace(material, samples={"": sample}), [""], model, context, weights=[0.0])


def named_log_probs(
    material: Material, split: Split, log_probs: Sequence[torch.Tensor], context: ParallelContext
) -> dict[str, torch.Tensor]:
    """Return the log-probs of this replica's responses by sample."""
    found = {}
    microbatches = split[context.data_rank] if context.data_rank < len(split) else ()
    for names, values_BS in zip(microbatches, log_probs, strict=True):
        for name, values_S in zip(names, values_BS, strict=True):
            sample = material.samples[name]
            begin, end = sample.prompt_length - 1, len(sample.token_ids) - 1
            found[name] = values_S[begin:end].clone()
            assert not values_S[:begin].any(), "a log-prob of the prompt"
            assert not values_S[end:].any(), "a log-prob of padding"
    return found


def whole_logits(policy: Policy, batches: Sequence[TrainingBatch]) -> list[torch.Tensor]:
    """Run microbatches forward and return their logits over the whole vocabulary, on the last stage."""

    def forward_step(source: Iterator[TrainingBatch], ddp: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        batch = next(source)
        output = ddp(
            batch.token_ids_BS,
            batch.position_ids_BS,
            tiles_TCHW=batch.tiles_TCHW,
            tile_index=batch.tile_index,
            image_mask_BS=batch.image_mask_BS,
        )
        group = policy.context.groups.tp
        return output, lambda logits: (logits.sum(), gather_from_tensor_model_parallel_region(logits, group=group))

    if not batches:
        return []
    with torch.no_grad():
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=policy.ddp,
            num_microbatches=len(batches),
            seq_length=max(batch.token_ids_BS.shape[1] for batch in batches),
            micro_batch_size=batches[0].token_ids_BS.shape[0],
            forward_only=True,
        )


def named_logits(material: Material, split: Split, logits: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the logits of this replica's rows by sample, without padding; empty where there are none."""
    names = split[parallel_state.get_data_parallel_rank()] if logits else ()
    found = {}
    for microbatch, logits_BSV in zip(names, logits, strict=True):
        for name, logits_SV in zip(microbatch, logits_BSV, strict=True):
            found[name] = logits_SV[: len(material.samples[name].token_ids) - 1].clone()
    return found


def parameters_out_of_step(model: R1V2Model, context: ParallelContext) -> list[str]:
    """Name the parameters that differ over data-parallel ranks, or over tensor-parallel ranks where all hold all."""
    different = []
    for name, parameter in model.named_parameters():
        sharded = getattr(parameter, "tensor_model_parallel", False)
        for group in (context.groups.dp, None if sharded else context.groups.tp):
            if group is None or group.size() == 1:
                continue
            copies = [torch.empty_like(parameter.data) for _ in range(group.size())]
            dist.all_gather(copies, parameter.data.contiguous(), group=group)
            if not all(torch.equal(copies[0], copy) for copy in copies):
                different.append(name)
    if model.share_embeddings_and_output_weights and context.pipeline_size > 1:
        # embd: the stages that hold the embedding, here both
        weight = model.shared_embedding_or_output_weight().data
        copies = [torch.empty_like(weight) for _ in range(2)]
        dist.all_gather(copies, weight.contiguous(), group=context.groups.embd)
        if not torch.equal(*copies):
            different.append("tied embedding")
    return different


def largest_padding(model: R1V2Model, context: ParallelContext) -> float:
    """Return the largest weight of the padded heads: 0 as long as they have no gradient."""
    vision = model.architecture.vision
    spare = -vision.num_heads % context.tensor_size * vision.head_size
    if model.vision is None or not spare or context.tensor_rank != context.tensor_size - 1:
        return 0.0
    found = []
    for layer in model.vision.decoder.layers:
        attention = layer.self_attention
        found += [attention.linear_qkv.weight[-3 * spare :], attention.linear_proj.weight[:, -spare:]]
        if attention.linear_qkv.bias is not None:
            found.append(attention.linear_qkv.bias[-3 * spare :])
    return max(float(values.abs().max()) for values in found)


def gather_gradients(policy: Policy, context: ParallelContext) -> dict[str, torch.Tensor]:
    """Return every whole gradient by its Hugging Face name on the main rank; spends the model."""
    group = context.groups.dp
    for buffer in policy.ddp.buffers:
        for bucket in buffer.buckets:
            # Reduced and scattered: each data-parallel rank has the sum of one part, and garbage elsewhere.
            shards = list(bucket.grad_data.chunk(group.size()))
            dist.all_gather(shards, shards[group.rank()].clone(), group=group)
            bucket.grad_data.copy_(torch.cat(shards))
    for parameter in policy.model.parameters():
        gradient = parameter.main_grad if parameter.requires_grad else torch.zeros_like(parameter)
        parameter.data = gradient.detach().clone()
    return {name: tensor for name, tensor in gather_hf_weights(policy.model, context).items() if tensor.any()}
