"""Evaluates a checkpoint by itself: what `python -m megatron_r1v2.evaluate` does."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from megatron_r1v2.config.schema import RunRecipe
from megatron_r1v2.evaluation.pass_at_1 import EvaluationResult, comparison_table, evaluation_path, write_evaluation
from megatron_r1v2.evaluation.records import write_rollouts
from megatron_r1v2.training.progress import progress_bar
from megatron_r1v2.training.session import open_model


def run_evaluation(recipe: RunRecipe, name: str) -> EvaluationResult:
    """Evaluate the weights in `model.checkpoint` (or `model.hf_path`) on `evaluation.data`.

    Args:
        recipe: the settings.
        name: of the evaluation; `evaluation-NAME.json` and its responses go to `run.output_dir`.

    Returns:
        The result.
    """
    folder = Path(recipe.run.output_dir)
    path = evaluation_path(folder, name)
    with open_model(recipe) as loaded, loaded.verifiers() as pool:
        prompts = loaded.read_prompts(recipe.evaluation.data, recipe.evaluation.prompts)
        evaluator = loaded.evaluator(loaded.engine(), pool)
        # Of this replica: another one's responses never come here.
        with progress_bar("evaluate", len(prompts) * recipe.evaluation.runs, shown=loaded.context.is_main) as show:
            result, records, _ = evaluator.run(
                prompts, name=name, step=loaded.version, progress=lambda responses, _: show(responses)
            )
        if loaded.context.is_main:
            write_rollouts(path.with_suffix(".rollouts.jsonl"), records)
            write_evaluation(folder, result)
            Console().print(comparison_table([result]))
    return result
