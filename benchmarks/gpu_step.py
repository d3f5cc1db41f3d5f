"""A whole GRPO step of the product on one device, its memory by phase beside the rehearsal's and the planner's.

    python -m benchmarks.gpu_step rehearse thin .gpu/thin.json      # on any machine: nothing is allocated
    python -m benchmarks.gpu_step measure thin .gpu/thin.json       # on the device

thin is a model of true width with few layers, whose vision tower and adapter train; 38b is a step of
examples/r1v2_38b/grpo_one_gpu.yaml with the whole model, few prompts and short responses; 38b-few is that with two
layers of true width each and a small vocabulary, for a CPU. Weights are drawn on the device: nothing is fetched or
read. Responses are scripted, so that some are right and there is something to train on, and in 38b each of their tokens
is decoded. --tiny gives any of them widths for a CPU. What is measured is in the output as soon as its phase has ended.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_r1v2.checkpoint.hf.architecture import r1v2_architecture
from megatron_r1v2.checkpoint.hf.config import sizes_config
from megatron_r1v2.checkpoint.hf.folders import SafetensorsFolder
from megatron_r1v2.config.choices import StageName
from megatron_r1v2.config.load import load_recipe
from megatron_r1v2.planning.hardware import HARDWARE
from megatron_r1v2.planning.known_models import KNOWN_MODELS
from megatron_r1v2.planning.memory import RankMemory
from megatron_r1v2.planning.parameters import Layout
from megatron_r1v2.planning.plan import Cluster, make_plan
from megatron_r1v2.rehearsal.ledger import PhaseMemory
from megatron_r1v2.rehearsal.preparation import write_rehearsal
from megatron_r1v2.rehearsal.rank import RankResult, RankSpec, rehearse_rank
from megatron_r1v2.rehearsal.run import plan_as_rehearsed, planned_memory, rehearse_ranks
from megatron_r1v2.rehearsal.watch import Watch, original
from megatron_r1v2.rehearsal.watch import replace as put
from megatron_r1v2.resilience.files import write_file

RECIPES = Path(__file__).parents[1] / "examples" / "r1v2_38b"
ALONE = ("parallel.tensor=1", "parallel.pipeline=1", "parallel.sequence=false", "parallel.first_stage_layers=0")


@dataclass(frozen=True)
class Case:
    """A recipe and a model for one device."""

    recipe: str
    overrides: tuple[str, ...]
    language_layers: int = 0
    """0: all."""
    vision_layers: int = 0
    """0: all."""
    vocabulary: int = 0
    """0: all."""
    decodes_all: bool = False
    """Every token of a response is decoded; else four, and the rest is filled in."""
    for_cpu: bool = False
    """It is rehearsed and measured on a CPU, whose branches are others."""


CASES = {
    "thin": Case(
        "grpo.yaml",
        (
            "data.max_prompt_tokens=2048",
            "generation.max_response_tokens=1024",
            "generation.kv_cache_gib=4",
            "generation.max_requests=64",
            "generation.feature_cache_gib=1",
            "train.parts=[vision, adapter]",
            "train.prompts_per_step=8",
            "train.tokens_per_microbatch=8192",
        ),
        language_layers=4,
        vision_layers=3,
    ),
    "38b": Case(
        "grpo_one_gpu.yaml",
        (
            "data.max_prompt_tokens=1024",
            "generation.max_response_tokens=128",
            "generation.responses_per_prompt=4",
            "train.prompts_per_step=2",
        ),
        decodes_all=True,
    ),
    "38b-few": Case(
        "grpo_one_gpu.yaml",
        (
            "data.max_prompt_tokens=352",
            "generation.max_response_tokens=24",
            "generation.responses_per_prompt=2",
            "train.prompts_per_step=1",
        ),
        language_layers=2,
        vision_layers=2,
        vocabulary=8192,
        decodes_all=True,
        for_cpu=True,
    ),
}
# No multiple of a width of the models, so that rows of a weight differ.
_DRAWN_ON_CPU = 2**20 + 1
_TINY = (
    "data.max_prompt_tokens=400",
    "data.max_tiles=4",
    "generation.max_response_tokens=96",
    "generation.kv_cache_gib=0.02",
    "generation.max_requests=16",
    "generation.max_tokens_per_step=512",
    "generation.feature_cache_gib=0.1",
    "train.tokens_per_microbatch=512",
    "train.prompts_per_step=4",
)
_TINY_VISION = {
    "hidden_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "intermediate_size": 320,
    "image_size": [56, 56],
}
_TINY_TEXT = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "vocab_size": 520,
}


def hf_config(case: Case, *, tiny: bool) -> dict[str, Any]:
    """Return the configuration of a case's model, as transformers' InternVL has it."""
    config: dict[str, Any] = copy.deepcopy(dict(KNOWN_MODELS["r1v2-38b"]))
    for part, layers in (("text_config", case.language_layers), ("vision_config", case.vision_layers)):
        if layers:
            config[part]["num_hidden_layers"] = layers
    if case.vocabulary:
        config["text_config"]["vocab_size"] = case.vocabulary
        config["image_token_id"] = case.vocabulary - 20
    if tiny:
        config["vision_config"].update(_TINY_VISION)
        config["text_config"].update(_TINY_TEXT)
        config["image_token_id"] = 500
    return config


def prepare(case: Case, folder: Path, *, tiny: bool, device: str) -> tuple[RankSpec, tuple[RankMemory, ...]]:
    """Write the inputs of a step and return what runs it, with the plan of its rows.

    Args:
        folder: a new one.
        device: cuda or cpu.

    Raises:
        ValueError: the recipe is not there.
    """
    file = RECIPES / case.recipe
    if not file.is_file():
        raise ValueError(f"{file} is not there; the cases are {', '.join(CASES)}")
    overrides = (*case.overrides, *ALONE, "checkpoint.asynchronous=false", *(_TINY if tiny else ()))
    recipe = load_recipe(file, overrides)
    assert recipe.stage is StageName.grpo
    config = hf_config(case, tiny=tiny)
    is_on_gpu = device == "cuda" and torch.cuda.is_available()
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30 if is_on_gpu else 141.0
    plan = make_plan(recipe, config, Cluster(1, 1, memory, 0.0, HARDWARE["h200"]))
    inputs = write_rehearsal(
        recipe,
        config,
        r1v2_architecture(sizes_config(config)),
        Layout(1, 1, 1, 0, False),
        folder=folder / "inputs",
        hf_path=None,
    )
    step = inputs.step
    spec = RankSpec(
        recipe=str(inputs.recipe),
        stage=recipe.stage,
        rank=0,
        world_size=1,
        gpus_per_node=1,
        gpu_memory_gib=memory,
        device=device,
        rehearsed_prompts=step.long_of_replica,
        prompts_of_step=step.prompts_of_replica,
        mixed_groups=step.mixed_groups,
        whole_groups=step.whole_groups,
        decoded_tokens=recipe.generation.max_response_tokens if case.decodes_all else 4,
    )
    return spec, plan_as_rehearsed(plan, step)


def rehearse(name: str, output: Path, *, tiny: bool, device: str = "cuda") -> RankResult:
    """Rehearse a case in a process of its own and write what it found for `measure`."""
    with tempfile.TemporaryDirectory(prefix="r1v2-step-") as folder:
        spec, _ = prepare(CASES[name], Path(folder), tiny=tiny, device=device)
        (result,) = rehearse_ranks([spec], Path(folder))
    if result.error:
        raise RuntimeError(f"the rehearsal of {name} ended in {result.error_phase}: {result.error}")
    content = {"case": _identity(name, tiny), "phases": [[phase.name, phase.peak] for phase in result.phases]}
    write_file(output, json.dumps(content, indent=1) + "\n")
    return result


def _identity(name: str, tiny: bool) -> list[object]:
    """Return what a rehearsal and a measurement must have in common, as JSON has it."""
    return [name, tiny, json.loads(json.dumps(CASES[name].__dict__))]


class AllocatorWatch(Watch):
    """The peaks of phases as torch's allocator counts them; the operators run unwatched."""

    def __init__(self, on_phase: Callable[[str], object] = lambda _: None) -> None:
        super().__init__("cuda", on_phase=on_phase)
        self._measured: list[PhaseMemory] = []

    def __enter__(self) -> AllocatorWatch:
        return self

    def __exit__(self, *_: object) -> None: ...

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what happens inside the block."""
        with super().phase(name), self._measuring(self.ledger.phases[-1]):
            yield

    @contextmanager
    def phase_alone(self, name: str) -> Iterator[None]:
        """Measure what happens inside the block, which is no part of the phases around it."""
        self._note_peak()
        around, self._measured = self._measured, []
        with super().phase_alone(name), self._measuring(self.ledger.phases[-1]):
            yield
        self._measured = around

    @contextmanager
    def _measuring(self, phase: PhaseMemory) -> Iterator[None]:
        self._note_peak()
        phase.held_before = phase.peak = torch.cuda.memory_allocated()
        self._measured.append(phase)
        try:
            yield
        finally:
            self._note_peak()
            self._measured.remove(phase)

    def _note_peak(self) -> None:
        """Give the peak since the last call to the phases that are open."""
        peak = torch.cuda.max_memory_allocated()
        for phase in self._measured:
            phase.peak = max(phase.peak, peak)
        torch.cuda.reset_peak_memory_stats()


def install_random_weights(device: torch.device) -> None:
    """Let folders give weights that are drawn on the device; in a process of its own, where nothing is put back."""
    read = original(SafetensorsFolder, "tensor")
    generator = torch.Generator(device=device).manual_seed(0)

    def tensor(self: SafetensorsFolder, name: str) -> torch.Tensor:
        mapped = read(self, name)  # a hole in a file: its pages are never touched
        drawn = torch.empty(mapped.shape, dtype=mapped.dtype, device=device)
        if drawn.dim() > 1 and device.type == "cpu":
            # A CPU draws for minutes: it repeats what it has drawn.
            drawn = drawn.view(-1)
            block = drawn[:_DRAWN_ON_CPU].normal_(0.0, 0.02, generator=generator)
            for part in drawn.split(_DRAWN_ON_CPU)[1:]:
                part.copy_(block[: len(part)])
            return drawn.view(mapped.shape)
        if drawn.dim() > 1:
            return drawn.normal_(0.0, 0.02, generator=generator)
        return drawn.fill_(0.0 if name.endswith("bias") else 1.0)

    put(SafetensorsFolder, "tensor", tensor)


def measure(
    name: str, rehearsed: Path, *, tiny: bool, on_figures: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    """Take the step of a case on this process's device.

    Args:
        rehearsed: what `rehearse` wrote; nothing there: measured beside the plan alone.
        on_figures: called with what is known so far whenever a phase begins.

    Returns:
        Bytes by phase, when the phases began, and the times of the step; an error where it did not come to its end.

    Raises:
        ValueError: the rehearsal is of another case.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peaks = _rehearsed_peaks(name, rehearsed, tiny=tiny)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="r1v2-step-") as folder:
        spec, planned = prepare(CASES[name], Path(folder), tiny=tiny, device=device.type)
        install_random_weights(device)
        metrics = Path(spec.recipe).parent / "run" / "metrics.jsonl"
        began: list[tuple[str, float]] = []

        def figures_of(result: RankResult, phase: str) -> dict[str, Any]:
            lines = metrics.read_text().splitlines() if metrics.is_file() else ["{}"]
            return {
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
                "torch": torch.__version__,
                "seconds": result.seconds,
                "phase": phase,
                "began": began,
                "phases": compare(planned, peaks, result),
                "metrics": json.loads(lines[-1]),
                "error": f"{result.error_phase}: {result.error}" if result.error else "",
            }

        def tell(phase: str) -> None:
            seconds = time.perf_counter() - begin
            began.append((phase, round(seconds, 1)))
            on_figures(figures_of(RankResult(0, phases=watch.ledger.phases, seconds=seconds), phase))

        watch = AllocatorWatch(tell) if device.type == "cuda" else Watch("cpu", on_phase=tell)
        figures = figures_of(rehearse_rank(replace(spec, is_fake=False), watch), "")
    if device.type == "cuda":
        figures["reserved by the allocator"] = torch.cuda.max_memory_reserved()
    return figures


def _rehearsed_peaks(name: str, file: Path, *, tiny: bool) -> list[tuple[str, int]]:
    if not file.is_file():
        return []
    content = json.loads(file.read_text())
    if content["case"] != _identity(name, tiny):
        raise ValueError(f"{file} is the rehearsal of {content['case'][:2]}, or of other settings; make it again")
    return [(phase, peak) for phase, peak in content["phases"]]


def compare(
    planned: Sequence[RankMemory], rehearsed: Sequence[tuple[str, int]], measured: RankResult
) -> list[dict[str, Any]]:
    """Return the bytes of each phase that was measured: planned, rehearsed, measured."""
    rows = []
    for number, phase in enumerate(measured.phases):
        memory = planned_memory(planned, measured, phase)
        # A rehearsal has the same phases in the same order, and loads its checkpoint at the end.
        known = number < len(rehearsed) and rehearsed[number][0] == phase.name
        row = {
            "phase": phase.name,
            "planned": memory.total if memory is not None else None,
            "rehearsed": rehearsed[number][1] if known else None,
            "measured": phase.peak,
        }
        for other in ("planned", "rehearsed"):
            if row[other]:
                row[f"{other} / measured"] = round(row[other] / max(1, phase.peak), 4)
        rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Rehearse or measure a case; return 1 where the step failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_step", description=__doc__)
    parser.add_argument("action", choices=("rehearse", "measure"))
    parser.add_argument("case", choices=CASES)
    parser.add_argument("rehearsal", type=Path, help="the file that rehearse writes and measure reads")
    parser.add_argument("--tiny", action="store_true", help="widths for a CPU")
    parser.add_argument("--output", type=Path, help="write the measured figures there")
    arguments = parser.parse_args(argv)
    if arguments.action == "rehearse":
        is_for_cpu = arguments.tiny or CASES[arguments.case].for_cpu
        device = "cpu" if is_for_cpu else "cuda"
        result = rehearse(arguments.case, arguments.rehearsal, tiny=arguments.tiny, device=device)
        print(f"{arguments.rehearsal}: {result.seconds:.0f} s, {result.own_peak / 2**30:.2f} GiB of memory")
        return 0

    def write(figures: dict[str, Any]) -> None:
        if arguments.output is not None:
            write_file(arguments.output, json.dumps(figures, indent=1) + "\n")

    figures = measure(arguments.case, arguments.rehearsal, tiny=arguments.tiny, on_figures=write)
    write(figures)
    print(json.dumps(figures, indent=1))
    return 1 if figures["error"] else 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # megatron-core's checkpoint writer keeps a process, which would hold the output open for whoever reads it.
    for child in multiprocessing.active_children():
        child.kill()
    # Not through Python's exit: threads and process groups of the step would wait for others.
    os._exit(status)
