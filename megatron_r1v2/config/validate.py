"""Checks at the start of a command: files that must exist, libraries, devices, and sizes that must divide."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path

from megatron_r1v2.config.choices import Layers
from megatron_r1v2.config.layout import LanguageSizes, check_fp8_shapes, check_layout
from megatron_r1v2.config.recipes import EvaluateRecipe, PairsRecipe, Recipe
from megatron_r1v2.config.schema import RewardConfig

_FOLDERS = (
    "model.hf_path",
    "model.checkpoint",
    "data.train",
    "data.validation",
    "evaluation.data",
    "reward_model.checkpoint",
)


def check_start(recipe: Recipe) -> None:
    """Check what a command needs: its files, its libraries and devices, and a layout that fits the model's sizes.

    Raises:
        ValueError: a missing path, a setting that cannot be followed here, or sizes that do not divide.
    """
    at_endpoint = isinstance(recipe, EvaluateRecipe) and bool(recipe.evaluation.endpoint_url)
    for name in recipe.needed:
        if not _get(recipe, name) and not (at_endpoint and name.startswith("model.")):
            raise ValueError(
                f"{name} is not set; the {recipe.title()} stage needs it: give the path of an existing folder"
            )
    # A command may have the recipe of a training run, whose data need not be on this machine.
    for name in _FOLDERS if recipe.stage else ("model.hf_path", "model.checkpoint", "evaluation.data"):
        path = None if at_endpoint and name.startswith("model.") else _get(recipe, name)
        if path and not Path(path).is_dir():
            raise ValueError(f"{name}={path!r} is not a folder; give the path of an existing one")
    if at_endpoint:
        return
    reward = dict(recipe).get("reward")
    for place, function in enumerate(reward.functions if isinstance(reward, RewardConfig) else ()):
        if not Path(function.path).is_file():
            raise ValueError(
                f"reward.functions[{place}].path={function.path!r} is not a file; give the path of an existing one"
            )
    if isinstance(recipe, PairsRecipe) and Path(recipe.run.output_dir).exists():
        raise ValueError(
            f"run.output_dir={recipe.run.output_dir!r} exists already; choose another folder or delete it first"
        )
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


def read_hf_config(hf_path: Path | str) -> dict[str, object]:
    """Read config.json of an HF model.

    Args:
        hf_path: the folder, or the file itself.

    Raises:
        ValueError: the file is missing or is not JSON.
    """
    path = Path(hf_path) if Path(hf_path).is_file() else Path(hf_path) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"model.hf_path={str(hf_path)!r} has no config.json; give the folder of a whole model, "
            "as checkpoint_tools/reassemble.py writes it"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); copy the model again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not valid JSON of a model (a {type(config).__name__}); copy the model again")
    return config


def check_model_fits(recipe: Recipe, hf_config: Mapping[str, object]) -> None:
    """Check the layout and the lengths against the sizes of the language model.

    The vision tower pads its heads, so it fits any tensor-parallel size.

    Args:
        hf_config: the model's config.json, in either layout, or a language model's own.

    Raises:
        ValueError: a size that `parallel.tensor` or `parallel.pipeline` does not divide, or too many positions.
    """
    text = hf_config.get("text_config") or hf_config.get("llm_config") or hf_config
    given = {key: value for key, value in text.items() if value is not None} if isinstance(text, Mapping) else {}
    stated = {key: given[key] for key in (*_LANGUAGE_SIZES, *_DERIVED_SIZES) if key in given}
    # A size that is left out has its class's default, which only transformers knows, and one that is damaged is refused
    # by name where the model is read: it is checked as built.
    if not stated.keys() >= set(_LANGUAGE_SIZES) or any(type(size) is not int or size < 1 for size in stated.values()):
        return
    heads, hidden = stated["num_attention_heads"], stated["hidden_size"]
    sizes = LanguageSizes(
        heads=heads,
        kv_heads=stated.get("num_key_value_heads", heads),
        head_size=stated.get("head_dim", hidden // heads),
        hidden=hidden,
        ffn=stated["intermediate_size"],
        layers=stated["num_hidden_layers"],
    )
    parallel = recipe.parallel
    check_layout(
        sizes,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        first_stage_layers=parallel.first_stage_layers,
    )
    check_fp8_shapes(sizes, fp8=recipe.model.fp8, tensor=parallel.tensor, sequence=parallel.sequence)
    positions = stated["max_position_embeddings"]
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
_DERIVED_SIZES = ("num_key_value_heads", "head_dim")


def _get(recipe: Recipe, name: str) -> str:
    """Return a path in a recipe, "" where it has no such section."""
    section, key = name.split(".")
    return str(getattr(getattr(recipe, section, None), key, ""))
