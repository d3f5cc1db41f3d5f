"""The table of docs/planning.md: the 38B GRPO recipes on 1 to 512 GPUs, estimated.

python -m megatron_r1v2.planning.scale_page examples/r1v2_38b
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_r1v2.checkpoint.hf.architecture import r1v2_architecture
from megatron_r1v2.config.choices import Fp8, Recompute
from megatron_r1v2.config.load import load_recipe_as
from megatron_r1v2.config.recipes import GrpoRecipe
from megatron_r1v2.planning.hardware import HARDWARE, Hardware
from megatron_r1v2.planning.known_models import KNOWN_MODELS
from megatron_r1v2.planning.memory import GIB, fits, plan_memory
from megatron_r1v2.planning.parameters import Layout
from megatron_r1v2.planning.plan import Cluster
from megatron_r1v2.planning.roofline import step_time
from megatron_r1v2.planning.search import propose_layout
from megatron_r1v2.planning.tails import Lengths, Replica, Tail, simulate_tail
from megatron_r1v2.planning.workload import Workload

RECIPES = ("grpo_one_gpu", "grpo", "grpo_fp8", "grpo_64k", "grpo_language", "grpo_language_64k")
GPUS = (1, 8, 64, 512)
_GPUS_PER_NODE, _RESERVE_GIB = 8, 4.0
# Half of the longest response, as `r1v2 plan` assumes; of 64k, few responses come near.
_LONGEST_MEAN, _SPREAD = 12_000, 0.8
_ARCHITECTURE = r1v2_architecture(KNOWN_MODELS["r1v2-38b"])
_HEAD = (
    "| recipe | GPUs | layout | recompute | GiB of | prompts a step | vision | prefill | decode | log-probs | update | "
    "step | lost | tokens/s and GPU |"
)


@dataclass(frozen=True)
class ScaledRecipe:
    """A recipe on a number of GPUs of the kind that it is written for."""

    name: str
    gpus: int
    hardware: Hardware
    work: Workload
    """Of a step with as many prompts for each replica as on the recipe's own cluster."""
    layout: Layout
    is_own_layout: bool
    """True for the layout of the recipe; otherwise it is the best one that fits."""
    segment_tokens: int

    @property
    def limit(self) -> int:
        """Return the bytes of a rank that tensors may take."""
        return _limit(self.gpus, self.hardware)

    @property
    def lengths(self) -> Lengths:
        """Return the assumed lengths of responses."""
        return Lengths(_mean(self.work), self.work.response_tokens, _SPREAD)

    def seconds(self, tail: Tail) -> dict[str, float]:
        """Return the seconds of a step by phase, in which as many tokens are trained as are generated."""
        # Log-probs of each segment are computed when its step ends, with the weights that sampled it.
        work = replace(self.work, updates_per_step=2) if self.segment_tokens else self.work
        time = step_time(_ARCHITECTURE, self.layout, work, self.hardware, mean_response=self.lengths.mean)
        trained = tail.tokens / (self.work.responses_per_step * self.lengths.mean)
        again = 1 + tail.continued / (self.work.prompts_per_step * self.work.prompt_tokens)
        seconds = {
            "vision": time.vision,
            "prefill": time.prefill * again,
            "decode": tail.seconds,
            "log-probs": time.log_probs * trained,
            "update": time.update * trained,
        }
        return {**seconds, "step": sum(seconds.values())}


def scale_table(recipes: Path, names: tuple[str, ...] = RECIPES) -> str:
    """Return the table.

    Args:
        recipes: the folder of the recipes.
    """
    lines = [_HEAD, "| --- " * (_HEAD.count("|") - 1) + "|"]
    for name in names:
        for gpus in GPUS:
            scaled = scale_recipe(recipes / f"{name}.yaml", gpus)
            cells = [f"`{name}`", str(gpus), *(["none fits", *["-"] * 11] if scaled is None else _cells(scaled))]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def scale_recipe(path: Path, gpus: int) -> ScaledRecipe | None:
    """Return a recipe on so many GPUs, in its own layout where that divides them and fits, else in the best one.

    Returns:
        None where no layout fits.

    Raises:
        ValueError: the file has no header with its cluster.
    """
    recipe = load_recipe_as(GrpoRecipe, path, [])
    own_gpus, hardware = read_cluster(path)
    parallel, segments = recipe.parallel, recipe.generation.segment_tokens
    ranks = parallel.tensor * parallel.pipeline
    prompts = recipe.train.prompts_per_step // (own_gpus // ranks)
    limit = _limit(gpus, hardware)
    work = Workload.from_recipe(recipe, _ARCHITECTURE, gpu_bytes=limit)
    if gpus % ranks == 0:
        layout = Layout(
            parallel.tensor, parallel.pipeline, gpus // ranks, parallel.first_stage_layers, parallel.sequence
        )
        own = replace(work, prompts_per_step=prompts * layout.data)
        if fits(_ARCHITECTURE, layout, own, limit):
            return ScaledRecipe(path.stem, gpus, hardware, own, layout, True, segments)
    # FP8 rounds more: a recipe in bf16 stays in it.
    allowed = hardware if work.fp8 is not Fp8.none else replace(hardware, fp8_flops=0.0)
    best = propose_layout(
        _ARCHITECTURE,
        replace(work, prompts_per_step=max(1, prompts * gpus // ranks)),
        allowed,
        gpus=gpus,
        gpus_per_node=_GPUS_PER_NODE,
        limit=limit,
        mean_response=_mean(work),
    ).best
    if best is None:
        return None
    chosen = replace(
        work,
        prompts_per_step=max(1, prompts * gpus // ranks),
        recompute=best.recompute,
        fp8=best.fp8,
        fp8_weights=best.fp8_weights,
        packed_tokens=best.packed_tokens,
    )
    return ScaledRecipe(path.stem, gpus, hardware, chosen, best.layout, False, segments)


def read_cluster(path: Path) -> tuple[int, Hardware]:
    """Return the GPUs of the recipe's own cluster: their number and their kind."""
    found = re.match(r"# Cluster: (\d+) nodes? x (\d+) GPUs x (\d+) GB\n", path.read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"{path} has no first line like `# Cluster: 1 node x 8 GPUs x 80 GB`; give it one")
    nodes, gpus, memory = map(int, found.groups())
    return nodes * gpus, HARDWARE["h100" if memory <= 80 else "h200"]


def _limit(gpus: int, hardware: Hardware) -> int:
    return Cluster(gpus, _GPUS_PER_NODE, hardware.memory_gib, _RESERVE_GIB, hardware).limit


def _mean(work: Workload) -> float:
    return min(work.response_tokens / 2, _LONGEST_MEAN)


def _cells(scaled: ScaledRecipe) -> Iterator[str]:
    layout, work = scaled.layout, scaled.work
    replica = Replica.planned(_ARCHITECTURE, layout, work, scaled.hardware)
    tail = simulate_tail(replica, scaled.lengths, replicas=layout.data, segment_tokens=scaled.segment_tokens)
    seconds = scaled.seconds(tail)
    peak = plan_memory(_ARCHITECTURE, layout, work).peak
    yield f"TP{layout.tensor} PP{layout.pipeline} DP{layout.data}{'' if scaled.is_own_layout else ' *'}"
    yield "yes" if work.recompute is Recompute.full else "no"
    yield f"{peak.total / GIB:.1f} of {scaled.limit / GIB:.1f}"
    yield f"{work.prompts_per_step:,}"
    yield from (f"{value:,.0f}" for value in seconds.values())
    yield f"{tail.lost:.0%}"
    yield f"{tail.tokens / seconds['step'] / scaled.gpus:,.0f}"


if __name__ == "__main__":
    sys.stdout.write(scale_table(Path(sys.argv[1])))
