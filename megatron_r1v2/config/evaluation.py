"""Checks of the `evaluation` section: validation while a stage runs, and the servers that an evaluation asks."""

from __future__ import annotations

import os
import re

from megatron_r1v2.config.schema import EvaluationConfig, RunRecipe


def check_endpoints(settings: EvaluationConfig) -> None:
    """Check where the evaluated model and the judge are served.

    Args:
        settings: the `evaluation` section.

    Raises:
        ValueError: a URL without a model or the other way round, no URL, or a key that is not in the environment.
    """
    for kind in ("endpoint", "judge"):
        url, model = getattr(settings, f"{kind}_url"), getattr(settings, f"{kind}_model")
        if bool(url) != bool(model):
            raise ValueError(
                f"evaluation.{kind}_url={url!r} and evaluation.{kind}_model={model!r}: set both, or neither"
            )
        if url and not re.match(r"https?://[^/]+", url):
            raise ValueError(
                f"evaluation.{kind}_url={url!r} is not a URL; accepted: the base of an OpenAI-compatible server, such "
                "as http://127.0.0.1:8000/v1"
            )
        variable = getattr(settings, f"{kind}_key_variable")
        if url and variable and not os.environ.get(variable):
            raise ValueError(
                f"evaluation.{kind}_key_variable={variable!r} but there is no such environment variable, or it is "
                "empty; export it, or leave the setting empty for a server without a key"
            )


def check_validation(recipe: RunRecipe) -> None:
    """Check that validation while a stage runs has prompts, and that its goal is looked at.

    Args:
        recipe: the settings.

    Raises:
        ValueError: no validation split, or a goal that is never looked at.
    """
    if recipe.evaluation.every_steps and not recipe.data.validation:
        raise ValueError(
            f"evaluation.every_steps={recipe.evaluation.every_steps} needs prompts: set data.validation to a folder of "
            "shards, or evaluation.every_steps=0"
        )
    if recipe.evaluation.stop_at_pass_at_1 and not recipe.evaluation.every_steps:
        raise ValueError(
            f"evaluation.stop_at_pass_at_1={recipe.evaluation.stop_at_pass_at_1} is never looked at while "
            "evaluation.every_steps=0; set evaluation.every_steps"
        )
