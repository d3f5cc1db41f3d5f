"""A reward model on the process groups of the policy, and the choice between it and a served one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_r1v2.checkpoint.megatron.run_folder import RECIPE_FILE, load_state, resolve_checkpoint
from megatron_r1v2.config.choices import Part
from megatron_r1v2.config.load import load_recipe
from megatron_r1v2.config.recipes import GrpoRecipe, PairsRecipe, Recipe
from megatron_r1v2.data.tokenizer import ChatTokenizer
from megatron_r1v2.parallel import objects
from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.resilience.fingerprint import Fingerprint
from megatron_r1v2.rewards.model import RewardModel
from megatron_r1v2.rewards.served_model import ServedRewardModel
from megatron_r1v2.stages.loaded_model import LoadedModel, load_model
from megatron_r1v2.training.batches import response_sample
from megatron_r1v2.training.forward import Forward
from megatron_r1v2.training.microbatches import Microbatcher
from megatron_r1v2.training.score_positions import append_pad_token, last_scores
from megatron_r1v2.types import Prompt


def open_reward_model(loaded: LoadedModel, recipe: GrpoRecipe | PairsRecipe) -> RewardModel | None:
    """Open the model that the `reward_model` section names; None when it names none."""
    if recipe.reward_model.lies_beside_policy:
        return load_reward_model(loaded, recipe)
    return ServedRewardModel(recipe.reward_model, loaded.context) if recipe.reward_model.url else None


def describe_reward_model(recipe: Recipe) -> str:
    """Return the step and a digest of the weights in `reward_model.checkpoint`, which may name a run that goes on."""
    # The stage that trains one has no other beside it.
    if not isinstance(recipe, GrpoRecipe | PairsRecipe) or not recipe.reward_model.checkpoint:
        return ""
    state = load_state(resolve_checkpoint(recipe.reward_model.checkpoint))
    return f"step {state['step']}, {Fingerprint.of(**state.get('checksums', {})).digest[:12]}"


@dataclass
class LoadedRewardModel:
    """A `rewards.model.RewardModel` with weights of its own, in the policy's layout and without gradients."""

    forward: Forward
    microbatcher: Microbatcher
    tokenizer: ChatTokenizer
    end_id: int
    """The token at which the score is read; appended to every response, also to one that was cut."""
    context: ParallelContext

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        """Collective over the replica: score responses; see `RewardModel.score`.

        Returns:
            Raw scores, on every rank of the replica.
        """
        # Features of other prompts are not asked for again, and the cache is bounded.
        if self.forward.features is not None:
            self.forward.features.clear()
        samples = {}
        for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            response = (*self.tokenizer.encode_text(text), self.end_id)
            samples[str(index)] = append_pad_token(response_sample(prompt, response), self.tokenizer.pad_id)
        microbatches = self.microbatcher.split(samples, {prompt.key: prompt for prompt in prompts})
        batches = [part.batch for part in microbatches]
        found: dict[str, float] = {}
        for part, values_BS in zip(microbatches, self.forward.compute_values(batches), strict=True):
            found.update(zip(part.names, last_scores(values_BS, part.batch).tolist(), strict=True))
        scores = [found[str(index)] for index in range(len(texts))]
        if self.context.tensor_size * self.context.pipeline_size == 1:
            return scores
        # Tensor-parallel ranks may differ in the last bit, and rewards must not.
        return objects.broadcast_from_first(scores, self.context.groups.mp)


def load_reward_model(policy: LoadedModel, recipe: GrpoRecipe | PairsRecipe) -> LoadedRewardModel:
    """Collective over the world: load `reward_model.checkpoint` in the policy's layout.

    Args:
        policy: whose prompts and responses it will score, so tokens and tiles must be the same.

    Raises:
        ValueError: the checkpoint has no score head, or its model reads tokens or images in another way.
    """
    loaded = load_model(_with_reward_model(recipe), policy.context, score_head=True)
    if Part.score not in loaded.changed_parts:
        raise ValueError(
            f"reward_model.checkpoint={recipe.reward_model.checkpoint!r} holds "
            f"{[part.value for part in loaded.changed_parts]} and no score head; give a checkpoint of the reward_model "
            "stage"
        )
    _check_same_inputs(policy, loaded)
    loaded.model.eval()
    return LoadedRewardModel(
        forward=Forward(
            model=loaded.model,
            context=policy.context,
            features=loaded.feature_cache(),
            packing=recipe.train.packing,
            length_multiple=loaded.length_multiple,
        ),
        microbatcher=loaded.microbatcher(recipe.train),
        tokenizer=loaded.tokenizer,
        end_id=loaded.tokenizer.token_id(loaded.tokenizer.turn_end(recipe.generation.stop_tokens)),
        context=policy.context,
    )


def _with_reward_model(recipe: GrpoRecipe | PairsRecipe) -> Recipe:
    """Return the recipe with the reward model's weights in place of the policy's, on their own base."""
    checkpoint = resolve_checkpoint(recipe.reward_model.checkpoint)
    trained = load_recipe(checkpoint / RECIPE_FILE, saved=True)
    return recipe.changed(model=recipe.model.changed(hf_path=trained.model.hf_path, checkpoint=str(checkpoint)))


def _check_same_inputs(policy: LoadedModel, loaded: LoadedModel) -> None:
    ours, theirs = policy.architecture, loaded.architecture
    different = [
        name
        for name, is_same in (
            ("tokenizer or chat template", policy.tokenizer.is_same_as(loaded.tokenizer)),
            ("image size", ours.vision.image_size == theirs.vision.image_size),
            ("image tokens a tile", ours.tokens_per_tile == theirs.tokens_per_tile),
        )
        if not is_same
    ]
    if different:
        raise ValueError(
            f"the base of reward_model.checkpoint, {loaded.recipe.model.hf_path!r}, and model.hf_path="
            f"{policy.recipe.model.hf_path!r} differ in {', '.join(different)}: prompts of one are not prompts of the "
            "other; serve the reward model by itself and set reward_model.url"
        )
