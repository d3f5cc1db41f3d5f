"""Everything a stage works with, built from the settings: process groups, model, optimizer, data, files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_r1v2.checkpoint.hf.weights import load_hf_weights
from megatron_r1v2.config.load import save_recipe
from megatron_r1v2.config.schema import Packing, Part, RunRecipe
from megatron_r1v2.data.stream import PromptStream, each_prompt, read_prompts
from megatron_r1v2.data.tokenizer import ChatTokenizer
from megatron_r1v2.evaluation.evaluator import Evaluator
from megatron_r1v2.generation.engine import RolloutEngine
from megatron_r1v2.generation.features import FeatureCache
from megatron_r1v2.models.architecture import R1V2Architecture, read_architecture
from megatron_r1v2.models.r1v2 import R1V2Model, build_r1v2, freeze_all_but
from megatron_r1v2.models.settings import ComputeSettings
from megatron_r1v2.monitoring.recorder import Recorder
from megatron_r1v2.parallel import groups
from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.resilience.rank_watch import RankWatch
from megatron_r1v2.resilience.rollout_cache import KeptRollouts
from megatron_r1v2.resilience.signals import StepAbandoned, StopRequest
from megatron_r1v2.resilience.skipped_updates import FOLDER as SKIPPED_FOLDER
from megatron_r1v2.resilience.skipped_updates import SkippedUpdates
from megatron_r1v2.rewards.verifiers import VerifierPool
from megatron_r1v2.stages.preemption import PreemptionHandler
from megatron_r1v2.stages.resume import resume
from megatron_r1v2.training.batches import length_multiple
from megatron_r1v2.training.microbatches import Microbatcher
from megatron_r1v2.training.optimizer import build_optimizer, release_grad_hooks, wrap_with_ddp
from megatron_r1v2.training.policy import Policy
from megatron_r1v2.training.reference import ReferenceWeights
from megatron_r1v2.training.store import (
    RECIPE_FILE,
    CheckpointStore,
    load_state,
    load_weights,
    resolve_checkpoint,
)
from megatron_r1v2.training.weight_verification import WeightVerifier
from megatron_r1v2.types import Prompt


@dataclass
class LoadedModel:
    """A model with its weights, tokenizer and sizes."""

    model: R1V2Model
    architecture: R1V2Architecture
    tokenizer: ChatTokenizer
    context: ParallelContext
    recipe: RunRecipe
    changed_parts: list[Part]
    """Parts whose weights are not those in `model.hf_path`."""
    version: int
    """Optimizer steps behind `model.checkpoint`."""

    @property
    def sampled_vocab_size(self) -> int:
        """Return the ids that can be drawn: embeddings beyond the tokenizer were never trained."""
        return min(self.tokenizer.vocab_size, self.architecture.language.vocab_size)

    def engine(self, *, prefix_tokens: int = 0) -> RolloutEngine:
        """Return the rollout engine on the model's own weights.

        Args:
            prefix_tokens: the longest beginning of a response that a prompt may end with.
        """
        generation = self.recipe.generation
        return RolloutEngine(
            self.model,
            context=self.context,
            settings=generation,
            stop_ids=frozenset(self.tokenizer.stop_ids(generation.stop_tokens)),
            vocab_size=self.sampled_vocab_size,
            max_prompt_tokens=self.recipe.data.max_prompt_tokens + prefix_tokens,
            seed=self.recipe.run.seed,
        )

    def feature_cache(self) -> FeatureCache:
        """Return an empty cache of image features."""
        return FeatureCache(int(self.recipe.generation.feature_cache_gib * 2**30))

    def evaluator(self, engine: RolloutEngine, pool: VerifierPool | None) -> Evaluator:
        """Return what evaluates this model."""
        return Evaluator(
            engine=engine,
            features=self.feature_cache(),
            settings=self.recipe.evaluation,
            reward=self.recipe.reward,
            pool=pool,
            decode=self.tokenizer.decode,
            context=self.context,
            max_response_tokens=self.recipe.generation.max_response_tokens,
        )

    def verifiers(self) -> Any:
        """Return a context manager that gives a VerifierPool on the leader of each replica, None elsewhere."""
        if not self.context.is_replica_leader:
            return nullcontext(None)
        reward = self.recipe.reward
        return VerifierPool(reward.verifier_workers, reward.verifier_timeout_seconds)

    def read_prompts(self, folder: str, count: int = 0) -> list[Prompt]:
        """Read a data set in its order."""
        return read_prompts(folder, **self._reading, count=count)

    def each_prompt(self, folder: str) -> Iterator[Prompt]:
        """Read a data set in its order, a prompt at a time."""
        return each_prompt(folder, **self._reading)

    @property
    def _reading(self) -> dict[str, Any]:
        return {
            "settings": self.recipe.data,
            "tokenizer": self.tokenizer,
            "tile_size": self.architecture.vision.image_size,
            "tokens_per_tile": self.architecture.tokens_per_tile,
        }


@dataclass
class Session(LoadedModel):
    """A running stage."""

    policy: Policy
    stream: PromptStream
    checkpoints: CheckpointStore
    recorder: Recorder
    reference: ReferenceWeights | None
    preemption: PreemptionHandler
    verifier: WeightVerifier
    step: int = 0
    """Steps done."""
    loaded_state: Mapping[str, Any] = field(default_factory=dict)
    """What the checkpoint held that the stage itself must restore."""
    loaded_replay: Sequence[Mapping[str, Any]] = ()

    @property
    def parts(self) -> list[Part]:
        """Return what trains."""
        return self.recipe.train.parts

    @property
    def microbatcher(self) -> Microbatcher:
        """Return what makes microbatches for this model and layout."""
        return Microbatcher(
            settings=self.recipe.train,
            pad_id=self.tokenizer.pad_id,
            image_token_id=self.architecture.image_token_id,
            tensor_size=self.context.tensor_size,
            length_multiple=self.policy.length_multiple,
            device=self.context.device,
        )

    @property
    def trains_text(self) -> bool:
        """Return whether a text-only prompt has a gradient: the language model sees it, and a reward model's head."""
        return Part.language in self.parts or Part.score in self.parts

    def trains(self, prompt: Prompt) -> bool:
        """Return whether a prompt has a gradient."""
        return self.trains_text or prompt.modality == "image"

    @property
    def is_finished(self) -> bool:
        """Return whether nothing is left to do, also when a resumed stage had stopped early at its goal."""
        return self.step >= self.recipe.train.steps or bool(self.loaded_state.get("finished", False))

    def sync_stop_signal(self) -> bool:
        """Collective over the world: agree on whether the run was asked to save and end before it is finished."""
        return self.preemption.sync_stop_signal(self.step)

    def end_step(self) -> None:
        """Write the numbers of the step, then publish finished checkpoints."""
        self.recorder.note({"data/corrupt_samples": self.stream.corrupt, "data/samples_read": self.stream.samples_read})
        self.preemption.check_lead()
        self.recorder.end_step(self.step)
        # After the numbers: a run killed between the two does the step again, rather than lack its line for ever.
        self.preemption.publish(blocking=False)

    def poll_between_phases(self) -> None:
        """Collective over the world: publish what has been written, and give the step up when SIGTERM has come."""
        self.preemption.poll_between_phases()

    def save(self, state: Mapping[str, Any], replay: Mapping[str, Any]) -> None:
        """Write a checkpoint.

        Args:
            state: of the stage, the same on every rank.
            replay: what this data-parallel rank holds of the buffer.
        """
        own = {*self.parts, *self.changed_parts}
        self.checkpoints.save(
            self.step,
            self.policy.model,
            self.policy.optimizer,
            parts=own,
            trained=self.parts,
            state={
                "step": self.step,
                "version": self.policy.version,
                "scheduler": self.policy.scheduler.state_dict(),
                "stream": self.stream.state_dict(),
                **self.verifier.describe_weights(own),
                "skipped_in_a_row": self.policy.skipped.in_a_row,
                **state,
            },
            replay=replay,
            recipe=self.recipe,
        )

    def should_save(self, *, last: bool) -> bool:
        """Return whether the step just done is one to save."""
        every = self.recipe.checkpoint.every_steps
        return last or (every > 0 and self.step % every == 0) or self.checkpoints.is_best(self.step)


@contextmanager
def open_model(recipe: RunRecipe, *, score_head: bool = False) -> Iterator[LoadedModel]:
    """Start the process groups and load a model; everything ends with the block.

    Args:
        recipe: the settings.
        score_head: a reward model.
    """
    context = groups.initialize(recipe.parallel, seed=recipe.run.seed)
    try:
        yield load_model(recipe, context, score_head=score_head)
    finally:
        groups.shut_down()


def load_model(recipe: RunRecipe, context: ParallelContext, *, score_head: bool = False) -> LoadedModel:
    """Build the model and fill it from `model.hf_path`, then with what `model.checkpoint` holds.

    Args:
        recipe: the settings.
        context: process groups.
        score_head: a reward model, whose head is drawn from `run.seed` where the checkpoint has none.
    """
    hf_path = Path(recipe.model.hf_path)
    architecture = read_architecture(hf_path)
    tokenizer = ChatTokenizer(hf_path)
    if tokenizer.image_token_id != architecture.image_token_id:
        raise ValueError(
            f"{hf_path}: <IMG_CONTEXT> is token {tokenizer.image_token_id} of the tokenizer but config.json says "
            f"image_token_id={architecture.image_token_id}; make the folder again with checkpoint_tools.reassemble"
        )
    settings = ComputeSettings.from_recipe(recipe.model, recipe.parallel, recipe.train.recompute)
    score_seed = recipe.run.seed if score_head else None
    model = build_r1v2(architecture, settings, groups=context.groups, device=context.device, score_seed=score_seed)
    load_hf_weights(model, hf_path, context, cast=True)
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
    )


@contextmanager
def open_session(recipe: RunRecipe, *, stage: str, shown: Sequence[str]) -> Iterator[Session]:
    """Start a stage, resumed from its newest checkpoint when there is one; everything ends with the block.

    Args:
        recipe: the settings.
        stage: for the progress display.
        shown: metrics for the progress display.
    """
    run_dir = Path(recipe.run.output_dir)
    with open_model(recipe, score_head=stage == "reward_model") as loaded:
        model, context = loaded.model, loaded.context
        freeze_all_but(model, recipe.train.parts)
        reference = ReferenceWeights(model) if recipe.algorithm.kl_coefficient > 0 else None
        policy = _build_policy(loaded, run_dir)
        stream = PromptStream(recipe.data.train, seed=recipe.run.seed, **loaded._reading)
        checkpoints = CheckpointStore(
            run_dir / "checkpoints",
            keep_last=recipe.checkpoint.keep_last,
            asynchronous=recipe.checkpoint.asynchronous,
            context=context,
        )
        newest = checkpoints.agree_on_newest_undamaged()
        if newest is not None and not recipe.checkpoint.resume:
            raise ValueError(
                f"checkpoint.resume=false but there is {newest}, which a new run would replace; set run.output_dir to "
                "a new folder, delete this one, or set checkpoint.resume=true to go on from it"
            )
        state, replay = resume(newest, policy, stream, checkpoints, recipe)
        with (
            ExitStack() as at_the_end,
            StopRequest(context.device, grace_seconds=recipe.checkpoint.grace_seconds) as stop_request,
            Recorder(
                run_dir,
                name=recipe.run.name,
                stage=stage,
                total_steps=recipe.train.steps,
                first_step=state.get("step", 0),
                settings=recipe.logging,
                is_main=context.is_main,
                shown=shown,
            ) as recorder,
            RankWatch(recorder.where, limit_seconds=60 * recipe.parallel.timeout_minutes) as watch,
        ):
            at_the_end.callback(release_grad_hooks, model)
            if newest is not None:
                recorder.say(f"resuming from {newest}, step {state['step']} of {recipe.train.steps}")
            if context.is_main:
                save_recipe(recipe, run_dir / RECIPE_FILE)
            session = Session(
                **vars(loaded),
                policy=policy,
                stream=stream,
                checkpoints=checkpoints,
                recorder=recorder,
                reference=reference,
                preemption=PreemptionHandler(
                    stop_request,
                    KeptRollouts(run_dir, context, enabled=recipe.checkpoint.keep_rollouts),
                    checkpoints,
                    settings=recipe.checkpoint,
                    recorder=recorder,
                    watch=watch,
                    context=context,
                ),
                verifier=WeightVerifier(model, recipe.train.parts, context),
                step=state.get("step", 0),
                loaded_state=state,
                loaded_replay=replay,
            )
            session.verifier.verify_weights(state.get("checksums", {}), newest)
            try:
                yield session
            except StepAbandoned:
                session.preemption.log_step_abandoned(session.step)
            session.preemption.publish(blocking=True)


def _build_policy(loaded: LoadedModel, run_dir: Path) -> Policy:
    """Give a model, frozen but for what trains, its optimizer."""
    model, context, recipe = loaded.model, loaded.context, loaded.recipe
    ddp = wrap_with_ddp(model, context)
    optimizer, scheduler = build_optimizer(ddp, recipe.train)
    return Policy(
        model=model,
        ddp=ddp,
        optimizer=optimizer,
        scheduler=scheduler,
        context=context,
        temperature=recipe.generation.temperature,
        vocab_size=loaded.sampled_vocab_size,
        features=None if Part.vision in recipe.train.parts else loaded.feature_cache(),
        packed=recipe.train.packing is not Packing.none,
        length_multiple=length_multiple(recipe),
        skipped=SkippedUpdates(run_dir / SKIPPED_FOLDER, settings=recipe.train, context=context),
    )


def next_distinct(stream: PromptStream, count: int, *, besides: Sequence[Prompt] = ()) -> list[Prompt]:
    """Read prompts with distinct keys: at the border of two epochs one may come twice, and would be one group.

    Args:
        stream: endless.
        count: how many.
        besides: prompts that the step has already.

    Raises:
        ValueError: the data set has fewer.
    """
    taken = {prompt.key for prompt in besides}
    found: dict[str, Prompt] = {}
    for _ in range(20):
        for prompt in stream.next(count - len(found)):
            if prompt.key not in taken:
                found.setdefault(prompt.key, prompt)
        if len(found) == count:
            return list(found.values())
    further = f" beside the {len(taken)} of earlier rounds (algorithm.dynamic_sampling_rounds)" if taken else ""
    raise ValueError(
        f"data.train has only {len(found)} distinct prompts{further} but train.prompts_per_step={count}; "
        "lower train.prompts_per_step or give more data"
    )
