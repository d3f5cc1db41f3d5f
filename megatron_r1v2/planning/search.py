"""The best layout for a cluster, by trying every one that divides the model against memory and the roofline."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_r1v2.config.choices import Fp8, Part, Recompute, StageName
from megatron_r1v2.config.layout import check_fp8_shapes
from megatron_r1v2.models.architecture import R1V2Architecture
from megatron_r1v2.planning.hardware import Hardware
from megatron_r1v2.planning.memory import GIB, MemoryPlan, plan_memory
from megatron_r1v2.planning.parameters import Layout
from megatron_r1v2.planning.roofline import StepTime, step_time
from megatron_r1v2.planning.workload import Workload

# Powers of two: others divide neither the heads nor the GPUs of a node.
_TENSOR_SIZES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class LayoutCandidate:
    """A layout with its memory and its time."""

    layout: Layout
    recompute: Recompute
    fp8: Fp8
    fp8_weights: bool
    packed_tokens: int
    """Tokens of a microbatch."""
    memory: MemoryPlan
    time: StepTime

    @property
    def name(self) -> str:
        """Return the layout in words."""
        layout = self.layout
        first = f", {layout.first_stage_layers} layers on the first stage" if layout.first_stage_layers else ""
        numbers = "" if self.fp8 is Fp8.none else f", FP8 {self.fp8.value}"
        return (
            f"TP{layout.tensor} PP{layout.pipeline} DP{layout.data}, recompute {self.recompute.value}{numbers}{first}"
        )

    @property
    def settings(self) -> tuple[str, ...]:
        """Return the overrides that select it."""
        layout = self.layout
        return (
            f"parallel.tensor={layout.tensor}",
            f"parallel.pipeline={layout.pipeline}",
            f"parallel.sequence={str(layout.sequence).lower()}",
            f"parallel.first_stage_layers={layout.first_stage_layers}",
            f"train.recompute={self.recompute.value}",
            f"train.tokens_per_microbatch={self.packed_tokens}",
            *(() if self.fp8 is Fp8.none else ("model.layers=te",)),
            f"model.fp8={self.fp8.value}",
            f"model.fp8_weights={str(self.fp8_weights).lower()}",
        )


@dataclass(frozen=True)
class Proposal:
    """The result of the search."""

    best: LayoutCandidate | None
    """None: nothing fits."""
    fitting: int
    tried: int
    reason: str


def propose_layout(
    architecture: R1V2Architecture,
    work: Workload,
    hardware: Hardware,
    *,
    gpus: int,
    gpus_per_node: int,
    limit: int,
    mean_response: float,
) -> Proposal:
    """Find the layout with the shortest step among those that fit.

    Args:
        work: the demands of the run; its recompute setting is varied, FP8 where the GPU has it, and the tokens of a
            microbatch where rows share their prompts.
        gpus: all of them are used.
        gpus_per_node: bound of the TP size, since tensor parallelism stays within one node.
        limit: bytes of a rank.
        mean_response: tokens of a response on average.

    Returns:
        The best layout, and the reason in words.
    """
    variants = _variants(architecture, work, hardware, gpus, gpus_per_node)
    found = (
        _candidate(architecture, layout, tried, hardware, limit=limit, mean_response=mean_response)
        for layout, tried in variants
    )
    candidates = [candidate for candidate in found if candidate is not None]
    fitting = [candidate for candidate in candidates if candidate.memory.peak.total <= limit]
    if not fitting:
        return Proposal(None, 0, len(candidates), _explain_no_fit(candidates, limit))
    ranked = sorted(fitting, key=lambda candidate: (candidate.time.total, candidate.memory.peak.total))
    best = ranked[0]
    return Proposal(best, len(fitting), len(candidates), _explain_choice(ranked, candidates, limit))


def _variants(
    architecture: R1V2Architecture, work: Workload, hardware: Hardware, gpus: int, gpus_per_node: int
) -> Iterator[tuple[Layout, Workload]]:
    for layout in _layouts(architecture, gpus, gpus_per_node):
        for recompute, fp8 in itertools.product((Recompute.none, Recompute.full), _fp8_choices(work, hardware)):
            # 8-bit weights lose the small updates of training, so only a frozen language model may have them.
            frozen = Part.language not in work.parts
            tried = replace(work, recompute=recompute, fp8=fp8, fp8_weights=fp8 is not Fp8.none and frozen)
            try:
                plan_memory(architecture, layout, tried)
                _check_fp8(architecture, layout, fp8)
            except ValueError:
                continue  # heads or layers do not divide, or the cache holds no sequence
            yield layout, tried


def _candidate(
    architecture: R1V2Architecture,
    layout: Layout,
    work: Workload,
    hardware: Hardware,
    *,
    limit: int,
    mean_response: float,
) -> LayoutCandidate | None:
    """Choose the tokens of a microbatch: the fewest of those with the shortest step among what fits; None: no room."""
    best: tuple[float, Workload] | None = None
    for packed_tokens in _microbatch_bounds(work, layout):
        tried = replace(work, packed_tokens=packed_tokens)
        try:
            time = step_time(architecture, layout, tried, hardware, mean_response=mean_response)
        except ValueError:
            break  # buffers of longer rows leave a cache that takes what is free no room
        # More responses behind a prompt save time, and take memory that recomputation gives.
        if best is None or time.total < best[0]:
            if best is not None and plan_memory(architecture, layout, tried).peak.total > limit:
                break
            best = time.total, tried
    if best is None:
        return None
    chosen = best[1]
    memory = plan_memory(architecture, layout, chosen)
    time = step_time(architecture, layout, chosen, hardware, mean_response=mean_response)
    return LayoutCandidate(layout, chosen.recompute, chosen.fp8, chosen.fp8_weights, chosen.packed_tokens, memory, time)


def _microbatch_bounds(work: Workload, layout: Layout) -> list[int]:
    """Return the tokens of a microbatch to try: a prompt with one of its longest responses (or pairs), two, ..."""
    if not work.shares_prompts or work.stage is StageName.pairs:
        return [work.packed_tokens]
    units = work.responses_per_prompt // work.rows_together
    longest = work.rows_together * work.response_tokens
    bounds = {work.padded(work.prompt_tokens - 1 + count * longest, layout.tensor) for count in range(1, units + 1)}
    if units == 1:  # rows of different prompts share nothing: as the recipe has it
        return [work.packed_tokens]
    return sorted(bounds)


def _fp8_choices(work: Workload, hardware: Hardware) -> tuple[Fp8, ...]:
    """Return bf16, and tensorwise FP8 where the GPU has it."""
    # Blockwise FP8 differs from it in its rounding, but in neither memory nor time.
    if not hardware.fp8_flops or work.element_bytes != 2:
        return (Fp8.none,)
    return (Fp8.none, Fp8.tensorwise if work.fp8 is Fp8.none else work.fp8)


def _check_fp8(architecture: R1V2Architecture, layout: Layout, fp8: Fp8) -> None:
    language = architecture.language
    check_fp8_shapes(
        language.sizes,
        fp8=fp8,
        tensor=layout.tensor,
        sequence=layout.sequence,
    )


def _layouts(architecture: R1V2Architecture, gpus: int, gpus_per_node: int) -> Iterator[Layout]:
    layers = architecture.language.num_layers
    for tensor in _TENSOR_SIZES:
        if tensor > gpus_per_node or gpus % tensor:
            continue
        for pipeline in range(1, min(layers, gpus // tensor) + 1):
            if gpus // tensor % pipeline:
                continue
            data = gpus // tensor // pipeline
            for first in _first_stages(layers, pipeline):
                yield Layout(tensor, pipeline, data, first, sequence=tensor > 1)


def _first_stages(layers: int, pipeline: int) -> list[int]:
    """Return the numbers of layers to try on the first stage (0: an even split)."""
    # Somewhat fewer than an even split too, because the first stage has the vision tower as well.
    if pipeline == 1:
        return [0]
    even = layers / pipeline
    uneven = [first for first in range(max(1, int(even / 2)), int(even) + 1) if (layers - first) % (pipeline - 1) == 0]
    uneven = [first for first in uneven if first * pipeline != layers]
    return ([0] if layers % pipeline == 0 else []) + uneven


def _explain_choice(ranked: list[LayoutCandidate], candidates: list[LayoutCandidate], limit: int) -> str:
    best = ranked[0]
    time = best.time
    parts = {
        "decode": time.decode + time.host,
        "prefill": time.prefill,
        "vision": time.vision,
        "log-probs": time.log_probs,
        "update": time.update,
    }
    longest = max(parts, key=lambda name: parts[name])
    peak = best.memory.peak
    sentences = [
        f"{best.name}: the shortest of {len(ranked)} that fit, out of {len(candidates)} tried; "
        f"{parts[longest] / time.total:.0%} of a step is {longest}, "
        f"and the fullest rank (stage {peak.stage}, {peak.phase}) needs {peak.total / GIB:.1f} of "
        f"{limit / GIB:.1f} GiB."
    ]
    if best.fp8 is not Fp8.none and (in_bf16 := [other for other in ranked if other.fp8 is Fp8.none]):
        slower = in_bf16[0].time.total / time.total - 1
        sentences.append(
            f"FP8 needs TransformerEngine and rounds more: watch rollout_corr/*. In bf16 the best is "
            f"{in_bf16[0].name}, {slower:.0%} slower."
        )
    # The same grid with another recomputation or precision would tell the reader nothing new.
    others = [candidate for candidate in ranked if _grid(candidate) != _grid(best)]
    if others:
        slower = others[0].time.total / time.total - 1
        sentences.append(f"Next: {others[0].name}, {slower:.0%} slower.")
    too_big = sorted(
        (candidate for candidate in candidates if candidate.memory.peak.total > limit),
        key=lambda candidate: candidate.time.total,
    )
    if too_big and too_big[0].time.total < time.total:
        over = too_big[0].memory.peak
        sentences.append(
            f"{too_big[0].name} would be faster but needs {over.total / GIB:.1f} GiB "
            f"(stage {over.stage}, {over.phase})."
        )
    return " ".join(sentences)


def _explain_no_fit(candidates: list[LayoutCandidate], limit: int) -> str:
    if not candidates:
        return (
            "no layout divides the model and lets generation.kv_cache_gib hold one sequence; change the number of "
            "GPUs, raise the cache or lower generation.max_response_tokens"
        )
    smallest = min(candidates, key=lambda candidate: candidate.memory.peak.total)
    peak = smallest.memory.peak
    return (
        f"nothing fits: the smallest of {len(candidates)}, {smallest.name}, needs {peak.total / GIB:.1f} of "
        f"{limit / GIB:.1f} GiB (stage {peak.stage}, {peak.phase}); use more GPUs, or lower generation.kv_cache_gib, "
        "generation.feature_cache_gib or generation.max_response_tokens"
    )


def _grid(candidate: LayoutCandidate) -> tuple[int, int]:
    return candidate.layout.tensor, candidate.layout.pipeline
