"""A model with its weights and tokenizer, and the engine, readers and evaluator that are made of it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_r1v2.checkpoint.hf.config import read_hf_architecture
from megatron_r1v2.checkpoint.hf.weights import check_hf_tensors, load_hf_weights
from megatron_r1v2.checkpoint.manifest import Manifest
from megatron_r1v2.checkpoint.megatron.run_folder import load_state, resolve_checkpoint
from megatron_r1v2.config.choices import Part, Recompute, StageName
from megatron_r1v2.config.recipes import Recipe
from megatron_r1v2.config.schema import EvaluationConfig, RewardConfig, TrainConfig
from megatron_r1v2.data.mixture import MixtureStream, open_train, read_train, source_names
from megatron_r1v2.data.prompts import PromptBuilder
from megatron_r1v2.data.stream import PromptStream, read_shards
from megatron_r1v2.data.survey import GIVEN_FIELDS, DataSurvey, GivenResponses, survey_data
from megatron_r1v2.data.tokenizer import ChatTokenizer
from megatron_r1v2.evaluation.evaluator import Evaluator
from megatron_r1v2.generation.engine import RolloutEngine
from megatron_r1v2.generation.features import FeatureCache
from megatron_r1v2.models.architecture import R1V2Architecture
from megatron_r1v2.models.r1v2 import R1V2Model, build_r1v2, freeze_all_but
from megatron_r1v2.models.settings import ComputeSettings
from megatron_r1v2.parallel import groups, objects
from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.rewards import verifiers
from megatron_r1v2.rewards.functions import check_functions
from megatron_r1v2.rewards.verifiers import VerifierPool
from megatron_r1v2.training.batches import RowFormat, length_multiple
from megatron_r1v2.training.microbatches import Microbatcher
from megatron_r1v2.training.store import load_weights
from megatron_r1v2.types import Prompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model with its weights, tokenizer and sizes."""

    model: R1V2Model
    architecture: R1V2Architecture
    tokenizer: ChatTokenizer
    context: ParallelContext
    recipe: Recipe
    changed_parts: list[Part]
    """Parts whose weights are not those in `model.hf_path`."""
    version: int
    """Optimizer steps behind `model.checkpoint`."""
    stop_ids: tuple[int, ...]
    """The tokens that end a response."""
    random_parts: frozenset[Part] = frozenset()
    """Parts whose weights were drawn and never trained."""

    @property
    def sampled_vocab_size(self) -> int:
        """Return the ids that can be drawn: embeddings beyond the tokenizer were never trained."""
        return min(self.tokenizer.vocab_size, self.architecture.language.vocab_size)

    @property
    def length_multiple(self) -> int:
        """Return the number that the lengths of training rows must be multiples of."""
        return length_multiple(self.recipe.model.fp8, self.recipe.parallel)

    def microbatcher(self, settings: TrainConfig) -> Microbatcher:
        """Return a maker of microbatches for this model and layout."""
        rows = RowFormat(
            pad_id=self.tokenizer.pad_id,
            image_token_id=self.architecture.image_token_id,
            tensor_size=self.context.tensor_size,
            device=self.context.device,
            length_multiple=self.length_multiple,
        )
        return Microbatcher(settings, rows)

    def engine(self, *, prefix_tokens: int = 0, max_requests: int | None = None) -> RolloutEngine:
        """Return the rollout engine on the model's own weights.

        Args:
            prefix_tokens: the longest beginning of a response that a prompt may end with.
            max_requests: fewer responses in flight than the recipe's, and so a smaller cache; such a phase is too
                short for CUDA graphs.
        """
        generation = self.recipe.generation
        if max_requests is not None:
            generation = generation.changed(max_requests=min(max_requests, generation.max_requests), cuda_graphs=False)
        engine = RolloutEngine(
            self.model,
            context=self.context,
            settings=generation,
            stop_ids=frozenset(self.stop_ids),
            vocab_size=self.sampled_vocab_size,
            max_prompt_tokens=self.recipe.data.max_prompt_tokens + prefix_tokens,
            seed=self.recipe.run.seed,
        )
        # On a CPU nobody expects graphs.
        if generation.cuda_graphs and engine.without_graphs and self.context.device.type == "cuda":
            logger.warning("generation.cuda_graphs=auto: decode goes without graphs, as %s", engine.without_graphs)
        return engine

    def feature_cache(self) -> FeatureCache:
        """Return an empty cache of image features."""
        return FeatureCache(int(self.recipe.generation.feature_cache_gib * 2**30))

    def evaluator(
        self, engine: RolloutEngine, pool: VerifierPool | None, *, settings: EvaluationConfig, reward: RewardConfig
    ) -> Evaluator:
        """Return an evaluator of this model."""
        return Evaluator(
            engine=engine,
            features=self.feature_cache(),
            settings=settings,
            reward=reward,
            pool=pool,
            decode=self.tokenizer.decode,
            context=self.context,
            max_response_tokens=self.recipe.generation.max_response_tokens,
        )

    def verifiers(self) -> AbstractContextManager[VerifierPool | None]:
        """Return a context manager that gives a VerifierPool on the leader of each replica, None elsewhere."""
        if not self.context.is_replica_leader:
            return nullcontext(None)
        return VerifierPool(verifiers.worker_count(), verifiers.TIMEOUT_SECONDS)

    @property
    def prompt_builder(self) -> PromptBuilder:
        """Return a builder of prompts for this model."""
        return PromptBuilder(
            settings=self.recipe.data,
            tokenizer=self.tokenizer,
            tile_size=self.architecture.vision.image_size,
            tokens_per_tile=self.architecture.tokens_per_tile,
        )

    def read_prompts(self, folder: str, count: int = 0) -> Iterator[Prompt]:
        """Read a data set in its order, a prompt at a time.

        Args:
            count: how many prompts, from the start; 0: all.
        """
        fraction = self.recipe.data.max_corrupt_fraction
        return read_shards(folder, self.prompt_builder.build, max_corrupt_fraction=fraction, count=count)

    @property
    def given_responses(self) -> GivenResponses | None:
        """Return the responses that the stage reads from its rows, None where it samples its own."""
        stage = self.recipe.stage
        if stage not in GIVEN_FIELDS:
            return None
        end_token = self.tokenizer.turn_end(self.recipe.generation.stop_tokens)
        return GivenResponses(GIVEN_FIELDS[stage], end_token, self.architecture.language.max_positions)

    def print_survey(self, folder: str) -> DataSurvey:
        """Collective over the world: survey a data set where there is no recorder; the first rank prints.

        Raises:
            ValueError: a prompt cannot be made to fit, and data.too_long does not skip it.
        """
        survey = self.survey_data(folder)
        for line in survey.sentences(folder, self.recipe.data):
            if self.context.is_main:
                print(line, file=sys.stderr)
        return survey

    def survey_data(self, folder: str) -> DataSurvey:
        """Collective over the world: look at a data set before its first use, each rank at a part of the shards."""
        part, parts = dist.get_rank(), dist.get_world_size()
        given = self.given_responses
        mine = survey_data(folder, self.prompt_builder, self.recipe.data, given=given, part=part, parts=parts)
        return sum(objects.all_gather(mine), DataSurvey())

    def survey_train(self) -> DataSurvey:
        """Collective over the world: look at all data sets of `data.train`."""
        sources = self.recipe.data.sources
        found = DataSurvey()
        for source, name in zip(sources, source_names(sources), strict=True):
            survey = self.survey_data(source.path)
            found += survey.with_prefix(f"{name}:") if len(sources) > 1 else survey
        return found

    def read_train(self) -> Iterator[Prompt]:
        """Read `data.train` once in its order, a prompt at a time."""
        data = self.recipe.data
        return read_train(data, self.prompt_builder.build, max_corrupt_fraction=data.max_corrupt_fraction)

    def training_stream(self) -> PromptStream | MixtureStream:
        """Return the endless stream of `data.train`."""
        return open_train(self.recipe.data, self.prompt_builder, seed=self.recipe.run.seed)


@contextmanager
def open_model(
    recipe: Recipe, *, score_head: bool = False, recompute: Recompute = Recompute.none
) -> Iterator[LoadedModel]:
    """Collective over the world: start the process groups and load a model; everything ends with the block.

    Raises:
        ValueError: among others, a function of `reward.functions` that cannot be called.
    """
    # Before the weights are read, which takes minutes.
    if isinstance(reward := dict(recipe).get("reward"), RewardConfig):
        check_functions(reward.functions)
    if recipe.run.deterministic:
        groups.use_deterministic_algorithms()
    context = groups.initialize(recipe.parallel, seed=recipe.run.seed)
    try:
        loaded = load_model(recipe, context, score_head=score_head, recompute=recompute)
        if context.is_main:
            print(loaded.tokenizer.describe_ends(loaded.stop_ids), flush=True)
        yield loaded
    finally:
        groups.shut_down()


def load_model(
    recipe: Recipe, context: ParallelContext, *, score_head: bool = False, recompute: Recompute = Recompute.none
) -> LoadedModel:
    """Collective over the world: build the model, fill it from `model.hf_path`, then from `model.checkpoint`.

    All of it is frozen: a stage that trains calls `freeze_all_but` with its parts.

    Args:
        score_head: whether it is a reward model, whose head is drawn from `run.seed` where the checkpoint has none.
    """
    hf_path = Path(recipe.model.hf_path)
    random_parts = _check_trained(recipe)
    architecture, layout = read_hf_architecture(hf_path)
    tokenizer = ChatTokenizer(hf_path)
    # The engine and the model look for images by this id: a mismatch would leave every prompt without its image.
    if tokenizer.image_token_id != architecture.image_token_id:
        raise ValueError(
            f"{hf_path}: <IMG_CONTEXT> is token {tokenizer.image_token_id} of the tokenizer but config.json says "
            f"image_token_id={architecture.image_token_id}; make the folder again with checkpoint_tools.reassemble"
        )
    stop_ids = tokenizer.stop_ids(recipe.generation.stop_tokens)
    # A config.json that lost its sizes means a model of billions of parameters: transformers' defaults.
    check_hf_tensors(hf_path, architecture, layout)
    settings = ComputeSettings.from_recipe(recipe.model, recipe.parallel, recompute, device=context.device)
    score_seed = recipe.run.seed if score_head else None
    model = build_r1v2(architecture, settings, groups=context.groups, device=context.device, score_seed=score_seed)
    # For a weight that may train, megatron-core gathers the sequence in a buffer that it keeps, also without a graph.
    freeze_all_but(model, ())
    # model.precision decides the dtype, whatever the folder's is.
    load_hf_weights(model, hf_path, context, layout=layout, cast=True)
    # A checkpoint holds only the parts that some stage has trained: the others come from the HF folder.
    changed, version = [], 0
    if recipe.model.checkpoint:
        checkpoint = resolve_checkpoint(recipe.model.checkpoint)
        changed, version = load_weights(model, checkpoint), load_state(checkpoint)["version"]
    return LoadedModel(
        model=model,
        architecture=architecture,
        tokenizer=tokenizer,
        context=context,
        recipe=recipe,
        changed_parts=changed,
        version=version,
        stop_ids=tuple(stop_ids),
        random_parts=random_parts,
    )


def _check_trained(recipe: Recipe) -> frozenset[Part]:
    """Refuse a model with a part that nobody has trained; align trains it, and what trains nothing warns.

    Returns:
        The parts that nobody has trained.
    """
    parts = _random_parts(Path(recipe.model.hf_path))
    if recipe.model.checkpoint:
        checkpoint = resolve_checkpoint(recipe.model.checkpoint)
        parts = parts - set(load_state(checkpoint)["parts"]) | _random_parts(checkpoint)
    found = frozenset(map(Part, parts))
    if recipe.model.allow_random_parts or recipe.stage is StageName.align or not parts:
        return found
    sentence = (
        f"the {', '.join(sorted(parts))} of model.hf_path={recipe.model.hf_path!r} is random "
        "(checkpoint_tools.reassemble without --adapter)"
    )
    if recipe.stage is None:
        logger.warning("%s: the responses say nothing of the images", sentence)
        return found
    raise ValueError(
        f"{sentence} and {recipe.title()} would train on noise: set model.checkpoint to a run of the align stage, give "
        "reassemble an adapter, or set model.allow_random_parts=true"
    )


def _random_parts(folder: Path) -> frozenset[str]:
    manifest = Manifest.of(folder)
    return manifest.random_parts if manifest is not None else frozenset()
