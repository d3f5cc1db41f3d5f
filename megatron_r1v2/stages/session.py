"""A running stage: the model in training with its data, checkpoints, displays and signals, built from the settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_r1v2.checkpoint.megatron.run_folder import RECIPE_FILE
from megatron_r1v2.config.choices import OnResume, Packing, Part, StageName, TooLong
from megatron_r1v2.config.load import recipe_yaml
from megatron_r1v2.config.recipes import TrainingRecipe
from megatron_r1v2.config.schema import CheckpointConfig, RewardConfig
from megatron_r1v2.data.mixture import share_metrics
from megatron_r1v2.data.read_ahead import ReadAhead
from megatron_r1v2.data.survey import DataSurvey
from megatron_r1v2.data.tokenizer import ChatTokenizer
from megatron_r1v2.models.r1v2 import R1V2Model, freeze_all_but
from megatron_r1v2.models.shared_attention import check_shared_attention
from megatron_r1v2.monitoring.device_memory import DeviceMemory
from megatron_r1v2.monitoring.recorder import Recorder, RunInfo
from megatron_r1v2.parallel import objects
from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.resilience.files import write_file
from megatron_r1v2.resilience.fingerprint import Fingerprint
from megatron_r1v2.resilience.rank_watch import RankWatch
from megatron_r1v2.resilience.rollout_cache import RolloutCache
from megatron_r1v2.resilience.run_lock import hold_folder
from megatron_r1v2.resilience.signals import StepAbandoned, StopSignals, torchrun_patience
from megatron_r1v2.resilience.skipped_updates import FOLDER as SKIPPED_FOLDER
from megatron_r1v2.resilience.skipped_updates import SkippedUpdates
from megatron_r1v2.rewards.functions import describe_functions
from megatron_r1v2.stages.loaded_model import LoadedModel, open_model
from megatron_r1v2.stages.loaded_reward_model import describe_reward_model
from megatron_r1v2.stages.preemption import PreemptionHandler
from megatron_r1v2.stages.resume import GOAL, ROWS, Restored, choose_checkpoint, resume
from megatron_r1v2.stages.step_prompts import check_enough_samples, next_distinct
from megatron_r1v2.stages.supervised_data import ResponseEncoder
from megatron_r1v2.training.microbatches import Microbatcher
from megatron_r1v2.training.optimizer import (
    build_optimizer,
    current_learning_rate,
    release_grad_hooks,
    wrap_with_ddp,
)
from megatron_r1v2.training.policy import Policy
from megatron_r1v2.training.reference import ReferenceWeights
from megatron_r1v2.training.speed import StepSpeed
from megatron_r1v2.training.store import CheckpointStore, Snapshot
from megatron_r1v2.training.weight_verification import WeightVerifier
from megatron_r1v2.types import Prompt

State = Mapping[str, object]


@dataclass
class Session:
    """A running stage."""

    recipe: TrainingRecipe
    loaded: LoadedModel
    policy: Policy
    stream: ReadAhead
    checkpoints: CheckpointStore
    recorder: Recorder
    reference: ReferenceWeights | None
    preemption: PreemptionHandler
    verifier: WeightVerifier
    restored: Restored
    """Of the checkpoint that the stage goes on from, for what the stage itself must restore."""
    started_from: Mapping[str, int]
    """Checksums by part of the weights that the stage began from."""
    contents: Fingerprint
    """Of the files that the settings name: rows, tokenizer, reward functions."""
    step: int
    """Steps done."""
    saved_step: int
    """Those of them that the newest checkpoint has."""
    survey: DataSurvey
    """Of data.train."""
    memory: DeviceMemory
    """Of this rank's device."""
    speed: StepSpeed

    @property
    def context(self) -> ParallelContext:
        """Return the process groups."""
        return self.loaded.context

    @property
    def model(self) -> R1V2Model:
        """Return this rank's part of the model in training."""
        return self.loaded.model

    @property
    def tokenizer(self) -> ChatTokenizer:
        """Return the tokenizer."""
        return self.loaded.tokenizer

    @property
    def parts(self) -> tuple[Part, ...]:
        """Return the parts that train."""
        return self.recipe.train.parts

    @property
    def microbatcher(self) -> Microbatcher:
        """Return a maker of microbatches for this model and layout."""
        return self.loaded.microbatcher(self.recipe.train)

    @property
    def response_encoder(self) -> ResponseEncoder:
        """Return an encoder of given responses for this model."""
        return ResponseEncoder(self.tokenizer, self.tokenizer.turn_end(self.recipe.generation.stop_tokens))

    @property
    def trains_text(self) -> bool:
        """Return whether a text-only prompt has a gradient: the language model sees it, and a reward model's head."""
        return Part.language in self.parts or Part.score in self.parts

    def trains(self, prompt: Prompt) -> bool:
        """Return whether a prompt has a gradient."""
        return self.trains_text or prompt.modality == "image"

    @property
    def is_finished(self) -> bool:
        """Return whether the last step is done, or a resumed stage had reached its goal before."""
        return self.step >= self.recipe.train.steps or self.restored.finished

    def next_prompts(self) -> list[Prompt]:
        """Read the prompts of a step, with distinct keys, less those that nothing in training sees."""
        if self.policy.features is not None:
            self.policy.features.clear()
        with self.recorder.timed("data"):
            prompts = next_distinct(self.stream, self.recipe.train.prompts_per_step)
        trainable = [prompt for prompt in prompts if self.trains(prompt)]
        self.recorder.note({"data/text_only_left_out": len(prompts) - len(trainable), **share_metrics(prompts)})
        return trainable

    def end_step(self) -> None:
        """Collective over the world: write the numbers of the step, then publish finished checkpoints."""
        self.recorder.note({"data/corrupt_samples": self.stream.corrupt, "data/samples_read": self.stream.samples_read})
        if self.recipe.data.too_long is TooLong.skip:
            self.recorder.note({"data/too_long_left_out": self.stream.left_out})
        self.recorder.note({**self.speed.metrics(self.recorder.values), **self._gather_memory()})
        self.preemption.check_lead()
        self.recorder.end_step(self.step)
        # After the numbers: a run killed between the two does the step again, rather than lack its line for ever.
        self.preemption.publish(blocking=False)

    def _gather_memory(self) -> dict[str, float]:
        """Collective over the world: return the memory of the GPUs, the largest of all ranks; empty on a CPU."""
        mine = self.memory.take()
        every = objects.all_gather(mine) if mine else []
        return {name: max(each.get(name, 0.0) for each in every) for name in mine}

    def save(
        self, state: Mapping[str, object], replay: Mapping[str, object], *, pass_at_1: float | None = None
    ) -> None:
        """Collective over the world: write a checkpoint.

        Args:
            state: of the stage, the same on every rank.
            replay: what this data-parallel rank holds of the buffer.
            pass_at_1: of this step, where it was validated.
        """
        # With the parts that earlier stages have trained: they are not in the HF folder either.
        own = {*self.parts, *self.loaded.changed_parts}
        random_parts = (own & self.loaded.random_parts) - set(self.parts)
        snapshot = Snapshot(
            step=self.step,
            parts=own,
            trained=self.parts,
            state={
                "step": self.step,
                "version": self.policy.version,
                "scheduler": self.policy.scheduler.state_dict(),
                "stream": self.stream.state_dict(),
                "started_from": dict(self.started_from),
                "contents": self.contents.values,
                **self.verifier.describe_weights(own),
                "skipped_in_a_row": self.policy.skipped.in_a_row,
                **state,
            },
            replay=replay,
            recipe=recipe_yaml(self.recipe),
            pass_at_1=pass_at_1,
            random_parts=random_parts,
        )
        self.checkpoints.save(self.policy.model, self.policy.optimizer, snapshot)
        self.saved_step = self.step

    @contextmanager
    def save_on_error(self, state: Callable[[], State], replay: Callable[[], State]) -> Iterator[None]:
        """Collective over the world: run a step in the block; where it ends by an error or is given up, save the steps
        before first.

        Args:
            state: gives what the stage itself must restore.
            replay: gives what this data-parallel rank holds of the buffer.
        """
        step, version, position = self.step, self.policy.version, self.stream.state_dict()
        try:
            yield
        except Exception as error:  # of any kind: it is raised again
            # Before anything is waited for: this process may be ended meanwhile.
            if not isinstance(error, StepAbandoned):
                self.preemption.watch.report_error(error)
            # Of one rank alone: the others wait in another collective for ever.
            together = self.preemption.watch.gather_failed(f"step-{step}")
            if not together:
                # All give a step up together. One that is missing is lost, which may be why SLURM sent SIGTERM here.
                self.preemption.watch.report_error(error)
            whole = self.step > step or self.policy.version == version
            if together and whole and not self.policy.skipped.in_a_row and self.step > self.saved_step:
                if self.step == step:  # its prompts are read again
                    self.stream.load_state_dict(position)
                self.save({"finished": False, **state()}, replay())
                self.preemption.publish(blocking=True)
                why = "is given up" if isinstance(error, StepAbandoned) else "ends by an error"
                self.recorder.log(f"saved after step {self.step}, as the run {why}; start again to go on")
            raise

    def should_save(self, *, last: bool, pass_at_1: float | None = None) -> bool:
        """Return whether the step just done is one to save."""
        every = self.recipe.checkpoint.every_steps
        return last or (every > 0 and self.step % every == 0) or self.checkpoints.is_best(pass_at_1)


@contextmanager
def open_session(
    recipe: TrainingRecipe,
    *,
    stage: str,
    shown: Sequence[str],
    keep_reference: bool = False,
    temperature: float = 1.0,
) -> Iterator[Session]:
    """Collective over the world: start a stage, resumed from its newest checkpoint; everything ends with the block.

    Args:
        stage: for the progress display.
        shown: metrics for the progress display.
        keep_reference: whether to keep a copy of the weights that the stage starts from.
        temperature: of the distribution that the samples are drawn from; 1 for given responses.

    Raises:
        ValueError: among others, a data set with fewer samples than a step takes.
    """
    run_dir = Path(recipe.run.output_dir)
    with (
        open_model(recipe, score_head=stage == "reward_model", recompute=recipe.train.recompute) as loaded,
        hold_folder(run_dir, loaded.context),
        ExitStack() as at_the_end,
    ):
        # Before DDP wraps the model: a frozen parameter must get no gradient buffer.
        freeze_all_but(loaded.model, recipe.train.parts)
        # Before a checkpoint of this stage is loaded: the reference is what the stage starts from.
        reference = ReferenceWeights(loaded.model) if keep_reference else None
        policy = _build_policy(loaded, recipe, run_dir, temperature)
        # The hooks hold the model and the threads of its groups in a cycle that Python does not collect.
        at_the_end.callback(release_grad_hooks, loaded.model)
        stream = loaded.training_stream()
        checkpoints = _open_checkpoints(recipe.checkpoint, loaded.context, run_dir)
        verifier = WeightVerifier(loaded.model, recipe.train.parts, loaded.context)
        checksums = verifier.compute_checksums()
        started_from = verifier.exact_checksums(checksums)
        newest = choose_checkpoint(checkpoints, recipe.checkpoint.resume_step)
        survey, contents = _survey_contents(loaded, recipe)
        restored = resume(newest, policy, stream, checkpoints, recipe, started_from=started_from, contents=contents)
        memory = DeviceMemory.of(loaded.context.device)
        with _open_supervision(
            recipe, loaded.context, checkpoints, stage=stage, shown=shown, first_step=restored.step, memory=memory
        ) as (
            recorder,
            preemption,
        ):
            _check_data(survey, recipe, recorder, pairs=stage in ("mpo", "reward_model"))
            _note_resume(recorder, recipe, restored, newest, learning_rate=current_learning_rate(policy.optimizer))
            # Without a checkpoint too: replicas must agree, and the checksums of frozen parts are those to keep.
            # What a checkpoint has loaded is looked at anew; without one the weights are still those of the start.
            verifier.verify_weights(restored.checksums, newest, computed=None if newest else checksums)
            session = Session(
                recipe=recipe,
                loaded=loaded,
                policy=policy,
                stream=ReadAhead(stream),
                checkpoints=checkpoints,
                recorder=recorder,
                reference=reference,
                preemption=preemption,
                verifier=verifier,
                restored=restored,
                started_from=started_from,
                contents=contents,
                step=restored.step,
                saved_step=restored.step,
                survey=survey,
                memory=memory,
                speed=StepSpeed.measure(loaded.model, loaded.context),
            )
            try:
                yield session
            except StepAbandoned as reason:
                preemption.log_step_abandoned(session.step, str(reason))
            # Also after a step that was given up: the checkpoint of the step before may not be written yet.
            preemption.publish(blocking=True)


def _survey_contents(loaded: LoadedModel, recipe: TrainingRecipe) -> tuple[DataSurvey, Fingerprint]:
    """Collective over the world: look at data.train, and fingerprint what is in the files that the settings name."""
    survey, validation = loaded.survey_train(), recipe.data.validation
    reward = dict(recipe).get("reward")
    functions = describe_functions(reward.functions) if isinstance(reward, RewardConfig) else []
    return survey, Fingerprint.of(
        **{
            ROWS: survey.digest[:12],
            "rows of data.validation": loaded.survey_data(validation).digest[:12] if validation else "",
            "tokenizer and chat template of model.hf_path": loaded.tokenizer.digest[:12],
            "weights of reward_model.checkpoint": describe_reward_model(recipe),
            "files of reward.functions": [f"{each['name']} {str(each['sha256'])[:12]}" for each in functions],
        }
    )


def _check_data(survey: DataSurvey, recipe: TrainingRecipe, recorder: Recorder, *, pairs: bool) -> None:
    """Log the findings about data.train before the first step.

    Raises:
        ValueError: it holds what cannot be trained on, or not enough for a step.
    """
    for line in survey.sentences(recipe.data.train_text, recipe.data, pairs=pairs):
        recorder.log(line)
    check_enough_samples(recipe.data, recipe.train.prompts_per_step, left_out=len(survey.too_long))


def _note_resume(
    recorder: Recorder, recipe: TrainingRecipe, restored: Restored, newest: Path | None, *, learning_rate: float
) -> None:
    """Log what a run goes on from and what has changed since; write its recipe, and keep the one before.

    Args:
        learning_rate: of the next step.
    """
    if newest is not None:
        recorder.log(f"resuming from {newest}, step {restored.step} of {recipe.train.steps}")
        for change in restored.changes:
            recorder.log(f"  {change}")
            if change.rule is OnResume.larger:
                recorder.log(
                    f"  the learning rate follows the schedule of train.steps={recipe.train.steps} from here on: "
                    f"{learning_rate:.3g} in the next step, {recipe.train.min_learning_rate:.3g} at the end"
                )
        recorder.note_changes([str(each) for each in restored.changes if each.rule is not OnResume.free])
        if restored.step >= recipe.train.steps:
            recorder.log(f"all train.steps={recipe.train.steps} steps are done: nothing is trained; it may be raised")
        elif restored.finished:
            recorder.log(f"the run had reached {GOAL}: nothing is trained; it may be raised")
    if restored.taken_out:
        recorder.log(restored.taken_out)
    if recorder.is_main:
        if restored.changes and newest is not None:
            write_file(recorder.run_dir / f"recipe-{restored.step}.yaml", (newest / RECIPE_FILE).read_bytes())
        write_file(recorder.run_dir / RECIPE_FILE, recipe_yaml(recipe))


@contextmanager
def _open_supervision(
    recipe: TrainingRecipe,
    context: ParallelContext,
    checkpoints: CheckpointStore,
    *,
    stage: str,
    shown: Sequence[str],
    first_step: int,
    memory: DeviceMemory,
) -> Iterator[tuple[Recorder, PreemptionHandler]]:
    """Listen for signals, open the recorder, and watch the other ranks, while the block runs."""
    run_dir = Path(recipe.run.output_dir)
    with (
        StopSignals(
            context.device,
            grace_seconds=recipe.checkpoint.grace_seconds,
            patience_seconds=torchrun_patience(),
        ) as stop_signals,
        Recorder(
            run_dir,
            RunInfo(
                recipe.run.name,
                stage,
                recipe.train.steps,
                first_step,
                shown,
                recipe.model_dump(mode="json"),
                num_processes=context.num_processes,
                device=context.device_name,
                goes_back=0 < recipe.checkpoint.resume_step == first_step,
            ),
            settings=recipe.logging,
            is_main=context.is_main,
            memory=memory,
        ) as recorder,
        RankWatch(context.store, recorder.current_phase, limit_seconds=60 * recipe.parallel.timeout_minutes) as watch,
    ):
        stop_signals.call_before_leaving(watch.print_report)
        yield (
            recorder,
            PreemptionHandler(
                stop_signals,
                RolloutCache(run_dir, context, enabled=recipe.checkpoint.keep_rollouts),
                checkpoints,
                lead_seconds=recipe.checkpoint.lead_seconds,
                recorder=recorder,
                watch=watch,
                context=context,
            ),
        )


def _open_checkpoints(settings: CheckpointConfig, context: ParallelContext, run_dir: Path) -> CheckpointStore:
    return CheckpointStore(
        run_dir / "checkpoints",
        keep_last=settings.keep_last,
        asynchronous=settings.asynchronous,
        context=context,
    )


def _build_policy(loaded: LoadedModel, recipe: TrainingRecipe, run_dir: Path, temperature: float) -> Policy:
    """Wrap a model whose other parts are frozen, and build its optimizer."""
    model, context = loaded.model, loaded.context
    if recipe.train.packing is Packing.shared and context.device.type == "cuda":
        # Which kernels torch takes depends on the device, so the numbers are looked at where they count.
        check_shared_attention(
            heads=model.config.num_attention_heads // context.tensor_size,
            kv_heads=max(1, model.config.num_query_groups // context.tensor_size),
            head_size=model.config.kv_channels,
            device=context.device,
            dtype=model.config.params_dtype,
        )
    ddp = wrap_with_ddp(model, context)
    optimizer, scheduler = build_optimizer(ddp, recipe.train)
    return Policy(
        model=model,
        ddp=ddp,
        optimizer=optimizer,
        scheduler=scheduler,
        context=context,
        temperature=temperature,
        measures_entropy=recipe.stage is StageName.grpo,
        vocab_size=loaded.sampled_vocab_size,
        # A tower that trains has other features after every update.
        features=None if Part.vision in recipe.train.parts else loaded.feature_cache(),
        packing=recipe.train.packing,
        length_multiple=loaded.length_multiple,
        skipped=SkippedUpdates(
            run_dir / SKIPPED_FOLDER,
            max_gradient_norm=recipe.train.skip_above_grad_norm,
            context=context,
        ),
    )
