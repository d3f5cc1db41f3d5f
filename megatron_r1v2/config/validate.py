"""Checks at the start of a command: files that must exist, libraries and devices."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path

from megatron_r1v2.config.choices import Layers
from megatron_r1v2.config.recipes import EvaluateRecipe, PairsRecipe, Recipe
from megatron_r1v2.config.schema import DataConfig, RewardConfig
from megatron_r1v2.config.yaml_files import read_yaml_mapping

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# A Path has one slash of the two.
_HUB_ADDRESS = re.compile(r"^https?:/{1,2}(www\.)?(huggingface\.co|hf\.co)/")
_FOLDERS = (
    "model.hf_path",
    "model.checkpoint",
    "data.train",
    "data.validation",
    "evaluation.data",
    "reward_model.checkpoint",
)


def start_mistakes(recipe: Recipe) -> Iterator[str]:
    """Yield a sentence for each file, library and device that a command needs and that is not there."""
    read = recipe.settings()
    for name in _FOLDERS:
        section, key = name.split(".")
        # A server has weights of its own.
        if key not in read.get(section, ()) or (section == "model" and model_is_served(recipe)):
            continue
        value = getattr(getattr(recipe, section), key)
        if name == "data.train" and not isinstance(value, str):
            yield from _source_mistakes(recipe.data)
            continue
        path = str(value)
        if path and not Path(path).is_dir():
            hint = download_hint(path) if name == "model.hf_path" else ""
            yield f"{name}={path!r} is not a folder; give the path of an existing one{hint}"
        if name in recipe.needed and not path:
            hint = _base_hint(recipe.model.checkpoint) if name == "model.hf_path" else ""
            yield f"{name} is not set; the {recipe.title()} stage needs it: give the path of an existing folder{hint}"
    if model_is_served(recipe):
        return
    reward = dict(recipe).get("reward")
    for place, function in enumerate(reward.functions if isinstance(reward, RewardConfig) else ()):
        if not Path(function.path).is_file():
            yield f"reward.functions[{place}].path={function.path!r} is not a file; give the path of an existing one"
    if isinstance(recipe, PairsRecipe) and Path(recipe.run.output_dir).exists():
        yield f"run.output_dir={recipe.run.output_dir!r} exists already; choose another folder or delete it first"
    if recipe.model.layers is Layers.te and importlib.util.find_spec("transformer_engine") is None:
        yield (
            "model.layers=te needs TransformerEngine, which is not installed; "
            "set model.layers=local, or run in a container that has it (see Dockerfile)"
        )
    if recipe.generation.cuda_graphs is True and not _has_cuda():
        yield "generation.cuda_graphs=true needs a CUDA device and there is none; set generation.cuda_graphs=false"


def base_of_checkpoint(checkpoint: str) -> str:
    """Return the `model.hf_path` of a checkpoint's run; empty: there is none, or its recipe is not there."""
    path = Path(checkpoint)
    # A run, its checkpoints/, or one of these: no other folder above is that of the run.
    runs = [folder.parent for folder in (path, path.parent) if folder.name == "checkpoints"]
    for folder in (path, *runs) if checkpoint else ():
        try:
            model = read_yaml_mapping(folder / "recipe.yaml", what="recipe").get("model")
        except (OSError, ValueError):  # without it the folder is asked for
            continue
        if isinstance(model, dict) and model.get("hf_path"):
            return str(model["hf_path"])
    return ""


def _base_hint(checkpoint: str) -> str:
    base = base_of_checkpoint(checkpoint)
    return f"; the run of model.checkpoint={checkpoint!r} has model.hf_path={base}" if base else ""


def _source_mistakes(data: DataConfig) -> Iterator[str]:
    """Yield a sentence for each entry of a mixture that is no folder, and for a mixture of nothing."""
    if not data.sources:
        yield "data.train is an empty list: give the path of an existing folder, or a list of {path, weight}"
    for place, source in enumerate(data.sources):
        if not Path(source.path).is_dir():
            yield f"data.train[{place}].path={source.path!r} is not a folder; give the path of an existing one"
        if Path(source.path).resolve() in [Path(other.path).resolve() for other in data.sources[:place]]:
            yield f"data.train[{place}].path={source.path!r} is in the list twice; give it once, with a larger weight"


def model_is_served(recipe: Recipe) -> bool:
    """Return whether the model is behind an endpoint, and not on this machine."""
    return isinstance(recipe, EvaluateRecipe) and bool(recipe.evaluation.endpoint_url)


def _has_cuda() -> bool:
    from torch import cuda  # takes seconds, and the planner reads recipes without it

    return cuda.is_available()


_OWNERS = {"Skywork-": "Skywork", "InternVL": "OpenGVLab", "InternViT": "OpenGVLab", "QwQ": "Qwen", "Qwen": "Qwen"}
"""Of the models that the recipes begin with, by how their names begin."""
_LOCAL_FOLDERS = ("checkpoints", "models")
"""Folders in which our own recipes have models: no owner on the hub is meant."""


def download_hint(path: Path | str) -> str:
    """Return the command for a missing folder that looks like a model's name on the hub; empty: it does not."""
    name = _HUB_ADDRESS.sub("", str(path))
    if not _HUB_NAME.fullmatch(name) or Path(path).exists():
        return ""
    owner, local = name.split("/")
    if owner in _LOCAL_FOLDERS:
        owner = next((owner for start, owner in _OWNERS.items() if local.startswith(start)), "")
        command = f"`hf download {owner or 'OWNER'}/{local} --local-dir {path}`"
        parts = "" if owner else ", to make it from its parts `python -m checkpoint_tools.reassemble`"
        return f"; to download it from the Hugging Face hub run {command}{parts}"
    return (
        "; nothing is downloaded here: if it is a model on the Hugging Face hub, run "
        f"`hf download {name} --local-dir {local}` and give {local}"
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
    # The parser calls itself once a level of nesting.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); copy the model again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not valid JSON of a model (a {type(config).__name__}); copy the model again")
    return config
