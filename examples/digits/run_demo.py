"""The paper in miniature, every stage on real handwriting, on a CPU in minutes: this is `make demo`.

data         pictures of two handwritten digits and questions about them, split by handwriting
components   a vision tower pretrained on digits and a language model pretrained on text, as HF folders
base         both spliced, with a random adapter between them
align        the adapter learns from reference responses until a little under half of its answers are right
pairs        pairs of a better and a worse response, from the aligned model's own responses
mpo          the adapter learns from these pairs
grpo         the adapter learns from rewards alone, with the Selective Sample Buffer
evaluation   Pass@1 on handwriting that no stage has trained on, after each of the last stages, with equal seeds
export       the trained model as an HF folder that plain transformers loads
report       one HTML page about the GRPO run

python -m examples.digits.run_demo --output runs/digits
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from examples import whole_run
from examples.stages import Stage, StageRunner
from examples.whole_run import Paths
from megatron_r1v2.evaluation.pass_at_1 import comparison_table, read_evaluation

RECIPES = Path(__file__).parent
IMAGE_SETS = ("align", "prefer", "grpo", "validation", "heldout")
BASE_RANGE = (0.35, 0.60)
"""The wanted range of the base model's Pass@1: below, GRPO sees too few right answers; above, too few wrong ones."""
GOAL = 0.85
EVALUATIONS = ("aligned", "mpo", "grpo")


def demo_paths(root: Path) -> Paths:
    """Return where everything of one demo is."""
    return Paths(root, RECIPES)


def component_stages(paths: Paths, seed: int) -> list[Stage]:
    """Return the stages that need nothing but scikit-learn's digits; they may run side by side."""
    return [
        Stage(
            "language-model",
            "pretrain a Qwen2 on text reasoning",
            ("examples.digits.make_language_model", "--output", str(paths.language), "--seed", str(seed)),
        ),
        Stage(
            "vision-tower",
            "pretrain an InternViT on single digits",
            ("examples.digits.make_vision_tower", "--output", str(paths.vision), "--seed", str(seed)),
        ),
    ]


def data_stage(paths: Paths, seed: int) -> Stage:
    """Return the stage that makes the questions."""
    command = ("examples.digits.make_data", "--output", str(paths.data), "--seed", str(seed))
    return Stage("data", "make questions about two digits", command)


def align_stage(paths: Paths, seed: int, overrides: Sequence[str]) -> Stage:
    """Return the supervised stage."""
    validation = f"data.validation={paths.shards / 'validation'}"
    what = "train the adapter until about half is right"
    return whole_run.align_stage(paths, seed, (validation, *overrides), what=what)


def pairs_stage(paths: Paths, seed: int) -> Stage:
    """Return the stage that makes preference pairs of the aligned model's own responses."""
    settings = (
        f"run.seed={seed}",
        f"model.hf_path={paths.base}",
        f"model.checkpoint={paths.align}",
        f"data.train={paths.shards / 'prefer'}",
        f"run.output_dir={paths.pairs}",
    )
    command = ("megatron_r1v2", "pairs", str(RECIPES / "pairs.yaml"), *settings)
    return Stage("pairs", "make preference pairs of the model's own responses", command)


def mpo_stage(paths: Paths, seed: int, overrides: Sequence[str]) -> Stage:
    """Return the preference optimization stage."""
    settings = (
        f"run.output_dir={paths.mpo}",
        f"run.seed={seed}",
        f"model.hf_path={paths.base}",
        f"model.checkpoint={paths.align}",
        f"data.train={paths.pairs}",
    )
    command = ("megatron_r1v2", "mpo", str(RECIPES / "mpo.yaml"), *settings, *overrides)
    return Stage("mpo", "mixed preference optimization", command)


def run_demo(paths: Paths, runner: StageRunner, seed: int, overrides: Sequence[str]) -> None:
    """Run every stage in order; each starts from what the ones before wrote.

    Raises:
        StageError: a stage failed.
    """
    runner.run(data_stage(paths, seed))
    runner.run(*component_stages(paths, seed))
    runner.run_chains([[stage] for stage in whole_run.shard_stages(paths, IMAGE_SETS)], at_once=2)
    runner.run(whole_run.base_stage(paths))
    runner.run(align_stage(paths, seed, ()))
    aligned = whole_run.evaluation_stage(paths, seed, "aligned", paths.align, overrides)
    runner.run(aligned, pairs_stage(paths, seed))
    runner.run(mpo_stage(paths, seed, ()))
    runner.run(whole_run.evaluation_stage(paths, seed, "mpo", paths.mpo, overrides))
    runner.run(whole_run.grpo_stage(paths, seed, paths.mpo, overrides))
    runner.run(whole_run.evaluation_stage(paths, seed, "grpo", paths.grpo, overrides))
    runner.run(*whole_run.closing_stages(paths))


def show_results(paths: Paths, console: Console) -> None:
    """Print the table before and after, the buffer's numbers, and what is not as it should be."""
    results = [read_evaluation(paths.grpo / f"evaluation-{name}.json") for name in EVALUATIONS]
    console.print(comparison_table(results))
    console.print(whole_run.buffer_table(paths.grpo / "metrics.jsonl"))
    for line in remarks(results[0].pass_at_1, results[-1].pass_at_1):
        console.print(line, highlight=False)


def remarks(before: float, after: float) -> list[str]:
    """Return a sentence for each promise of the demo that a run has not kept.

    Args:
        before: Pass@1 of the base model on held-out handwriting, 0 to 1.
        after: the same after GRPO.
    """
    low, high = BASE_RANGE
    lines = []
    if not low <= before <= high:
        lines.append(
            f"NOTE: the base model's Pass@1 is {before:.1%}, outside {low:.0%} to {high:.0%}: GRPO had an untypical "
            "start. evaluation.stop_at_pass_at_1 in align.yaml moves it."
        )
    if after < GOAL:
        lines.append(f"NOTE: Pass@1 after GRPO is {after:.1%}, below the {GOAL:.0%} that this demo should reach.")
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    whole_run.run_example(
        arguments,
        module="examples.digits.run_demo",
        description=__doc__,
        paths_of=demo_paths,
        output="runs/digits",
        run=run_demo,
        show=show_results,
    )


if __name__ == "__main__":
    main()
