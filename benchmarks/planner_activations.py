"""The bytes that a training step really allocates on a CPU, beside those of the planner.

    python -m benchmarks.planner_activations benchmarks/results/planner_activations_cpu.json

"Measured" is the largest sum of bytes of tensors that live at once during one call and were made in it, kept ones and
temporary ones: every operator of the forward and backward pass is watched, and the storages it makes until they die.
Parameters, DDP buffers and optimizer state exist before and are not in it; a step was taken before, so caches that live
on are not either; nor is the workspace inside a kernel (oneDNN's, for instance), which another device has not. The call
is `Policy.update` (forward, backward and optimizer of all its microbatches) or `Policy.compute_log_probs`.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_r1v2.config.choices import Packing, Part, Recompute
from megatron_r1v2.config.schema import AlgorithmConfig, ParallelConfig, TrainConfig
from megatron_r1v2.generation.features import FeatureCache
from megatron_r1v2.models.architecture import LanguageArchitecture, R1V2Architecture, VisionArchitecture
from megatron_r1v2.models.r1v2 import build_r1v2, freeze_all_but
from megatron_r1v2.models.settings import ComputeSettings
from megatron_r1v2.parallel import groups
from megatron_r1v2.planning.activations import ActivationModel, MicrobatchShape
from megatron_r1v2.planning.parameters import Layout
from megatron_r1v2.planning.passes import log_probs_peak, training_peak
from megatron_r1v2.resilience.files import write_file
from megatron_r1v2.resilience.skipped_updates import SkippedUpdates
from megatron_r1v2.stages.grpo.updates import batch_loss
from megatron_r1v2.training.batches import RowFormat, collate, response_sample
from megatron_r1v2.training.optimizer import build_optimizer, wrap_with_ddp
from megatron_r1v2.training.policy import Policy
from megatron_r1v2.types import Prompt, RLTargets


@dataclass(frozen=True)
class Case:
    """A model, a layout and a microbatch."""

    name: str
    architecture: R1V2Architecture
    parallel: ParallelConfig
    parts: tuple[str, ...]
    precision: str
    recompute: str
    rows: int
    tokens: int
    """Of a row, a multiple of 8; its labels are one token further."""
    tiles: int
    """Of each row."""
    microbatches: int = 1
    packed: bool = True
    """The rows of a microbatch lie one after the other in one; those measured before were padded."""
    measured: list[dict[str, int]] = field(default_factory=list)
    """Peak bytes by phase, of each rank."""


def architecture(
    *, hidden: int, layers: int, vision_hidden: int, vision_layers: int, family: str, vocabulary: int
) -> R1V2Architecture:
    """Return a model shaped like the real ones: heads of 32, four patches an image token."""
    is_6b = family == "6b"
    return R1V2Architecture(
        vision=VisionArchitecture(
            hidden_size=vision_hidden,
            num_layers=vision_layers,
            num_heads=vision_hidden // 32,
            ffn_size=4 * vision_hidden,
            image_size=112,
            patch_size=14,
            norm="rms_norm" if is_6b else "layer_norm",
            norm_epsilon=1e-6,
            qkv_bias=not is_6b,
            qk_norm=is_6b,
        ),
        language=LanguageArchitecture(
            model_type="qwen2",
            hidden_size=hidden,
            num_layers=layers,
            num_heads=hidden // 32,
            num_kv_heads=2,
            head_size=32,
            ffn_size=hidden * 27 // 5 // 8 * 8,
            vocab_size=vocabulary,
            max_positions=4096,
            rope_theta=1e6,
            norm_epsilon=1e-6,
            qkv_bias=True,
            qk_norm=False,
            tied_embeddings=False,
        ),
        image_token_id=vocabulary - 1,
        downsample_ratio=0.5,
    )


class LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves the base class untyped
    """The bytes of the storages that operators have made and that are still referenced, and their maximum."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves the base class untyped
        self.held = self.highest = 0
        self._live: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count the storages that it made."""
        before = {_key(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            # A view, or the target of an in-place operator, is not new, even where it was made before we looked.
            if isinstance(tensor, torch.Tensor) and _key(tensor) not in before | self._live.keys():
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._live[key] = weakref.ref(storage, lambda _: self._remove(key, size))
        self.held += size
        self.highest = max(self.highest, self.held)

    def _remove(self, key: int, size: int) -> None:
        del self._live[key]
        self.held -= size


def _key(tensor: torch.Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key


def peak_bytes(call: Callable[[], Any]) -> int:
    """Return the peak bytes of the tensors that a call makes."""
    gc.collect()
    with LiveTensors() as tensors:
        call()
    highest: int = tensors.highest
    return highest


def measure_rank(case: Case) -> dict[str, int]:
    """Take a step of a case on this rank, as the stages do, and measure the next one.

    Args:
        case: what to build; every rank of it calls this.

    Returns:
        Peak bytes by phase.
    """
    return _measure(case, peak_bytes)


def measure_allocator(case: Case) -> dict[str, int]:
    """Measure the same on a GPU by its allocator, which counts the kernels' workspace and rounding too."""
    return _measure(case, _allocator_peak_bytes)


def _allocator_peak_bytes(call: Callable[[], Any]) -> int:
    gc.collect()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - held


def _measure(case: Case, peak: Callable[[Callable[[], Any]], int]) -> dict[str, int]:
    context = groups.initialize(case.parallel, seed=1)
    policy = _policy(case, context)
    batches = [_batch(case, index, context) for index in range(case.microbatches)]

    def update() -> Any:
        loss = lambda log_probs_BS, batch: batch_loss(  # noqa: E731
            log_probs_BS,
            batch,
            algorithm=AlgorithmConfig(),
            aggregation="sequence",
            denominator=float(case.rows * case.microbatches),
        )
        return policy.update(batches, loss).logged()

    update()
    training = peak(update)
    policy.compute_log_probs(batches)
    return {"training": training, "log_probs": peak(lambda: policy.compute_log_probs(batches))}


def _policy(case: Case, context: groups.ParallelContext) -> Policy:
    settings = ComputeSettings(
        tensor=case.parallel.tensor,
        pipeline=case.parallel.pipeline,
        sequence=case.parallel.sequence,
        first_stage_layers=case.parallel.first_stage_layers,
        dtype=torch.bfloat16 if case.precision == "bf16" else torch.float32,
        recompute=Recompute[case.recompute],
    )
    model = build_r1v2(case.architecture, settings, groups=context.groups, device=context.device)
    freeze_all_but(model, [Part(part) for part in case.parts])
    ddp = wrap_with_ddp(model, context)
    optimizer, scheduler = build_optimizer(ddp, TrainConfig(steps=4))
    return Policy(
        model=model,
        ddp=ddp,
        optimizer=optimizer,
        scheduler=scheduler,
        context=context,
        temperature=0.7,
        skipped=SkippedUpdates(Path("skipped"), max_gradient_norm=0.0, context=context),
        vocab_size=case.architecture.language.vocab_size,
        packing=Packing.first_fit_decreasing,
        features=None if "vision" in case.parts else FeatureCache(2**40),
    )


def _batch(case: Case, index: int, context: groups.ParallelContext) -> Any:
    """Return a microbatch of distinct prompts, each row exactly as long as the case says."""
    sizes = case.architecture
    generator = torch.Generator().manual_seed(index)
    prompts, samples = {}, []
    for row in range(case.rows):
        key = f"{index}/{row}"
        image = [sizes.image_token_id] * (case.tiles * sizes.tokens_per_tile)
        words = torch.randint(0, sizes.image_token_id, (case.tokens + 1 - len(image),), generator=generator).tolist()
        side = sizes.vision.image_size
        prompts[key] = Prompt(
            key=key,
            messages=(),
            token_ids=(*image, words[0]),
            tiles_TCHW=torch.randint(0, 256, (case.tiles, 3, side, side), generator=generator, dtype=torch.uint8),
        )
        responses = len(words) - 1
        samples.append(
            response_sample(
                prompts[key],
                words[1:],
                rl=RLTargets(
                    old_log_probs=(-5.0,) * responses,
                    rollout_log_probs=(-5.0,) * responses,
                    advantage=1.0 - row,
                    reward=0.0,
                    policy_version=0,
                    group_effective=True,
                ),
            )
        )
    return collate(
        samples,
        prompts,
        RowFormat(0, sizes.image_token_id, tensor_size=context.tensor_size, device=context.device),
    )


def planned(case: Case, rank: int) -> dict[str, int]:
    """Return the planner's figures for a rank of a case.

    Args:
        case: sizes, layout and microbatch.
        rank: in the order of the process groups: tensor-parallel ranks of the first stage first.

    Returns:
        Peak bytes by phase.
    """
    parallel = case.parallel
    layout = Layout(parallel.tensor, parallel.pipeline, 1, parallel.first_stage_layers, parallel.sequence)
    model = ActivationModel(
        case.architecture,
        layout,
        [Part(part) for part in case.parts],
        2 if case.precision == "bf16" else 4,
        Recompute[case.recompute],
    )
    tiles = case.rows * case.tiles
    rows, tokens = (1, case.rows * case.tokens) if case.packed else (case.rows, case.tokens)
    batch = MicrobatchShape(rows, tokens, tiles)
    stage = rank // parallel.tensor
    return {
        "training": training_peak(model, batch, stage=stage, microbatches=case.microbatches),
        "log_probs": log_probs_peak(model, batch, stage=stage),
    }


SMALL = architecture(hidden=128, layers=3, vision_hidden=160, vision_layers=2, family="6b", vocabulary=1003)
MEDIUM = architecture(hidden=256, layers=4, vision_hidden=192, vision_layers=3, family="300m", vocabulary=2000)
WORDY = architecture(hidden=128, layers=3, vision_hidden=160, vision_layers=2, family="6b", vocabulary=12007)
LARGE = architecture(hidden=320, layers=6, vision_hidden=224, vision_layers=4, family="6b", vocabulary=3001)
EVERYTHING = ("vision", "adapter", "language")

CASES = [
    Case("small, adapter", SMALL, ParallelConfig(), ("adapter",), "fp32", "none", 1, 512, 2),
    Case("small, all parts", SMALL, ParallelConfig(), EVERYTHING, "bf16", "full", 1, 512, 4),
    Case(
        "medium, TP2 + SP",
        MEDIUM,
        ParallelConfig(tensor=2, sequence=True),
        ("adapter", "language"),
        "bf16",
        "none",
        1,
        640,
        2,
    ),
    Case("medium, vision", MEDIUM, ParallelConfig(tensor=2), ("adapter", "vision"), "fp32", "selective", 2, 256, 4),
    Case("large, PP2", LARGE, ParallelConfig(pipeline=2), EVERYTHING, "fp32", "none", 1, 384, 2, 3),
    Case(
        "large, TP2 x PP2 + SP",
        LARGE,
        ParallelConfig(tensor=2, pipeline=2, sequence=True, first_stage_layers=2),
        ("adapter",),
        "bf16",
        "full",
        2,
        384,
        2,
        3,
    ),
    Case("small, packed rows", SMALL, ParallelConfig(), ("adapter",), "bf16", "none", 3, 256, 1),
    Case("many words", WORDY, ParallelConfig(), ("adapter",), "bf16", "full", 1, 512, 2),
    Case("many words, fp32", WORDY, ParallelConfig(), ("adapter", "language"), "fp32", "full", 1, 512, 2),
]

# Wide enough that what a GPU's kernels and its allocator add is little: hundreds of MiB.
BROAD = architecture(hidden=2048, layers=4, vision_hidden=1024, vision_layers=2, family="6b", vocabulary=32003)
WIDE = [
    Case("adapter, bf16", BROAD, ParallelConfig(), ("adapter",), "bf16", "none", 1, 4096, 8),
    Case("adapter and LLM, bf16, recomputed", BROAD, ParallelConfig(), EVERYTHING[1:], "bf16", "full", 1, 4096, 8),
    Case("all parts, bf16", BROAD, ParallelConfig(), EVERYTHING, "bf16", "none", 2, 2048, 8),
]


def main() -> None:
    """Measure all cases, print them beside the plan and write them down."""
    from tests.ranks import run_ranks

    parser = argparse.ArgumentParser(prog="python -m benchmarks.planner_activations", description=__doc__)
    parser.add_argument("output", type=Path, help="JSON file to write")
    output = parser.parse_args().output
    for case in CASES:
        ranks = case.parallel.tensor * case.parallel.pipeline
        case.measured.extend(run_ranks(ranks, measure_rank, case, timeout=900))
        for rank, measured in enumerate(case.measured):
            for phase, plan in planned(case, rank).items():
                print(
                    f"{case.name:24} rank {rank} {phase:10} measured {measured[phase] / 2**20:7.2f} MiB  "
                    f"planned {plan / 2**20:7.2f} MiB  {plan / measured[phase] - 1:+.1%}",
                    flush=True,
                )
    machine = {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__}
    write_file(output, json.dumps({"machine": machine, "cases": [asdict(case) for case in CASES]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
