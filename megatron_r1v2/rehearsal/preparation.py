"""The inputs of a rehearsal on disk: rows of full length, a model folder, and the recipe with few changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_r1v2.config.choices import Fp8, Layers, Packing, Part, StageName
from megatron_r1v2.config.load import recipe_yaml
from megatron_r1v2.config.recipes import GrpoRecipe, MpoRecipe, PairsRecipe, TrainingRecipe
from megatron_r1v2.models.architecture import R1V2Architecture
from megatron_r1v2.planning.parameters import Layout
from megatron_r1v2.planning.workload import Workload
from megatron_r1v2.types import DataEndsRunError

if TYPE_CHECKING:
    from megatron_r1v2.data.tokenizer import ChatTokenizer
    from megatron_r1v2.rehearsal.own_rows import DataLengths, NemoRows, OwnRows
    from megatron_r1v2.rehearsal.rows import RowWriter

AnyTraining = TrainingRecipe | PairsRecipe

STEPS = 2
"""The second one finds what the first one leaves: the buffer's samples, the optimizer's state, lasting buffers."""
VALIDATED_PROMPTS = 1
"""Of a replica."""
MADE = "made"
"""In the place of a checkpoint that is not here: weights of the base, with a head that is drawn."""
_NO_BOUND = 1e9
_LONG_PROMPTS = 2
"""Of a replica: the second one finds the cache of features as the first one left it."""


@dataclass(frozen=True)
class Step:
    """The rows of the rehearsed step."""

    long: int
    """Rows of full length, over all replicas."""
    short: int
    """Short text prompts, which fill the engine's slots, over all replicas."""
    mixed_groups: int
    """Long prompts whose responses are trained on."""
    prompts_of_replica: int
    """In a step of the recipe, with those that go on from earlier ones."""
    long_of_replica: int
    whole_groups: int | None = None
    """Long prompts over all replicas whose responses end in the step in which they began; None: all."""

    @property
    def prompts(self) -> int:
        """Return the prompts of the rehearsed step."""
        return self.long + self.short

    def trained_rows(self, responses: int) -> int:
        """Return the responses of full length that are trained on, over all replicas.

        Args:
            responses: to each prompt.
        """
        return (self.mixed_groups or self.long) * responses


def plan_step(work: Workload, layout: Layout, *, segments: int = 1) -> Step:
    """Choose as many rows as every way through the code needs, and no more.

    Each update gets one microbatch more than the pipeline has stages on each replica, so that all are in flight at
    once; the engine gets as many requests as it has slots.

    Args:
        segments: steps in which the longest response is generated. Where these are several, a further group of each
            replica goes on in the next step.
    """
    of_replica = -(-work.prompts_per_step // layout.data)
    microbatches = layout.pipeline + 1
    rows = work.updates_per_step * microbatches * _rows_of_microbatch(work, layout)
    if work.stage not in (StageName.grpo, StageName.pairs):
        units = min(work.prompts_per_step, -(-rows // work.responses_per_prompt) * layout.data)
        return Step(units, 0, 0, of_replica, units // layout.data)
    # Updates share no group.
    groups = max(work.updates_per_step, -(-rows // work.responses_per_prompt))
    going_on = int(segments > 1 and of_replica > 1)
    long = min(of_replica, max(_LONG_PROMPTS, groups + going_on))
    slots = min(of_replica, -(-work.max_requests // work.responses_per_prompt))
    return Step(
        long=long * layout.data,
        short=max(0, slots - long) * layout.data,
        mixed_groups=min(long - going_on, groups) * layout.data,
        # At most: every prompt that began in the last steps may have a response that goes on.
        prompts_of_replica=of_replica * segments,
        long_of_replica=long,
        whole_groups=(long - going_on) * layout.data if going_on else None,
    )


def _rows_of_microbatch(work: Workload, layout: Layout) -> int:
    # Shared rows hold more, but never fewer.
    return max(1, work.packed_tokens // work.row_tokens(layout.tensor))


def rehearsed_recipe(recipe: AnyTraining, step: Step, folder: Path, hf_path: Path) -> AnyTraining:
    """Return the recipe of the rehearsal: made data, two steps, then a validation and a checkpoint, no services.

    Args:
        folder: for what it writes; with the data sets of `write_rows`.
    """
    # Graphs, TransformerEngine and compiled kernels need a device that computes; those keep less than the ones here.
    generation = recipe.generation.changed(cuda_graphs=False)
    unfused = {"bias_activation_fusion": False, "bias_dropout_fusion": False}
    model = recipe.model.changed(
        hf_path=str(hf_path),
        layers=Layers.local,
        fp8=Fp8.none,
        fp8_weights=False,
        transformer_config=recipe.model.transformer_config | unfused,
    )
    if recipe.model.checkpoint and not Path(recipe.model.checkpoint).exists():
        model = model.changed(checkpoint="")
    # NeMo, which need not be here, packs as ours does where every row fits; see `NemoRows`.
    packing = Packing.first_fit_decreasing if recipe.train.packing is Packing.nemo else recipe.train.packing
    train = recipe.train.changed(prompts_per_step=step.prompts, packing=packing)
    changes: dict[str, object] = {
        "run": recipe.run.changed(output_dir=str(folder / "run")),
        "data": recipe.data.changed(train=str(folder / "train"), validation=_validation(recipe, folder), shuffle=False),
    }
    if isinstance(recipe, TrainingRecipe):
        bound = _NO_BOUND if train.skip_above_grad_norm else 0.0
        train = train.changed(steps=STEPS, warmup_steps=0, skip_above_grad_norm=bound)
        validates = bool(recipe.data.validation) and recipe.evaluation.every_steps > 0
        changes |= {
            "checkpoint": recipe.checkpoint.changed(every_steps=STEPS),
            "evaluation": recipe.evaluation.changed(
                every_steps=STEPS if validates else 0, prompts=0, runs=1, stop_at_pass_at_1=0.0
            ),
            "logging": recipe.logging.changed(trackers=()),
        }
    if isinstance(recipe, GrpoRecipe | PairsRecipe):
        if recipe.reward_model.url:
            # It answers from elsewhere, and takes no memory here.
            changes["reward"] = recipe.reward.changed(model_weight=0.0)
            changes["reward_model"] = recipe.reward_model.changed(url="")
        elif recipe.reward_model.checkpoint and not Path(recipe.reward_model.checkpoint).exists():
            changes["reward_model"] = recipe.reward_model.changed(checkpoint=MADE)
    if isinstance(recipe, MpoRecipe):
        # Log-probs of fakes must not lie where a run looks for true ones.
        changes["preference"] = recipe.preference.changed(reference_dir="")
    if isinstance(recipe, PairsRecipe) and recipe.pairs.dropout_ntp_fraction:
        changes["pairs"] = recipe.pairs.changed(dropout_ntp_fraction=1.0)
    if isinstance(recipe, GrpoRecipe):
        # Numbers that nobody can know are 1, see `FakeTensors.constant_for`.
        changes["algorithm"] = recipe.algorithm.changed(max_log_prob_difference=_NO_BOUND)
        changes["hallucination"] = recipe.hallucination.changed(target_rate=0.0)
    return type(recipe)(**{**dict(recipe), **changes, "generation": generation, "model": model, "train": train})


def segments_of_response(recipe: AnyTraining) -> int:
    """Return the steps in which the longest response is generated."""
    generation = recipe.generation
    if not isinstance(recipe, GrpoRecipe) or not generation.segment_tokens:
        return 1
    return -(-generation.max_response_tokens // generation.segment_tokens)


def changed_settings(recipe: AnyTraining, rehearsed: AnyTraining, folder: Path) -> list[str]:
    """Return the settings that a rehearsal changes, in words.

    Args:
        folder: of what was made for it.
    """
    before, after = recipe.model_dump(mode="json"), rehearsed.model_dump(mode="json")

    def told(value: object) -> str:
        is_made = isinstance(value, str) and Path(value).is_relative_to(folder)
        return "made" if is_made else repr(value)

    return [
        f"{section}.{name}: {before[section][name]!r} -> {told(after[section][name])}"
        for section, names in recipe.settings().items()
        for name in names
        if before[section][name] != after[section][name]
    ]


def _validation(recipe: AnyTraining, folder: Path) -> str:
    return str(folder / "validation") if recipe.data.validation else ""


@dataclass(frozen=True)
class Inputs:
    """The files of a rehearsal, and what there is to say of them."""

    recipe: Path
    step: Step
    changes: tuple[str, ...]
    """Settings that the rehearsal changes, in words."""
    data: tuple[str, ...] = ()
    """Of the recipe's own data sets, where these were read."""
    makes_weights: bool = False
    """Whether names and shapes of the weights are those of the configuration, for want of a folder that has them."""


@dataclass(frozen=True)
class _Size:
    """The rows of a data set."""

    long: int
    """Of full length, in a step."""
    short: int
    steps: int

    @property
    def rows(self) -> int:
        return self.long + self.short


def write_rehearsal(
    recipe: AnyTraining,
    config: Mapping[str, object],
    architecture: R1V2Architecture,
    layout: Layout,
    *,
    folder: Path,
    hf_path: Path | None,
    own_data: bool = False,
) -> Inputs:
    """Write all that the rehearsed ranks read.

    Args:
        config: of the model, as transformers' InternVL has it.
        folder: a new one.
        hf_path: the model's folder; None, or without weights: one is made.
        own_data: whether to take the longest rows of the recipe's data sets instead of made ones.

    Raises:
        DataEndsRunError: rows of the recipe's data sets would end the run, or there are too few of them.
        ValueError: among others, a data set of the recipe is missing, or no row of it fits.
    """
    from megatron_r1v2.data.tokenizer import ChatTokenizer
    from megatron_r1v2.rehearsal.rows import write_model_folder

    folder.mkdir(parents=True, exist_ok=True)
    segments = segments_of_response(recipe)
    step = plan_step(Workload.from_recipe(recipe, architecture), layout, segments=segments)
    # A run with segments wants as many prompts as there can be in flight.
    sizes = {"train": _Size(step.long, step.short, max(STEPS, segments))}
    if recipe.data.validation:
        sizes["validation"] = _Size(VALIDATED_PROMPTS * layout.data, 0, 1)
    said: list[str] = []
    if own_data:
        # Before anything else is made: rows that would end the run are told in seconds.
        said = _write_own_rows(_own_rows(recipe, architecture, hf_path), recipe, sizes, folder)
        step = changed(step, long=step.long + step.short, short=0)
    makes_weights = hf_path is None or not any(hf_path.glob("*.safetensors"))
    if hf_path is None or makes_weights:
        write_model_folder(folder / "hf", config, hf_path)
        hf_path = folder / "hf"
    if not own_data:
        writer = _row_writer(recipe, architecture, ChatTokenizer(hf_path))
        check_made_rows(recipe, writer.max_response_tokens)
        for name, size in sizes.items():
            writer.write(folder / name, long=size.long, short=size.short, steps=size.steps)
    path = folder / "recipe.yaml"
    rehearsed = rehearsed_recipe(recipe, step, folder, hf_path)
    path.write_text(recipe_yaml(rehearsed))
    changes = changed_settings(recipe, rehearsed, folder)
    return Inputs(path, step, tuple(changes), tuple(said), makes_weights)


def _write_own_rows(rows: OwnRows, recipe: AnyTraining, sizes: Mapping[str, _Size], folder: Path) -> list[str]:
    """Measure the recipe's data sets, write the longest rows of each, and return what there is to say."""
    from megatron_r1v2.rehearsal.own_rows import check_lengths

    sets = {"train": [source.path for source in recipe.data.sources], "validation": [recipe.data.validation]}
    measured = {
        name: [rows.measure(path, size.rows * size.steps, given=name == "train") for path in sets[name]]
        for name, size in sizes.items()
    }
    found = [lengths for each in measured.values() for lengths in each]
    check_lengths(found)
    _check_count(recipe, measured["train"])
    for name, size in sizes.items():
        rows.write(measured[name], folder / name, rows=size.rows, steps=size.steps)
    return [sentence for lengths in found for sentence in lengths.sentences(recipe.data)]


def _check_count(recipe: AnyTraining, measured: Sequence[DataLengths]) -> None:
    """Refuse a data.train with fewer rows than a step takes, or than can be in flight.

    Raises:
        DataEndsRunError: as the stage would say it before its first step.
    """
    from megatron_r1v2.data.mixture import num_in_shares
    from megatron_r1v2.stages.grpo.segments import check_enough_prompts
    from megatron_r1v2.stages.step_prompts import check_enough_samples

    if not isinstance(recipe, TrainingRecipe):
        return
    try:
        left_out = sum(len(lengths.left_out) for lengths in measured)
        check_enough_samples(recipe.data, recipe.train.prompts_per_step, left_out=left_out)
        if isinstance(recipe, GrpoRecipe):
            sizes, weights = [lengths.rows for lengths in measured], [source.weight for source in recipe.data.sources]
            check_enough_prompts(num_in_shares(sizes, weights) if len(sizes) > 1 else sizes[0], recipe)
    except ValueError as error:
        raise DataEndsRunError(str(error)) from error


def _row_writer(recipe: AnyTraining, architecture: R1V2Architecture, tokenizer: ChatTokenizer) -> RowWriter:
    from megatron_r1v2.rehearsal.rows import RowWriter

    return RowWriter(
        tokenizer,
        recipe.data,
        tile_size=architecture.vision.image_size,
        tokens_per_tile=architecture.tokens_per_tile,
        # Nothing limits given responses but the model.
        max_response_tokens=min(
            recipe.generation.max_response_tokens,
            architecture.language.max_positions - recipe.data.max_prompt_tokens,
        ),
        end_token=tokenizer.turn_end(recipe.generation.stop_tokens),
    )


def check_made_rows(recipe: AnyTraining, response: int) -> None:
    """Refuse rows of full length that NeMo cannot pack.

    Args:
        response: tokens of the longest one.

    Raises:
        DataEndsRunError: a run would end by the first such row.
    """
    from megatron_r1v2.rehearsal.own_rows import PAIR_STAGES

    nemo, prompt = _nemo_rows(recipe), recipe.data.max_prompt_tokens
    if nemo and (mistake := nemo.mistake(prompt, [response] * (2 if recipe.stage in PAIR_STAGES else 1))):
        raise DataEndsRunError(f"prompts of {prompt} tokens with responses of {response}: {mistake}")


def _nemo_rows(recipe: AnyTraining) -> NemoRows | None:
    """Return the rows that NeMo packs in this stage; None: it packs none."""
    from megatron_r1v2.rehearsal.own_rows import NemoRows
    from megatron_r1v2.training.batches import length_multiple

    scores = isinstance(recipe, GrpoRecipe | PairsRecipe) and recipe.reward_model.lies_beside_policy
    if recipe.train.packing is not Packing.nemo or (isinstance(recipe, PairsRecipe) and not scores):
        return None
    return NemoRows(
        recipe.train.tokens_per_microbatch,
        length_multiple(recipe.model.fp8, recipe.parallel),
        # A score is read at the last token of a response, behind which stands one more.
        pads=int(scores or recipe.stage is StageName.reward_model),
    )


def _own_rows(recipe: AnyTraining, architecture: R1V2Architecture, hf_path: Path | None) -> OwnRows:
    from megatron_r1v2.data.prompts import PromptBuilder
    from megatron_r1v2.data.tokenizer import ChatTokenizer
    from megatron_r1v2.rehearsal.own_rows import OwnRows

    assert recipe.stage is not None
    assert hf_path is not None, "the command asks for it"
    tokenizer = ChatTokenizer(hf_path)
    builder = PromptBuilder(
        settings=recipe.data,
        tokenizer=tokenizer,
        tile_size=architecture.vision.image_size,
        tokens_per_tile=architecture.tokens_per_tile,
    )
    return OwnRows(
        recipe.stage,
        builder,
        recipe.data,
        end_token=tokenizer.turn_end(recipe.generation.stop_tokens),
        max_positions=architecture.language.max_positions,
        max_response_tokens=recipe.generation.max_response_tokens,
        # See Session.trains_text.
        nemo=_nemo_rows(recipe),
        needs_image=isinstance(recipe, TrainingRecipe) and not {Part.language, Part.score} & {*recipe.train.parts},
    )
