"""What the reward model's settings need of each other."""

from __future__ import annotations

import re

from megatron_r1v2.config.schema import Part, RunRecipe


def check_score_head(recipe: RunRecipe, *, is_reward_model: bool) -> None:
    """Check that the scalar head trains where there is one, and nowhere else.

    Raises:
        ValueError: `train.parts` names score in another stage, or not in this one; or a goal that has no meaning here.
    """
    parts = [part.value for part in recipe.train.parts]
    if is_reward_model:
        if Part.score not in recipe.train.parts:
            raise ValueError(
                f"train.parts={parts}: the head of a reward model is new, so it must train; add score, e.g. "
                f"train.parts=[{', '.join([*parts, 'score'])}]"
            )
        if recipe.evaluation.stop_at_pass_at_1:
            raise ValueError(
                f"evaluation.stop_at_pass_at_1={recipe.evaluation.stop_at_pass_at_1}: a reward model answers nothing; "
                "set it to 0"
            )
    elif Part.score in recipe.train.parts:
        raise ValueError(f"train.parts={parts}: only the reward_model stage has a score head; take score out")


def check_score_source(recipe: RunRecipe) -> None:
    """Check that scores come from one place when they count, and from none when they do not.

    Raises:
        ValueError: naming the settings that contradict each other, or one that is no address or no variable.
    """
    weight, source = recipe.reward.model_weight, recipe.reward_model
    given = [f"reward_model.{name}={value!r}" for name in ("checkpoint", "url") if (value := getattr(source, name))]
    if weight > 0 and len(given) != 1:
        raise ValueError(
            f"reward.model_weight={weight:g} needs one source of scores, got {' and '.join(given) or 'none'}; set "
            "reward_model.checkpoint to a checkpoint of the reward_model stage, or reward_model.url to a server"
        )
    if weight == 0 and given:
        raise ValueError(
            f"{' and '.join(given)} would never be asked while reward.model_weight=0; raise the weight, or leave the "
            "source empty"
        )
    if source.hf_path and not source.checkpoint:
        raise ValueError(
            f"reward_model.hf_path={source.hf_path!r} belongs to a reward_model.checkpoint, which is empty; set both"
        )
    if source.url and not re.fullmatch(r"https?://[^\s/]+(/\S*)?", source.url):
        raise ValueError(
            f"reward_model.url={source.url!r} is no address of a server; accepted: e.g. http://127.0.0.1:8001"
        )
    if source.api_key_variable and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", source.api_key_variable):
        raise ValueError(
            "reward_model.api_key_variable must be the name of an environment variable (letters, digits, _); the key "
            "itself belongs into that variable, not into a recipe"
        )
