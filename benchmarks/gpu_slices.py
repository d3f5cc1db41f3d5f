"""The speed of the 38B model's layers at their real widths on one device, beside the device's own limits.

    python -m benchmarks.gpu_slices                  # prints; --save writes benchmarks/results/gpu_slices_DEVICE.json
    python -m benchmarks.gpu_slices --tiny           # sizes for a CPU: tests that it runs

As many QwQ-32B and InternViT-6B layers as fit, or as asked for: forward, and forward with backward (of weights too), as
model FLOP/s against a matrix product measured in the same run; decode by our engine, eager and with CUDA graphs, as
tokens and bytes a second against a copy measured in the same run. In bf16, and in FP8: whole layers where
TransformerEngine is installed, else the products of one layer by torch's own 8-bit matmul.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_r1v2.checkpoint.hf.architecture import r1v2_architecture
from megatron_r1v2.config.choices import Fp8, Layers, Part, Recompute
from megatron_r1v2.config.schema import GenerationConfig, ParallelConfig
from megatron_r1v2.generation.engine import RolloutEngine
from megatron_r1v2.generation.features import FeatureCache
from megatron_r1v2.generation.phase import GenerationPhase
from megatron_r1v2.generation.sampling import Draw
from megatron_r1v2.models.architecture import R1V2Architecture
from megatron_r1v2.models.paged_attention import is_flash_attention_usable
from megatron_r1v2.models.r1v2 import R1V2Model, build_r1v2
from megatron_r1v2.models.settings import ComputeSettings
from megatron_r1v2.models.vision import VisionTower, vision_transformer_config
from megatron_r1v2.parallel import groups
from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.planning.activations import ActivationModel, MicrobatchShape
from megatron_r1v2.planning.known_models import KNOWN_MODELS
from megatron_r1v2.planning.memory import kv_bytes_per_token
from megatron_r1v2.planning.parameters import Layout, language_layer_weights
from megatron_r1v2.planning.roofline import head_flops, language_layer_flops, vision_flops
from megatron_r1v2.resilience.files import write_file

RESULTS = Path(__file__).parent / "results"
HAS_TE = importlib.util.find_spec("transformer_engine") is not None
ALL_PARTS = tuple(Part)
# Of free memory: the allocator's gaps, workspaces and what the estimate leaves out stay below the rest.
_USABLE = 0.7


@dataclass(frozen=True)
class Sizes:
    """The sizes of a measurement."""

    tokens: int = 4096
    """Tokens of a row of the language model."""
    tiles: int = 8
    requests: int = 64
    """Responses that decode at once."""
    prompt_tokens: int = 512
    decode_steps: int = 64
    language_layers: int = 0
    """0: as many as fit."""
    vision_layers: int = 0
    """0: as many as fit."""
    matmul: int = 8192
    """Side of the square matrices whose product is the ceiling."""
    copy_bytes: int = 2**31
    repeats: int = 10


TINY = Sizes(64, 2, 4, 16, 6, 4, 2, 128, 2**20, 2)


def tiny_architecture() -> R1V2Architecture:
    """Return the 38B model's shape at widths that a CPU multiplies in a moment."""
    real = r1v2_architecture(KNOWN_MODELS["r1v2-38b"])
    small_vision = replace(real.vision, hidden_size=160, num_heads=5, ffn_size=320, image_size=56)
    small_language = replace(
        real.language, hidden_size=128, num_heads=8, num_kv_heads=2, head_size=16, ffn_size=256, vocab_size=512
    )
    return replace(real, vision=small_vision, language=small_language, image_token_id=511)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Return the median seconds of a call, after two that are not counted."""
    times = []
    for index in range(repeats + 2):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        if index >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure_ceilings(sizes: Sizes, device: torch.device) -> dict[str, float | None]:
    """Measure the device's limits: FLOP/s of a square product in bf16 and FP8, bytes a second of a copy."""
    side = sizes.matmul
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = seconds_of(lambda: a @ b, device, sizes.repeats)
    source = torch.zeros(sizes.copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = seconds_of(lambda: target.copy_(source), device, sizes.repeats)
    in_fp8 = seconds_of(fp8_product(side, side, side, device), device, sizes.repeats) if has_fp8(device) else None
    return {
        "bf16 FLOP/s": 2 * side**3 / product,
        "FP8 FLOP/s": None if in_fp8 is None else 2 * side**3 / in_fp8,
        # A copy reads and writes.
        "bytes/s": 2 * sizes.copy_bytes / copy,
    }


def has_fp8(device: torch.device) -> bool:
    """Return whether torch multiplies 8-bit matrices on this device: from compute capability 8.9 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def fp8_product(rows: int, inner: int, columns: int, device: torch.device) -> Callable[[], torch.Tensor]:
    """Return a call of torch's 8-bit matmul with one scale a tensor, without the casts."""
    one = torch.ones((), device=device)
    a = torch.randn(rows, inner, device=device).to(torch.float8_e4m3fn)
    b = torch.randn(columns, inner, device=device).to(torch.float8_e4m3fn).t()
    return lambda: torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def measure_torch_fp8(
    figures: dict[str, Any], architecture: R1V2Architecture, sizes: Sizes, device: torch.device
) -> None:
    """Measure the four products of a language layer in bf16 and by torch's 8-bit matmul."""
    language = architecture.language
    heads = language.num_heads * language.head_size
    qkv = heads + 2 * language.num_kv_heads * language.head_size
    for name, inner, columns in (
        ("qkv", language.hidden_size, qkv),
        ("proj", heads, language.hidden_size),
        ("fc1", language.hidden_size, 2 * language.ffn_size),
        ("fc2", language.ffn_size, language.hidden_size),
    ):
        a = torch.randn(sizes.tokens, inner, device=device, dtype=torch.bfloat16)
        b = torch.randn(columns, inner, device=device, dtype=torch.bfloat16).t()
        operations = 2.0 * sizes.tokens * inner * columns
        figures[name] = {
            "bf16 FLOP/s": operations / seconds_of(partial(torch.matmul, a, b), device, sizes.repeats),
            "FP8 FLOP/s": operations / seconds_of(fp8_product(sizes.tokens, inner, columns, device), device, 10),
        }


def layers_that_fit(architecture: R1V2Architecture, sizes: Sizes, device: torch.device) -> tuple[int, int]:
    """Return language and vision layers whose weights, gradients and activations fit the free memory, at most all."""
    assert device.type == "cuda", "name --layers and --vision-layers on a CPU"
    free = torch.cuda.mem_get_info(device)[0] * _USABLE
    model = ActivationModel(architecture, Layout(), ALL_PARTS, 2, Recompute.none)
    language, vision = architecture.language, architecture.vision
    # bf16 weights and gradients, in FP8 beside them each weight twice in 8 bits.
    one = model.language_layer(MicrobatchShape(1, sizes.tokens, 0)).saved + 6 * language_layer_weights(language)
    ends = 8 * language.vocab_size * language.hidden_size + 10 * sizes.tokens * language.vocab_size
    one_vision = model.vision_layer(sizes.tiles).saved + 4 * vision.hidden_size * (
        4 * vision.num_heads * vision.head_size + 2 * vision.ffn_size
    )
    return (
        max(3, min(language.num_layers, int((free - ends) // one))),
        max(1, min(vision.num_layers, int(free // one_vision))),
    )


def measure_passes(
    run: Callable[[], torch.Tensor], flops: float, ceiling: float, device: torch.device, repeats: int
) -> dict[str, float]:
    """Measure a forward pass without a graph, and one with its backward pass, which is twice as many operations."""

    def forward() -> None:
        with torch.no_grad():
            run()

    seconds = {
        "forward": seconds_of(forward, device, repeats),
        "forward and backward": seconds_of(lambda: torch.autograd.backward(run().sum()), device, repeats),
    }
    figures = {}
    for (name, spent), operations in zip(seconds.items(), (flops, 3 * flops), strict=True):
        figures[f"{name} seconds"] = spent
        figures[f"{name} FLOP/s"] = operations / spent
        figures[f"{name} of the ceiling"] = operations / spent / ceiling
    return figures


def measure_language(
    figures: dict[str, Any],
    architecture: R1V2Architecture,
    sizes: Sizes,
    context: ParallelContext,
    ceilings: dict[str, Any],
    **compute: Any,
) -> None:
    """Measure the language model's layers and output matrix: passes over a row, and decode; add each as it is known."""
    settings = ComputeSettings(dtype=torch.bfloat16, **compute)
    sliced = replace(architecture, vision=replace(architecture.vision, num_layers=1))
    model = build_r1v2(sliced, settings, groups=context.groups, device=context.device)
    ids = torch.randint(0, architecture.language.vocab_size, (1, sizes.tokens), device=context.device)
    positions = torch.arange(sizes.tokens, device=context.device)[None]
    flops = language_layer_flops(sliced, sizes.tokens, sizes.tokens / 2) + head_flops(sliced, sizes.tokens)

    def run() -> torch.Tensor:
        logits: torch.Tensor = model.language(input_ids=ids, position_ids=positions, attention_mask=None)
        return logits

    # Most products are in 8 bits, so they are compared with the device's 8-bit ceiling.
    ceiling = ceilings["bf16 FLOP/s"] if settings.fp8 is Fp8.none else ceilings["FP8 FLOP/s"]
    figures |= measure_passes(run, flops, ceiling, context.device, sizes.repeats)
    model.zero_grad(set_to_none=True)
    graphs = (False, True) if context.device.type == "cuda" else (False,)
    for cuda_graphs in graphs:
        name = "decode with graphs" if cuda_graphs else "decode"
        figures[name] = measure_decode(model, sizes, context, ceilings["bytes/s"], cuda_graphs=cuda_graphs)


def measure_decode(
    model: R1V2Model, sizes: Sizes, context: ParallelContext, ceiling: float, *, cuda_graphs: bool
) -> dict[str, float]:
    """Measure steps of our engine in which every request decodes one token."""
    architecture = model.architecture
    longest = sizes.prompt_tokens + sizes.decode_steps
    settings = GenerationConfig(
        kv_cache_gib=1.2 * sizes.requests * (longest + 512) * _kv_bytes(architecture) / 2**30,
        max_requests=sizes.requests,
        max_tokens_per_step=sizes.requests * sizes.prompt_tokens,
        cuda_graphs=cuda_graphs,
    )
    engine = RolloutEngine(
        model,
        context=context,
        settings=settings,
        stop_ids=frozenset(),
        vocab_size=architecture.language.vocab_size,
        max_prompt_tokens=sizes.prompt_tokens,
        seed=0,
    )
    start = time.perf_counter()
    with engine.open_phase(sizes.decode_steps, FeatureCache(0)) as phase:
        set_up = time.perf_counter() - start
        generator = torch.Generator().manual_seed(0)
        for request in range(sizes.requests):
            prompt = torch.randint(0, architecture.image_token_id, (sizes.prompt_tokens,), generator=generator)
            phase.add(
                request,
                prompt.tolist(),
                draw=Draw(request, temperature=1.0),
                images=None,
                max_response_tokens=sizes.decode_steps,
                prompt_key=str(request),
            )
        times = _step_times(phase, context.device)
    # The first steps prefill.
    seconds = statistics.median(times[len(times) // 2 :])
    weight_bytes = 1 if model.config.fp8 else 2
    language = architecture.language
    read = float(language.num_layers * language_layer_weights(language) * weight_bytes)
    read += language.vocab_size * language.hidden_size * 2
    read += sizes.requests * (sizes.prompt_tokens + 0.75 * sizes.decode_steps) * _kv_bytes(architecture)
    return {
        "tokens/s": sizes.requests / seconds,
        "step seconds": seconds,
        "bytes/s": read / seconds,
        "of the copy ceiling": read / seconds / ceiling,
        "set-up seconds": set_up,
    }


def _step_times(phase: GenerationPhase, device: torch.device) -> list[float]:
    times = []
    while phase.num_in_flight:
        start = time.perf_counter()
        phase.step()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return times


def _free(device: torch.device) -> None:
    """Free the memory of the slice before."""
    # Its modules refer to each other, so counting references alone does not free them.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _kv_bytes(architecture: R1V2Architecture) -> int:
    return kv_bytes_per_token(architecture, Layout(), 2, 0)


def measure_vision(
    figures: dict[str, Any],
    architecture: R1V2Architecture,
    sizes: Sizes,
    context: ParallelContext,
    ceilings: dict[str, Any],
) -> None:
    """Measure the vision tower's layers, which stay in bf16 where the language model is in FP8."""
    config = vision_transformer_config(architecture.vision, ComputeSettings(dtype=torch.bfloat16))
    tower = VisionTower(config, architecture.vision, groups=context.groups)
    tower = tower.to(device=context.device, dtype=torch.bfloat16)
    side = architecture.vision.image_size
    tiles = torch.randint(0, 256, (sizes.tiles, 3, side, side), dtype=torch.uint8, device=context.device)
    flops = sizes.tiles * vision_flops(architecture.vision)
    figures |= measure_passes(lambda: tower(tiles), flops, ceilings["bf16 FLOP/s"], context.device, sizes.repeats)


def measure(
    sizes: Sizes, architecture: R1V2Architecture, *, on_slice: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    """Measure everything on this process's device.

    Args:
        sizes: the sizes; 0 layers are as many as fit.
        architecture: the widths.
        on_slice: called with all that is known after each slice.

    Returns:
        Numbers by slice, with the ceilings of the same run; a text in the place of numbers that cannot be measured, and
        the errors of slices that failed.
    """
    context = groups.initialize(ParallelConfig(), seed=1)
    device = context.device
    ceilings = measure_ceilings(sizes, device)
    _free(device)
    if not sizes.language_layers or not sizes.vision_layers:
        fitting = layers_that_fit(architecture, sizes, device)
        sizes = replace(
            sizes,
            language_layers=sizes.language_layers or fitting[0],
            vision_layers=sizes.vision_layers or fitting[1],
        )
    sliced = replace(
        architecture,
        language=replace(architecture.language, num_layers=sizes.language_layers),
        vision=replace(architecture.vision, num_layers=sizes.vision_layers),
    )
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "flash attention": is_flash_attention_usable(torch.bfloat16),
        "sizes": asdict(sizes),
        "ceilings": ceilings,
        "errors": {},
    }
    language = partial(measure_language, architecture=sliced, sizes=sizes, context=context, ceilings=ceilings)
    vision = partial(measure_vision, architecture=sliced, sizes=sizes, context=context, ceilings=ceilings)
    slices: dict[str, Callable[[dict[str, Any]], None]] = {"language": language, "vision": vision}
    if not has_fp8(device):
        figures["language in FP8"] = "not measured: the device has no 8-bit products"
    elif HAS_TE:
        slices["language, TransformerEngine"] = partial(language, layers=Layers.te)
        slices["language in FP8"] = partial(language, layers=Layers.te, fp8=Fp8.tensorwise)
    else:
        figures["language in FP8"] = "whole layers not measured: TransformerEngine is not installed"
        slices["products of a layer"] = partial(measure_torch_fp8, architecture=sliced, sizes=sizes, device=device)
    for name, call in slices.items():
        _free(device)
        on_slice(figures)
        try:
            call(figures.setdefault(name, {}))
        except (AssertionError, RuntimeError, ValueError) as error:
            # Out of memory, or a kernel that is not there. A lent device goes on with the others.
            traceback.print_exc()
            figures["errors"][name] = f"{type(error).__name__}: {error}"
    on_slice(figures)
    groups.shut_down()
    return figures


def save(figures: dict[str, Any]) -> Path:
    """Write the numbers under the device's name."""
    name = re.sub(r"[^a-z0-9]+", "_", figures["device"].lower()).strip("_")
    output = RESULTS / f"gpu_slices_{name}.json"
    write_file(output, json.dumps(figures, indent=1) + "\n")
    return output


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print, write a file only when asked to; return 1 where a slice failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_slices", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    parser.add_argument("--layers", type=int, default=0, help="language layers; default: as many as fit")
    parser.add_argument("--vision-layers", type=int, default=0, help="vision layers; default: as many as fit")
    parser.add_argument("--tokens", type=int, default=0, help="of a row; default: 4096")
    parser.add_argument("--requests", type=int, default=0, help="that decode at once; default: 64")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/gpu_slices_DEVICE.json")
    parser.add_argument("--output", type=Path, help="write this file, after each slice")
    arguments = parser.parse_args(argv)
    sizes = TINY if arguments.tiny else Sizes()
    asked = {
        "language_layers": arguments.layers,
        "vision_layers": arguments.vision_layers,
        "tokens": arguments.tokens,
        "requests": arguments.requests,
    }
    sizes = replace(sizes, **{name: value for name, value in asked.items() if value})
    if not torch.cuda.is_available() and not (sizes.language_layers and sizes.vision_layers):
        parser.error("there is no CUDA device: give --tiny, or --layers and --vision-layers")

    def write(figures: dict[str, Any]) -> None:
        if arguments.output is not None:
            write_file(arguments.output, json.dumps(figures, indent=1) + "\n")

    architecture = tiny_architecture() if arguments.tiny else r1v2_architecture(KNOWN_MODELS["r1v2-38b"])
    figures = measure(sizes, architecture, on_slice=write)
    print(json.dumps(figures, indent=1))
    if arguments.save:
        print(f"written to {save(figures)}")
    return 1 if figures["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
