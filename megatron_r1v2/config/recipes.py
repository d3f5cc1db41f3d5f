"""A recipe for each stage: the sections and settings that it reads, and what they need of each other."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from megatron_r1v2.config.choices import Part, StageName
from megatron_r1v2.config.combinations import CHECKS, group_mistakes
from megatron_r1v2.config.schema import (
    AlgorithmConfig,
    BufferConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    GenerationConfig,
    HallucinationConfig,
    LoggingConfig,
    LossConfig,
    ModelConfig,
    PairsConfig,
    ParallelConfig,
    PreferenceConfig,
    RewardConfig,
    RewardModelConfig,
    RunConfig,
    Section,
    TrainConfig,
)


class Only(frozenset[str]):
    """The settings of a section that a recipe reads; stands beside the section of which it does not read all."""


class Without(frozenset[str]):
    """The settings of a section that a recipe does not read."""


# Old log-probs, which several updates of a step are weighed against, exist in GRPO alone.
_ONE_UPDATE = Without({"updates_per_step"})
# Only GRPO and pairs compare responses to one prompt.
_NO_GROUPS = Without({"responses_per_prompt", "segment_tokens"})
# The likelihood of given responses is that of the model itself; a validation has a temperature of its own.
_NO_SAMPLING = Without({"responses_per_prompt", "segment_tokens", "temperature"})
# What a validation during training does not have: its prompts are data.validation, its model is in process.
_BY_COMMAND = ("data", "endpoint_url", "endpoint_model", "judge_url", "judge_model")


class Recipe(Section):
    """The settings of a run, a section each; every recipe has those that a model in process needs."""

    stage: ClassVar[StageName | None] = None
    """The stage that it is for; None: it takes over the recipe of any."""
    needed: ClassVar[tuple[str, ...]] = ("model.hf_path",)
    """Settings without which nothing can start."""

    run: RunConfig = Field(default_factory=RunConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    generation: GenerationConfig = Field(default_factory=GenerationConfig)

    def mistakes(self) -> Iterator[str]:
        """Yield a sentence for each contradiction between settings."""
        sections = dict(self)
        for check, names in CHECKS.items():
            if sections.keys() >= set(names):
                yield from check(*(sections[name] for name in names))

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if found := list(self.mistakes()):
            raise ValueError("\n".join(found))
        return self

    @classmethod
    def sections(cls) -> Mapping[str, type[Section]]:
        """Return the classes of the sections by name, in the order in which they are shown."""
        return {
            name: field.annotation
            for name, field in cls.model_fields.items()
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        }

    @classmethod
    @cache
    def settings(cls) -> Mapping[str, tuple[str, ...]]:
        """Return the settings that are read, by section."""
        read: dict[str, tuple[str, ...]] = {}
        for name, section in cls.sections().items():
            keys = [*section.model_fields]
            for mark in cls.model_fields[name].metadata:
                keys = [key for key in keys if (key in mark) == isinstance(mark, Only)]
            read[name] = tuple(keys)
        return read

    @classmethod
    def title(cls) -> str:
        """Return the name of what reads the recipe: grpo, evaluate, ..."""
        return cls.stage.value if cls.stage else cls.__name__.removesuffix("Recipe").lower()

    @classmethod
    def purpose(cls) -> str:
        """Return what the stage does, and what its rows need."""
        return inspect.cleandoc(cls.__doc__ or "")


class TrainingRecipe(Recipe):
    """The settings of a stage that trains."""

    needed: ClassVar[tuple[str, ...]] = ("model.hf_path", "data.train")

    generation: Annotated[GenerationConfig, _NO_SAMPLING] = Field(default_factory=GenerationConfig)
    train: Annotated[TrainConfig, _ONE_UPDATE] = Field(default_factory=TrainConfig)
    checkpoint: Annotated[CheckpointConfig, Without({"keep_rollouts"})] = Field(default_factory=CheckpointConfig)
    evaluation: Annotated[EvaluationConfig, Without(_BY_COMMAND)] = Field(default_factory=EvaluationConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)

    def mistakes(self) -> Iterator[str]:
        """Yield a sentence for each contradiction between settings."""
        yield from super().mistakes()
        parts = [part.value for part in self.train.parts]
        if self.stage is StageName.reward_model:
            if Part.score not in self.train.parts:
                yield (
                    f"train.parts={parts}: the head of a reward model is new, so it must train; add score, e.g. "
                    f"train.parts=[{', '.join([*parts, 'score'])}]"
                )
        elif Part.score in self.train.parts:
            yield f"train.parts={parts}: only the reward_model stage has a score head; take score out"


class AlignRecipe(TrainingRecipe):
    """Trains parts of the model, usually the adapter alone, to give the responses that are given: supervised training
    by the mean over all tokens. It ends early when Pass@1 on data.validation reaches evaluation.stop_at_pass_at_1.

    Rows of data.train need messages and a response; images where there are any. Rows of data.validation need an answer
    and its answer_type, and facts where claims are judged.
    """

    stage: ClassVar[StageName | None] = StageName.align

    reward: Annotated[RewardConfig, Only({"claim_pattern"})] = Field(default_factory=RewardConfig)


class PairsRecipe(Recipe):
    """Builds preference pairs from the model's own responses to the prompts of data.train:
    generation.responses_per_prompt responses to each, scored as in GRPO (section reward), train.prompts_per_step
    prompts at a time. A right, well-formed response is chosen over a wrong one ("correctness") or over a right one of
    lower reward ("margin"); for a part of the prompts it is also chosen over its own first half continued without the
    image ("dropout_ntp"). Settings: section pairs.

    Rows of data.train need messages, an answer and its answer_type (without one, reward.functions decide: all pairs are
    by margin then); images and facts where there are any.

    The shards in run.output_dir are what data.train of the mpo stage reads: image, question, answer and facts as they
    were, with chosen, rejected, margin and source. pairs.json in that folder counts the pairs, and what made none by
    reason. Started again with the same settings after an interruption, the command goes on from the last finished
    round.

    Iterative MPO builds new pairs with the model of the round before:
      python -m megatron_r1v2 pairs pairs.yaml run.output_dir=pairs/1
      python -m megatron_r1v2 mpo   mpo.yaml   data.train=pairs/1 run.output_dir=runs/mpo-1
      python -m megatron_r1v2 pairs pairs.yaml run.output_dir=pairs/2 model.checkpoint=runs/mpo-1
      python -m megatron_r1v2 mpo   mpo.yaml   data.train=pairs/2 model.checkpoint=runs/mpo-1 run.output_dir=runs/mpo-2
    """

    stage: ClassVar[StageName | None] = StageName.pairs
    needed: ClassVar[tuple[str, ...]] = ("model.hf_path", "data.train")

    data: Annotated[DataConfig, Without({"validation", "shuffle"})] = Field(default_factory=DataConfig)
    reward: Annotated[RewardConfig, Without({"shuffle"})] = Field(default_factory=RewardConfig)
    reward_model: Annotated[RewardModelConfig, Without({"centring_weight"})] = Field(default_factory=RewardModelConfig)
    generation: Annotated[GenerationConfig, Without({"segment_tokens"})] = Field(default_factory=GenerationConfig)
    pairs: PairsConfig = Field(default_factory=PairsConfig)
    # The rows of a reward model in process are packed as in training.
    train: Annotated[TrainConfig, Only({"prompts_per_step", "packing", "tokens_per_microbatch"})] = Field(
        default_factory=TrainConfig
    )

    def mistakes(self) -> Iterator[str]:
        """Yield a sentence for each contradiction between settings."""
        yield from super().mistakes()
        if not isinstance(self.data.train, str):
            yield "data.train is a list: the pairs stage reads one folder, once; run it for each of them"
        if self.pairs.max_pairs_per_prompt and self.generation.responses_per_prompt < 2:
            yield (
                f"generation.responses_per_prompt={self.generation.responses_per_prompt} leaves nothing to compare; "
                "pairs need 2 or more, or set pairs.max_pairs_per_prompt=0 for DropoutNTP pairs alone"
            )
        if not self.pairs.max_pairs_per_prompt and not self.pairs.dropout_ntp_fraction:
            yield (
                "pairs.max_pairs_per_prompt and pairs.dropout_ntp_fraction are both 0: there would be no pairs; "
                "raise one"
            )


class MpoRecipe(TrainingRecipe):
    """Trains on preference pairs by mixed preference optimization: a preference term (DPO), a quality term (BCO) and
    the likelihood of the chosen response. Weights 1, 0, 0 are DPO; 0, 0, 1 supervised training. Log-probs under the
    model that it starts from are computed once, before the first step.

    Rows of data.train need messages, chosen and rejected; a margin where preference.min_margin is used; images where
    there are any. Rows of data.validation need an answer and its answer_type, and facts where claims are judged.
    """

    stage: ClassVar[StageName | None] = StageName.mpo

    reward: Annotated[RewardConfig, Only({"claim_pattern"})] = Field(default_factory=RewardConfig)
    preference: PreferenceConfig = Field(default_factory=PreferenceConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    hallucination: HallucinationConfig = Field(default_factory=HallucinationConfig)

    def mistakes(self) -> Iterator[str]:
        """Yield a sentence for each contradiction between settings."""
        yield from super().mistakes()
        preference, held = self.preference, self.hallucination
        if not (preference.preference_weight or preference.quality_weight or preference.generation_weight):
            yield (
                "preference.preference_weight, preference.quality_weight and preference.generation_weight are all 0: "
                "nothing to learn; raise one"
            )
        if held.target_rate and preference.min_margin >= held.max_margin:
            yield (
                f"hallucination.target_rate={held.target_rate} raises preference.min_margin, but it is "
                f"{preference.min_margin} and hallucination.max_margin={held.max_margin}; raise the latter, or set "
                "hallucination.target_rate=0"
            )


class RewardModelRecipe(TrainingRecipe):
    """Trains a reward model on preference pairs: the model with a scalar head in place of its vocabulary, by the
    Bradley-Terry loss. GRPO and the pairs command read its checkpoint as reward_model.checkpoint.

    Rows of data.train and data.validation need messages, chosen and rejected; images where there are any.
    """

    stage: ClassVar[StageName | None] = StageName.reward_model

    generation: Annotated[GenerationConfig, Only({"stop_tokens", "feature_cache_gib"})] = Field(
        default_factory=GenerationConfig
    )
    train: Annotated[TrainConfig, _ONE_UPDATE] = Field(
        default_factory=lambda: TrainConfig(parts=(Part.adapter, Part.score))
    )
    evaluation: Annotated[EvaluationConfig, Only({"every_steps", "prompts"})] = Field(default_factory=EvaluationConfig)
    reward_model: Annotated[RewardModelConfig, Only({"centring_weight"})] = Field(default_factory=RewardModelConfig)


class GrpoRecipe(TrainingRecipe):
    """Trains by GRPO: each step samples generation.responses_per_prompt responses to train.prompts_per_step prompts,
    scores them by rules and a reward model, and tops what a group can be learned from up from the Selective Sample
    Buffer.

    Rows of data.train need messages, an answer and its answer_type; images where there are any, and facts where claims
    are judged. So do rows of data.validation. Rows of data.train without an answer need reward.functions that judge
    responses, and buffer.effective_by=reward.
    """

    stage: ClassVar[StageName | None] = StageName.grpo

    generation: GenerationConfig = Field(default_factory=GenerationConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)
    reward_model: Annotated[RewardModelConfig, Without({"centring_weight"})] = Field(default_factory=RewardModelConfig)
    algorithm: AlgorithmConfig = Field(default_factory=AlgorithmConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    buffer: BufferConfig = Field(default_factory=BufferConfig)
    hallucination: Annotated[HallucinationConfig, Without({"max_margin"})] = Field(default_factory=HallucinationConfig)

    def mistakes(self) -> Iterator[str]:
        """Yield a sentence for each contradiction between settings."""
        yield from super().mistakes()
        yield from group_mistakes(self.generation, self.train)
        if self.generation.segment_tokens and self.algorithm.dynamic_sampling_rounds > 1:
            yield (
                f"generation.segment_tokens={self.generation.segment_tokens} with algorithm.dynamic_sampling_rounds="
                f"{self.algorithm.dynamic_sampling_rounds}: a round cannot count the effective groups that go on in "
                "the next step; set one of them to its default"
            )
        if 0 < self.generation.segment_tokens * self.buffer.max_age < self.generation.max_response_tokens:
            yield (
                f"generation.segment_tokens={self.generation.segment_tokens} x buffer.max_age={self.buffer.max_age} is "
                f"less than generation.max_response_tokens={self.generation.max_response_tokens}: the longest would be "
                "dropped before they end; raise one of the first two"
            )
        weights, held = self.reward.weights, self.hallucination
        if not any(weights.values()):
            names = ", ".join(name for name in type(self.reward).model_fields if name.endswith("_weight"))
            yield f"every weight in the reward section is 0 ({names}): nothing to learn; raise one"
        if held.target_rate and self.reward.model_weight == 0:
            yield (
                f"hallucination.target_rate={held.target_rate} lowers reward.model_weight, but it is 0; raise it, "
                "or set hallucination.target_rate=0"
            )


class EvaluateRecipe(Recipe):
    """Measures Pass@1 on evaluation.data: of model.checkpoint or model.hf_path in process; with
    evaluation.endpoint_url and evaluation.endpoint_model, of what a server serves. --name NAME (default: evaluation)
    names the result, which goes to evaluation-NAME.json in run.output_dir; the responses are beside it, and
    evaluation.html shows them. An evaluation that was interrupted goes on where it stopped; a result of another model,
    data set or sampling is not replaced. RECIPE.yaml may be that of any stage; without it the settings are the
    defaults.

    Rows of evaluation.data need messages, an answer and its answer_type; images where there are any, and facts where
    claims are judged.
    """

    needed: ClassVar[tuple[str, ...]] = ("model.hf_path", "evaluation.data")

    data: Annotated[DataConfig, Without({"train", "validation", "shuffle"})] = Field(default_factory=DataConfig)
    generation: Annotated[GenerationConfig, Without({"responses_per_prompt", "segment_tokens", "temperature"})] = Field(
        default_factory=GenerationConfig
    )
    reward: Annotated[RewardConfig, Without({"model_weight", "model_centre", "model_scale", "shuffle"})] = Field(
        default_factory=RewardConfig
    )
    evaluation: Annotated[EvaluationConfig, Without({"every_steps", "stop_at_pass_at_1"})] = Field(
        default_factory=EvaluationConfig
    )


class ServeRecipe(Recipe):
    """Serves a model."""

    run: Annotated[RunConfig, Only({"stage", "seed", "deterministic"})] = Field(default_factory=RunConfig)
    data: Annotated[DataConfig, Only({"max_prompt_tokens", "max_tiles", "too_long"})] = Field(
        default_factory=DataConfig
    )
    generation: Annotated[GenerationConfig, _NO_GROUPS] = Field(default_factory=GenerationConfig)


STAGES: Mapping[StageName, type[TrainingRecipe] | type[PairsRecipe]] = {
    StageName.align: AlignRecipe,
    StageName.pairs: PairsRecipe,
    StageName.mpo: MpoRecipe,
    StageName.reward_model: RewardModelRecipe,
    StageName.grpo: GrpoRecipe,
}
"""The recipe of each stage."""


@cache
def every_section() -> dict[str, type[Section]]:
    """Return the classes of all sections that any stage reads, by name."""
    return {name: section for recipe in STAGES.values() for name, section in recipe.sections().items()}


def stages_that_read(section: str, key: str = "") -> list[str]:
    """Return the names of the stages and commands whose recipes have a section, or read one of its settings."""
    if not key:
        return [stage.value for stage, recipe in STAGES.items() if section in recipe.sections()]
    kinds = [*STAGES.values(), EvaluateRecipe]
    return [kind.title() for kind in kinds if key in kind.settings().get(section, ())]
