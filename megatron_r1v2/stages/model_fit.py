"""The last checks before a command starts: the model that its recipe names, and the sizes of that model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_r1v2.config.layout import check_fp8_shapes, pipeline_mistakes, tensor_mistakes
from megatron_r1v2.config.recipes import Recipe
from megatron_r1v2.config.validate import model_is_served, read_hf_config, start_mistakes
from megatron_r1v2.models.architecture import LanguageArchitecture


def all_mistakes(recipe: Recipe) -> Iterator[str]:
    """Yield a sentence for each thing that keeps a command from starting: files, devices, the model and its sizes."""
    yield from start_mistakes(recipe)
    folder = recipe.model.hf_path
    if not folder or not Path(folder).is_dir() or model_is_served(recipe):
        return
    try:
        read_hf_config(folder)
        # Imported here: torch and transformers take seconds, which a recipe without a model need not wait for.
        from megatron_r1v2.checkpoint.hf.config import read_hf_architecture

        architecture, _ = read_hf_architecture(folder)
    except ValueError as error:
        yield str(error)
    else:
        yield from fit_mistakes(recipe, architecture.language)


def fit_mistakes(recipe: Recipe, language: LanguageArchitecture) -> Iterator[str]:
    """Yield a sentence for each size of a language model that the layout does not divide or the lengths exceed.

    The vision tower pads its heads, so it fits any tensor-parallel size.
    """
    parallel = recipe.parallel
    undivided = list(tensor_mistakes(language.sizes, parallel.tensor))
    yield from undivided
    yield from pipeline_mistakes(language.sizes, parallel.pipeline, parallel.first_stage_layers)
    if not undivided:
        try:
            check_fp8_shapes(language.sizes, fp8=recipe.model.fp8, tensor=parallel.tensor, sequence=parallel.sequence)
        except ValueError as error:
            yield str(error)
    prompt, response = recipe.data.max_prompt_tokens, recipe.generation.max_response_tokens
    if "max_response_tokens" in recipe.settings()["generation"] and prompt + response > language.max_positions:
        yield (
            f"data.max_prompt_tokens={prompt} + generation.max_response_tokens={response} = {prompt + response}, but "
            f"the model has {language.max_positions} positions (max_position_embeddings); lower one of them"
        )
