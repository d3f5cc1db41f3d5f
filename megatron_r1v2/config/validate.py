"""What no type can say: ranges, settings that exclude each other, files that must be there, sizes that must divide."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from megatron_r1v2.config.evaluation import check_endpoints, check_validation
from megatron_r1v2.config.hallucination import check_calibration
from megatron_r1v2.config.layout import check_fp8_shapes, check_layout
from megatron_r1v2.config.pairs import check_pairs
from megatron_r1v2.config.ranges import POSITIVE, RANGES
from megatron_r1v2.config.reward_model import check_score_head, check_score_source
from megatron_r1v2.config.schema import Fp8, Layers, Packing, Part, Precision, RunRecipe, WandbMode

Stage = Literal["align", "pairs", "mpo", "reward_model", "grpo", "evaluate", "serve"]

_NEEDED: Mapping[Stage, tuple[str, ...]] = {
    "align": ("model.hf_path", "data.train"),
    "mpo": ("model.hf_path", "data.train"),
    "reward_model": ("model.hf_path", "data.train"),
    "grpo": ("model.hf_path", "data.train"),
    "evaluate": ("model.hf_path", "evaluation.data"),
    "pairs": ("model.hf_path", "data.train", "pairs.output"),
    "serve": ("model.hf_path",),
}


_FOLDERS = (
    "model.hf_path",
    "model.checkpoint",
    "data.train",
    "data.validation",
    "evaluation.data",
    "reward_model.hf_path",
    "reward_model.checkpoint",
)

_USED: Mapping[Stage, tuple[str, ...]] = {"evaluate": ("model.", "evaluation."), "serve": ("model.",)}
"""Which folders a stage looks into, where not all."""


def check_ranges(recipe: RunRecipe) -> None:
    """Check every setting that can be judged without looking at files.

    Raises:
        ValueError: naming the setting, its value, and what is accepted.
    """
    for name, (low, high) in RANGES.items():
        value = _get(recipe, name)
        # "not (a <= b)" so that nan, which compares false with everything, is refused as well.
        if (low is not None and not value >= low) or (high is not None and not value <= high):
            accepted = f"{low:g} or more" if high is None else f"{low:g} to {high:g}"
            raise ValueError(f"{name}={value} is out of range; accepted: {accepted}")
    for name in POSITIVE:
        if not _get(recipe, name) > 0:
            raise ValueError(f"{name}={_get(recipe, name)} is out of range; accepted: more than 0")
    for name in ("generation.top_p", "evaluation.top_p"):
        if _get(recipe, name) > 1:
            raise ValueError(f"{name}={_get(recipe, name)} is out of range; accepted: more than 0, at most 1")
    _check_text(recipe)
    _check_rewards(recipe)
    _check_parts(recipe)
    _check_combinations(recipe)


def check_stage(recipe: RunRecipe, stage: Stage) -> None:
    """Check what a stage needs: its files, its own limits, and a layout that fits the model's sizes.

    Raises:
        ValueError: a missing path, a setting that this stage refuses, or sizes that do not divide.
    """
    at_endpoint = stage == "evaluate" and bool(recipe.evaluation.endpoint_url)
    for name in ("evaluation.data",) if at_endpoint else _NEEDED[stage]:
        if not _get(recipe, name):
            raise ValueError(f"{name} is not set; the {stage} stage needs it: give the path of an existing folder")
    for name in _FOLDERS:
        if (stage in _USED and not name.startswith(_USED[stage])) or (at_endpoint and name.startswith("model.")):
            continue  # the recipe may be that of a training run, whose data need not be on this machine
        path = _get(recipe, name)
        if path and not Path(path).is_dir():
            raise ValueError(f"{name}={path!r} is not a folder; give the path of an existing one")
    if stage == "evaluate":
        check_endpoints(recipe.evaluation)
    if at_endpoint:
        return
    if stage == "grpo":
        check_grpo(recipe)
        check_calibration(recipe, "model_weight", recipe.reward.model_weight)
    if stage == "mpo":
        check_mpo(recipe)
        check_calibration(recipe, "min_margin", recipe.preference.min_margin)
    if stage == "pairs":
        check_pairs(recipe)
    if stage in ("grpo", "pairs"):
        check_score_source(recipe)
    check_score_head(recipe, is_reward_model=stage == "reward_model")
    if recipe.model.layers is Layers.te and importlib.util.find_spec("transformer_engine") is None:
        raise ValueError(
            "model.layers=te needs TransformerEngine, which is not installed; "
            "set model.layers=local, or run in a container that has it (see Dockerfile)"
        )
    if recipe.generation.cuda_graphs:
        _check_cuda_graphs()
    check_model_fits(recipe, read_hf_config(recipe.model.hf_path))


def _check_cuda_graphs() -> None:
    from torch import cuda  # takes seconds, and the planner reads recipes without it

    if not cuda.is_available():
        raise ValueError(
            "generation.cuda_graphs=true needs a CUDA device and there is none; set generation.cuda_graphs=false"
        )


def check_grpo(recipe: RunRecipe) -> None:
    """Check what GRPO needs of the sampling and reward settings.

    Raises:
        ValueError: a truncated nucleus, groups of one, or nothing to reward.
    """
    generation, reward, train = recipe.generation, recipe.reward, recipe.train
    if generation.top_p < 1:
        raise ValueError(
            f"generation.top_p={generation.top_p} cuts the distribution that the policy gradient needs; "
            "GRPO accepts 1.0 only (evaluation.top_p may be lower)"
        )
    if generation.responses_per_prompt < 2:
        raise ValueError(
            f"generation.responses_per_prompt={generation.responses_per_prompt} leaves nothing to compare within a "
            "group; GRPO needs 2 or more"
        )
    if not any(reward.weights.values()):
        names = ", ".join(f"{part}_weight" for part in reward.weights)
        raise ValueError(f"every weight in the reward section is 0 ({names}): nothing to learn; raise one")
    responses = train.prompts_per_step * generation.responses_per_prompt
    if train.updates_per_step > responses:
        raise ValueError(
            f"train.updates_per_step={train.updates_per_step} is more than the {responses} responses of a step "
            "(train.prompts_per_step x generation.responses_per_prompt); lower it"
        )


def check_mpo(recipe: RunRecipe) -> None:
    """Check what MPO needs of its settings.

    Raises:
        ValueError: no term to train on.
    """
    preference = recipe.preference
    if not (preference.preference_weight or preference.quality_weight or preference.generation_weight):
        raise ValueError(
            "preference.preference_weight, preference.quality_weight and preference.generation_weight are all 0: "
            "nothing to learn; raise one"
        )


def read_hf_config(hf_path: Path | str) -> dict[str, Any]:
    """Read config.json of an HF model folder.

    Raises:
        ValueError: the file is missing or is not JSON.
    """
    path = Path(hf_path) / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"model.hf_path={str(hf_path)!r} has no config.json; give the folder of a whole model, "
            "as checkpoint_tools/reassemble.py writes it"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); copy the model again") from error


def check_model_fits(recipe: RunRecipe, hf_config: Mapping[str, Any]) -> None:
    """Check the layout and the lengths against the sizes of the language model.

    The vision tower pads its heads, so it fits any tensor-parallel size.

    Args:
        recipe: the settings.
        hf_config: the model's config.json; a `text_config` inside it is the language model.

    Raises:
        ValueError: a size that `parallel.tensor` or `parallel.pipeline` does not divide, or too many positions.
    """
    if "llm_config" in hf_config:
        raise ValueError(
            f"model.hf_path={recipe.model.hf_path!r} has the layout of InternVL's chat models (llm_config); training "
            f"reads transformers': python -m checkpoint_tools.hf_to_hf --hf {recipe.model.hf_path} --output FOLDER, "
            "then set model.hf_path to FOLDER"
        )
    text = hf_config.get("text_config", hf_config)
    missing = [key for key in _LANGUAGE_SIZES if key not in text]
    if missing:
        raise ValueError(f"config.json of model.hf_path={recipe.model.hf_path!r} lacks {', '.join(missing)}")
    heads, hidden = int(text["num_attention_heads"]), int(text["hidden_size"])
    kv_heads, ffn = int(text.get("num_key_value_heads") or heads), int(text["intermediate_size"])
    check_layout(
        tensor=recipe.parallel.tensor,
        pipeline=recipe.parallel.pipeline,
        first_stage_layers=recipe.parallel.first_stage_layers,
        heads=heads,
        kv_heads=kv_heads,
        hidden=hidden,
        ffn=ffn,
        layers=int(text["num_hidden_layers"]),
    )
    check_fp8_shapes(
        fp8=recipe.model.fp8,
        tensor=recipe.parallel.tensor,
        sequence=recipe.parallel.sequence,
        heads=heads,
        kv_heads=kv_heads,
        head_size=int(text.get("head_dim") or hidden // heads),
        hidden=hidden,
        ffn=ffn,
    )
    positions = int(text["max_position_embeddings"])
    longest = recipe.data.max_prompt_tokens + recipe.generation.max_response_tokens
    if longest > positions:
        raise ValueError(
            f"data.max_prompt_tokens={recipe.data.max_prompt_tokens} + generation.max_response_tokens="
            f"{recipe.generation.max_response_tokens} = {longest}, but the model has {positions} positions "
            "(max_position_embeddings); lower one of them"
        )


_LANGUAGE_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "max_position_embeddings",
)


def _check_fp8(recipe: RunRecipe) -> None:
    model = recipe.model
    if model.layers is Layers.te and model.precision is Precision.fp32:
        raise ValueError(
            "model.layers=te with model.precision=fp32: TransformerEngine's fused attention has no fp32; "
            "set model.precision=bf16 or model.layers=local"
        )
    if model.fp8 is not Fp8.none and model.layers is not Layers.te:
        raise ValueError(
            f"model.fp8={model.fp8.value} needs TransformerEngine's layers but model.layers={model.layers.value}; "
            "set model.layers=te, or model.fp8=none"
        )
    if model.fp8_weights and (model.fp8 is Fp8.none or Part.language in recipe.train.parts):
        raise ValueError(
            f"model.fp8_weights=true with model.fp8={model.fp8.value} and train.parts="
            f"{[part.value for part in recipe.train.parts]}: it keeps a frozen language model in 8 bits; set "
            "model.fp8, take language out of train.parts, or set model.fp8_weights=false"
        )
    if recipe.generation.cuda_graphs and model.fp8 is Fp8.blockwise:
        raise ValueError(
            "generation.cuda_graphs=true with model.fp8=blockwise: each rank needs blocks of 128 tokens, more than the "
            "64 requests that megatron-core's graphs are cut to; set model.fp8=tensorwise or "
            "generation.cuda_graphs=false"
        )


def _check_text(recipe: RunRecipe) -> None:
    for name in ("run.name", "run.output_dir"):
        if not _get(recipe, name).strip():
            raise ValueError(f"{name} is empty; give a value")
    if not recipe.generation.stop_tokens or not all(recipe.generation.stop_tokens):
        raise ValueError(
            f"generation.stop_tokens={recipe.generation.stop_tokens} must name at least one token, as text"
        )
    if recipe.logging.wandb is not WandbMode.disabled and not recipe.logging.wandb_project:
        raise ValueError("logging.wandb_project is empty but wandb is on; name a project or set logging.wandb=disabled")
    pattern = recipe.reward.claim_pattern
    if not pattern:
        return
    try:
        groups = re.compile(pattern).groupindex
    except re.error as error:
        raise ValueError(f"reward.claim_pattern={pattern!r} is not a regular expression: {error}") from error
    if missing := {"name", "value"} - set(groups):
        raise ValueError(
            f"reward.claim_pattern={pattern!r} has no group {' and '.join(sorted(missing))}; "
            r"it needs both, e.g. (?P<name>left|right) (?P<value>\d)"
        )


def _check_rewards(recipe: RunRecipe) -> None:
    reward, longest = recipe.reward, recipe.generation.max_response_tokens
    if reward.consistency_weight and not reward.claim_pattern:
        raise ValueError(
            f"reward.consistency_weight={reward.consistency_weight} with an empty reward.claim_pattern: no claim would "
            r"ever be found; give a pattern, e.g. (?P<name>left|right) (?P<value>\d), or set the weight to 0"
        )
    if reward.overlong_weight and reward.overlong_buffer_tokens > longest:
        raise ValueError(
            f"reward.overlong_buffer_tokens={reward.overlong_buffer_tokens} is more than "
            f"generation.max_response_tokens={longest}: even an empty response would be too long; lower it"
        )


def _check_parts(recipe: RunRecipe) -> None:
    parts = recipe.train.parts
    accepted = ", ".join(part.name for part in Part)
    if not parts:
        raise ValueError(f"train.parts is empty: nothing would be trained; accepted: one or more of {accepted}")
    if len(set(parts)) != len(parts):
        raise ValueError(
            f"train.parts={[part.name for part in parts]} names a part twice; accepted: each of {accepted} once"
        )


def _check_combinations(recipe: RunRecipe) -> None:
    train, parallel = recipe.train, recipe.parallel
    for name in ("train.adam_beta1", "train.adam_beta2", "preference.delta_momentum"):
        if _get(recipe, name) == 1:
            raise ValueError(f"{name}=1 never forgets the start; accepted: 0 to just below 1")
    if train.min_learning_rate > train.learning_rate:
        raise ValueError(
            f"train.min_learning_rate={train.min_learning_rate} is above train.learning_rate="
            f"{train.learning_rate}; lower it"
        )
    if train.warmup_steps > train.steps:
        raise ValueError(f"train.warmup_steps={train.warmup_steps} is more than train.steps={train.steps}; lower it")
    if parallel.sequence and parallel.tensor == 1:
        raise ValueError(
            "parallel.sequence=true splits activations over tensor-parallel ranks but parallel.tensor=1; "
            "set parallel.tensor to 2 or more, or parallel.sequence=false"
        )
    _check_fp8(recipe)
    if (train.packing is Packing.none) != (train.tokens_per_microbatch == 0):
        raise ValueError(
            f"train.packing={train.packing.value} with train.tokens_per_microbatch={train.tokens_per_microbatch}: "
            "packed rows need a number of tokens, padded ones have train.micro_batch_size; set both or neither"
        )
    check_validation(recipe)


def _get(recipe: RunRecipe, name: str) -> Any:
    section, key = name.split(".")
    return getattr(getattr(recipe, section), key)
