"""Evaluation of a checkpoint by itself: `r1v2 evaluate` without an endpoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron_r1v2.config.recipes import EvaluateRecipe
from megatron_r1v2.data.shards import check_shards
from megatron_r1v2.evaluation.evaluator import check_answered
from megatron_r1v2.evaluation.pass_at_1 import EvaluationResult, check_name
from megatron_r1v2.evaluation.response_log import ResponseLog
from megatron_r1v2.evaluation.response_rows import Evaluation, evaluation_rows
from megatron_r1v2.monitoring.progress import progress_bar
from megatron_r1v2.parallel import objects
from megatron_r1v2.stages.loaded_model import LoadedModel, open_model
from megatron_r1v2.types import Prompt

SAVE_EVERY_PROMPTS = 64
"""After so many the responses are on disk, and an interrupted evaluation goes on from there. Each time all wait for the
longest response: more is faster."""


def run_evaluation(recipe: EvaluateRecipe, name: str) -> EvaluationResult | None:
    """Evaluate the weights in `model.checkpoint` (or `model.hf_path`) on `evaluation.data`.

    An evaluation that was interrupted goes on with the prompts that lack a response.

    Args:
        name: of the evaluation; `evaluation-NAME.json` and its responses go to `run.output_dir`.

    Returns:
        The result on the first rank, None on the others.

    Raises:
        EndpointFailed: the judge gives no answer; the responses are kept.
        ValueError: bad data, or an evaluation of this name with other settings, finished or interrupted.
    """
    folder, model = Path(recipe.run.output_dir), recipe.model.checkpoint or recipe.model.hf_path
    check_name(folder, name, model=model)  # before the model is read, whose step the log's check asks for too
    with open_model(recipe) as loaded:
        prompts = list(loaded.read_prompts(recipe.evaluation.data, recipe.evaluation.prompts))
        check_answered(prompts)
        survey = loaded.print_survey(recipe.evaluation.data)
        evaluation = Evaluation(
            name,
            folder,
            recipe.evaluation,
            recipe.reward,
            recipe.generation.max_response_tokens,
            model=model,
            step=loaded.version,
            available=sum(check_shards(recipe.evaluation.data).values()),
            rows=survey.digest[:12],
        )
        log = evaluation.open_log() if loaded.context.is_main else None
        _respond(loaded, recipe, prompts, log, name)
        return evaluation.conclude([prompt.key for prompt in prompts], log) if log is not None else None


def _respond(
    loaded: LoadedModel, recipe: EvaluateRecipe, prompts: list[Prompt], log: ResponseLog | None, name: str
) -> None:
    """Collective over the world: generate, score and log the missing responses, some prompts at a time."""
    settings = recipe.evaluation
    done = log.places if log is not None else set()
    todo = [prompt.key for prompt in prompts if any((prompt.key, run) not in done for run in range(settings.runs))]
    # Only the first rank has the log.
    wanted = set(objects.all_gather(todo)[0])
    missing = [prompt for prompt in prompts if prompt.key in wanted]
    with (
        loaded.verifiers() as pool,
        progress_bar("evaluate", len(prompts) * settings.runs, shown=loaded.context.is_main) as show,
    ):
        evaluator = loaded.evaluator(loaded.engine(), pool, settings=settings, reward=recipe.reward)
        for start in range(0, len(missing), SAVE_EVERY_PROMPTS):
            part = missing[start : start + SAVE_EVERY_PROMPTS]
            before = (len(prompts) - len(missing) + start) * settings.runs
            # Of this replica: another one's responses are shown when the part is done.
            scored = evaluator.respond(
                part,
                name=f"{name}-{start}",
                step=loaded.version,
                progress=partial(_show, show, before),
            )
            show(before + len(scored))
            evaluator.features.clear()
            if log is not None:
                log.append(evaluation_rows(part, scored, step=loaded.version))


def _show(show: Callable[[int], None], before: int, responses: int, tokens: int) -> None:  # noqa: ARG001
    show(before + responses)
