"""The whole path on real weights from two packages: SmolLM2-135M and a DINOv2 ViT-S/14 (`make real-weights`).

data         crops of photographs and handwritten digits, with questions
components   the language model out of a GGUF file, the vision tower out of an ONNX file, as HF folders
             and a first adapter, fitted so that image tokens are near the embeddings of words
base         the three spliced
check        features and logits of the parts against transformers' and the ONNX file's own network
align        the adapter learns from reference responses
grpo         the adapter learns from rewards alone, with the Selective Sample Buffer
evaluation   Pass@1 on pictures that no stage has trained on, before and after GRPO, with equal seeds
export       the trained model as an HF folder that plain transformers loads
report       one HTML page about the GRPO run

python -m examples.real_weights.run_example --output runs/real_weights
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from examples import whole_run
from examples.stages import Stage, StageRunner
from examples.whole_run import Paths
from megatron_r1v2.evaluation.pass_at_1 import comparison_table
from megatron_r1v2.report.evaluation_read import Evaluation, read_evaluations

RECIPES = Path(__file__).parent
SETS = ("align", "grpo", "heldout")
EVALUATIONS = ("aligned", "grpo")


def example_paths(root: Path) -> Paths:
    """Return the paths of one run of the example."""
    return Paths(root, RECIPES)


def component_stages(paths: Paths) -> list[Stage]:
    """Return the stages that read the installed packages only."""
    return [
        Stage(
            "language-model",
            "make SmolLM2 an HF folder",
            ("examples.real_weights.convert_language_model", "--output", str(paths.language)),
        ),
        Stage(
            "vision-tower",
            "make the ViT-S/14 an HF folder",
            ("examples.real_weights.convert_vision_tower", "--output", str(paths.vision)),
        ),
    ]


def adapter_stage(paths: Paths, seed: int) -> Stage:
    """Return the stage that fits the first adapter to the components."""
    folders = ("--vision", str(paths.vision), "--language", str(paths.language))
    rows = ("--rows", str(paths.data / "align.jsonl"), "--seed", str(seed))
    command = ("examples.real_weights.make_adapter", *folders, *rows, "--output", str(paths.adapter))
    return Stage("adapter", "fit a first adapter", command)


def data_stage(paths: Paths, seed: int) -> Stage:
    """Return the stage that makes the questions."""
    command = ("examples.real_weights.make_data", "--output", str(paths.data), "--seed", str(seed))
    return Stage("data", "make questions about photographs and digits", command)


def check_stage(paths: Paths) -> Stage:
    """Return the comparison of the parts with other implementations."""
    folders = ("--base", str(paths.base), "--vision", str(paths.vision), "--language", str(paths.language))
    command = ("examples.real_weights.check_parts", *folders, "--images", str(paths.data / "images"))
    return Stage("check", "compare the parts with transformers and ONNX", command)


def run_stages(paths: Paths, runner: StageRunner, seed: int, overrides: Sequence[str]) -> None:
    """Run every stage in order; each starts from what the ones before wrote.

    Raises:
        StageError: a stage failed.
    """
    runner.run(data_stage(paths, seed), *component_stages(paths))
    chains = [[adapter_stage(paths, seed)], whole_run.shard_stages(paths, SETS)]
    runner.run_chains(chains, at_once=2)
    runner.run(whole_run.base_stage(paths, adapter=paths.adapter))
    runner.run(check_stage(paths))
    runner.run(whole_run.align_stage(paths, seed, (), what="train the adapter on reference responses"))
    runner.run(whole_run.evaluation_stage(paths, seed, "aligned", paths.align, overrides))
    runner.run(whole_run.grpo_stage(paths, seed, paths.align, overrides))
    runner.run(whole_run.evaluation_stage(paths, seed, "grpo", paths.grpo, overrides))
    runner.run(*whole_run.closing_stages(paths))


def show_results(paths: Paths, console: Console) -> None:
    """Print the agreement of the parts, Pass@1 before and after, also by kind of picture, and the buffer's numbers."""
    # The figures are at the end of the log, after the warnings of libraries.
    figures = (paths.root / "logs" / "check.log").read_text(encoding="utf-8").splitlines()[-4:]
    console.print("\n".join(figures), highlight=False)
    by_name = {each.result.name: each for each in read_evaluations([paths.grpo], [])}
    evaluations = [by_name[name] for name in EVALUATIONS]
    console.print(comparison_table([each.result for each in evaluations]))
    console.print(kind_table(evaluations))
    console.print(whole_run.buffer_table(paths.grpo / "metrics.jsonl"))


def kind_table(evaluations: Sequence[Evaluation]) -> Table:
    """Return Pass@1 of each evaluation by kind of picture."""
    table = Table(title="Pass@1 by kind of picture")
    table.add_column("")
    for evaluation in evaluations:
        table.add_column(evaluation.result.name, justify="right")
    for kind in evaluations[0].groups["kind"]:
        table.add_row(kind, *(f"{each.groups['kind'][kind].rate:.1%}" for each in evaluations))
    return table


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    whole_run.run_example(
        arguments,
        module="examples.real_weights.run_example",
        description=__doc__,
        paths_of=example_paths,
        output="runs/real_weights",
        run=run_stages,
        show=show_results,
    )


if __name__ == "__main__":
    main()
