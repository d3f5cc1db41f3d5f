"""The work and memory of log-probs and update at 38B: a prompt shared by its responses beside separate rows.

    python -m benchmarks.shared_rows                   # a table for docs/measured.md; 8 rehearsals of a minute each
    python -m benchmarks.shared_rows --lengths 8192    # responses of 8k only

Rehearsed, so nothing is computed: the adapter trains, TP8 with sequence parallelism, all layers recomputed, a prompt of
4,096 tokens with 13 tiles, and a group of 8 responses of full length in each microbatch. Two layer counts, and the line
through them to all layers.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_r1v2.checkpoint.hf.architecture import r1v2_architecture
from megatron_r1v2.checkpoint.hf.config import sizes_config
from megatron_r1v2.config.choices import Packing
from megatron_r1v2.config.load import load_recipe_as
from megatron_r1v2.config.recipes import GrpoRecipe
from megatron_r1v2.planning.known_models import KNOWN_MODELS
from megatron_r1v2.planning.parameters import Layout
from megatron_r1v2.rehearsal.few_layers import Layers, Line
from megatron_r1v2.rehearsal.preparation import write_rehearsal
from megatron_r1v2.rehearsal.rank import RankResult, RankSpec
from megatron_r1v2.rehearsal.run import rehearse_ranks

RECIPE = Path(__file__).parents[1] / "examples" / "r1v2_38b" / "grpo.yaml"
MODEL = KNOWN_MODELS["r1v2-38b"]
LAYOUT = Layout(8, 1, 1, 0, True)
LINE = Line.through(Layers.of(MODEL))
RESPONSES = 8
PHASES = ("log_probs", "update")


@dataclass(frozen=True)
class Row:
    """The figures of a phase of the first step, on one GPU of eight."""

    phase: str
    tokens: int
    flops: float
    peak: float
    """Bytes."""


def case(packing: Packing, response_tokens: int) -> GrpoRecipe:
    """Return a recipe whose microbatches have a group each, two of them in a step."""
    prompt_tokens = load_recipe_as(GrpoRecipe, RECIPE, []).data.max_prompt_tokens
    prompts = 1 if packing is Packing.shared else RESPONSES
    overrides = [
        f"generation.max_response_tokens={response_tokens}",
        f"generation.responses_per_prompt={RESPONSES}",
        # Engine and cache are not what is asked about.
        f"generation.max_requests={2 * RESPONSES}",
        f"train.packing={packing.value}",
        f"train.tokens_per_microbatch={prompts * prompt_tokens + RESPONSES * response_tokens}",
        # With one update its own forward gives the log-probs. Each has a group.
        "train.updates_per_step=2",
        "train.prompts_per_step=2",
        "train.recompute=full",
        "evaluation.every_steps=0",
    ]
    return load_recipe_as(GrpoRecipe, RECIPE, overrides)


def rehearse_case(recipe: GrpoRecipe, layers: Layers) -> list[Row]:
    """Rehearse one rank with so many layers.

    Raises:
        RuntimeError: it does not run.
    """
    config = sizes_config(layers.given_to(MODEL))
    with tempfile.TemporaryDirectory(prefix="r1v2-shared-rows-") as name:
        folder = Path(name)
        inputs = write_rehearsal(
            recipe, config, r1v2_architecture(config), LAYOUT, folder=folder / "inputs", hf_path=None
        )
        step = inputs.step
        assert recipe.stage is not None
        spec = RankSpec(
            recipe=str(inputs.recipe),
            stage=recipe.stage,
            rank=0,
            world_size=LAYOUT.tensor,
            gpus_per_node=LAYOUT.tensor,
            gpu_memory_gib=80.0,
            rehearsed_prompts=step.long_of_replica,
            prompts_of_step=step.prompts_of_replica,
            mixed_groups=step.mixed_groups,
        )
        (result,) = rehearse_ranks([spec], folder)
        if result.error:
            raise RuntimeError(f"the rehearsal ended in {result.error_phase}: {result.error}")
        first = (folder / "inputs" / "run-0" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0]
    return [_row(result, phase, json.loads(first)) for phase in PHASES]


def _row(result: RankResult, name: str, metrics: dict[str, float]) -> Row:
    phase = next(phase for phase in result.phases if phase.name == name)
    return Row(name, int(metrics[f"perf/{name}_tokens"]), phase.flops, phase.peak)


def measure(packing: Packing, response_tokens: int) -> list[Row]:
    """Return the figures of a case with all layers."""
    recipe = case(packing, response_tokens)
    few, more = (rehearse_case(recipe, layers) for layers in (LINE.few, LINE.more))
    return [
        Row(low.phase, low.tokens, LINE.extend(low.flops, high.flops), LINE.extend(low.peak, high.peak))
        for low, high in zip(few, more, strict=True)
    ]


def table_lines(response_tokens: int, shared: Sequence[Row], separate: Sequence[Row]) -> list[str]:
    """Return the lines of the table for one length of responses."""
    lines = []
    for ours, theirs in zip(shared, separate, strict=True):
        figures = (
            f"{ours.tokens:,} | {theirs.tokens:,} | {ours.tokens / theirs.tokens:.2f}",
            f"{ours.flops / 1e15:.2f} | {theirs.flops / 1e15:.2f} | {ours.flops / theirs.flops:.2f}",
            f"{ours.peak / 2**30:.1f} | {theirs.peak / 2**30:.1f} | {ours.peak / theirs.peak:.2f}",
        )
        lines.append(f"| {response_tokens:,} | {ours.phase} | {' | '.join(figures)} |")
    return lines


HEAD = (
    "| response | phase | tokens | separate | ratio | PFLOP a GPU | separate | ratio | peak GiB | separate | ratio |\n"
    "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.shared_rows",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 65536], help="tokens of a response")
    arguments = parser.parse_args(argv)
    print(HEAD)
    for length in arguments.lengths:
        shared, separate = (measure(packing, length) for packing in (Packing.shared, Packing.first_fit_decreasing))
        print(*table_lines(length, shared, separate), sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
