"""The sections of a recipe: every setting with its default, its bounds, and its meaning below it.

The sections that each stage reads are in `config/recipes.py`. Megatron's own sizes are derived from the model's HF
configuration; `model.transformer_config` passes anything else through to megatron-core verbatim.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from annotated_types import Gt
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from megatron_r1v2.config.choices import (
    EffectiveBy,
    Fp8,
    Layers,
    LossAggregation,
    OnResume,
    Packing,
    Part,
    Precision,
    Recompute,
    StageName,
    TooLong,
    Tracker,
)


class Section(BaseModel):
    """Settings that belong together: immutable, and checked when they are made.

    Strict: a number is not taken for text, nor true for a number. Choices are text and tuples are lists in YAML, so
    their fields are `strict=False`.
    """

    on_resume: ClassVar[OnResume] = OnResume.free
    """Of the settings that are not annotated with another rule."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, defer_build=True
    )

    @classmethod
    def resume_rule(cls, setting: str) -> OnResume:
        """Return what happens to a run that is resumed with another value of a setting."""
        noted = (rule for rule in cls.model_fields[setting].metadata if isinstance(rule, OnResume))
        return next(noted, cls.on_resume)

    def changed(self, **settings: object) -> Self:
        """Return a checked copy in which some settings are others.

        Raises:
            pydantic.ValidationError: a value is not accepted.
        """
        return type(self)(**{**dict(self), **settings})


class RunConfig(Section):
    """The stage of the run and its folder."""

    stage: Annotated[StageName | None, OnResume.refused] = Field(None, strict=False)
    """The stage that the recipe is for; each recipe names it."""
    output_dir: str = Field("runs/r1v2", pattern=r"\S")
    """Everything the run writes goes below this folder, whose name is that of the run in the report and in wandb. The
    shards of the pairs stage are the folder itself, which must not exist yet."""
    seed: Annotated[int, OnResume.refused] = Field(1234, ge=0, le=2**31 - 1)
    """Seeds data order, sampling and buffer draws."""
    deterministic: bool = False
    """On a GPU: take the kernels that give the same bits each time, which are slower. Without it an interrupted run
    ends with other bits there; a CPU's are the same anyway. torch warns of an operation that has no such kernel."""

    @property
    def name(self) -> str:
        """Return the name of the run: that of its folder."""
        return Path(self.output_dir).name


class ModelConfig(Section):
    """The weights to start from, and the way to compute with them."""

    on_resume: ClassVar[OnResume] = OnResume.asked

    # A folder may have moved: the weights in it are compared instead (stages/resume.py).
    hf_path: Annotated[str, OnResume.free] = ""
    """Folder of the whole model in the layout of transformers' InternVL (see checkpoint_tools/reassemble.py); empty:
    that of the run of `checkpoint`."""
    checkpoint: Annotated[str, OnResume.free] = ""
    """A checkpoint folder of an earlier stage to take the weights from; empty: the weights in `hf_path`."""
    allow_random_parts: Annotated[bool, OnResume.free] = False
    """Start although a part of the model was drawn and never trained, which only the align stage does unasked."""
    layers: Annotated[Layers, OnResume.free] = Field(Layers.local, strict=False)
    """local: torch and megatron-core only; te: TransformerEngine for the language model (GPU)."""
    # The weights that a run began from have other bits in another precision, and so has its reference.
    precision: Annotated[Precision, OnResume.refused] = Field(Precision.bf16, strict=False)
    """fp32 or bf16."""
    fp8: Fp8 = Field(Fp8.none, strict=False)
    """8-bit matrix products of the language model, all layers but the first and the last; needs layers=te and a Hopper
    GPU. tensorwise: one scale a tensor; blockwise: one for each 128 values (CUDA 12.9)."""
    fp8_weights: Annotated[bool, OnResume.refused] = False
    """Keep the weights of a frozen language model in 8 bits too: half the memory."""
    transformer_config: dict[str, object] = Field(default_factory=dict)
    """Passed to megatron-core's TransformerConfig of the language model as it stands."""


class ParallelConfig(Section):
    """The split of the model over processes; data parallelism takes the rest of the world size."""

    tensor: int = Field(1, ge=1)
    """Tensor-parallel ranks."""
    pipeline: int = Field(1, ge=1)
    """Pipeline stages."""
    sequence: bool = False
    """Sequence parallelism of the language model; needs tensor > 1."""
    first_stage_layers: int = Field(0, ge=0)
    """Language layers on the first stage, which also has the vision tower; 0: even split."""
    timeout_minutes: float = Field(60.0, gt=0)
    """A collective that waits longer ends the run."""


class DataSource(Section):
    """One data set of a mixture."""

    path: str = Field(pattern=r"\S")
    """Folder of WebDataset shards made by `r1v2 prepare`."""
    weight: float = Field(1.0, gt=0, le=1e12)
    """Its share of the prompts is this over the sum of all weights."""


def _kind_of_train(value: object) -> str:
    return "mixture-tag" if isinstance(value, list | tuple) else "text-tag"


class DataConfig(Section):
    """The prompts and how they are read."""

    on_resume: ClassVar[OnResume] = OnResume.asked

    # The position in the data refuses other shards by itself, wherever they lie.
    train: Annotated[
        Annotated[str, Tag("text-tag")]
        | Annotated[tuple[Annotated[DataSource, Field(strict=False)], ...], Field(strict=False), Tag("mixture-tag")],
        Discriminator(_kind_of_train),
        OnResume.free,
    ] = ""
    """Folder of WebDataset shards made by `r1v2 prepare`; or several, each {path, weight}: every step has the prompts
    of each in the share of its weight, 1 if left out. Another mixture is another run."""
    validation: str = ""
    """The same, for evaluation during training; empty: none."""
    max_prompt_tokens: int = Field(4096, ge=1)
    """The longest prompt, image tokens included."""
    too_long: TooLong = Field(TooLong.error, strict=False)
    """A longer prompt, found before the first step: error names it and ends the run; skip leaves it out; fewer_tiles
    cuts its images into fewer tiles until it fits, and is an error where one tile each does not."""
    max_tiles: int = Field(12, ge=1)
    """Tiles an image is cut into at most, not counting the thumbnail."""
    max_corrupt_fraction: Annotated[float, OnResume.free] = Field(0.01, ge=0, le=1)
    """Corrupt samples are skipped and counted; the run stops when they are more than this part of all read."""
    shuffle: bool = True
    """Draw a new order of the whole data set every epoch; false keeps the order of the shards."""

    @property
    def sources(self) -> tuple[DataSource, ...]:
        """Return the data sets of `train`."""
        if isinstance(self.train, str):
            return (DataSource(path=self.train),) if self.train else ()
        return self.train

    @property
    def train_text(self) -> str:
        """Return `train` for people: a path, or each with its weight."""
        if isinstance(self.train, str):
            return self.train
        return ", ".join(f"{source.path} x {source.weight:g}" for source in self.train)


def _kind_of_value(value: object) -> str:
    return "auto-tag" if value == "auto" else "value-tag"


class GenerationConfig(Section):
    """The sampling of responses."""

    on_resume: ClassVar[OnResume] = OnResume.asked

    responses_per_prompt: int = Field(8, ge=1)
    """N of GRPO."""
    max_response_tokens: int = Field(8192, ge=1)
    """A response that reaches this is cut and marked "length"."""
    segment_tokens: int = Field(0, ge=0)
    """A response generates at most so many tokens in a step and goes on in the next, so that no step waits for the
    longest; groups are trained when they are complete, and dropped when too old for the buffer. 0: to its end."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits; the training of GRPO uses the same."""
    stop_tokens: tuple[Annotated[str, Field(min_length=1)], ...] = Field((), strict=False)
    """Tokens, as text, that end a response beside those of the model's generation_config.json; the first also ends the
    responses of SFT and of pairs."""
    kv_cache_gib: Annotated[
        Annotated[float, Gt(0), Tag("value-tag")] | Annotated[Literal["auto"], Tag("auto-tag")],
        Discriminator(_kind_of_value),
        OnResume.free,
    ] = 20.0
    """Memory for keys and values of a generation phase, given back afterwards. auto: what is free on the fullest GPU of
    the replica when a phase begins, less what images, a step and the allocator's gaps take; 1 GiB on a CPU."""
    max_requests: Annotated[int, OnResume.free] = Field(256, ge=1)
    """Responses in flight at once on one model replica."""
    max_tokens_per_step: Annotated[int, OnResume.free] = Field(8192, ge=1)
    """Tokens one engine step may process: longer prefills are cut into chunks."""
    feature_cache_gib: Annotated[float, OnResume.free] = Field(16.0, ge=0)
    """Image features kept for a step; what does not fit is computed again."""
    cuda_graphs: Annotated[
        Annotated[bool, Tag("value-tag")] | Annotated[Literal["auto"], Tag("auto-tag")],
        Discriminator(_kind_of_value),
        OnResume.free,
    ] = "auto"
    """Replay captured graphs in steps that only decode, instead of launching their kernels one by one. auto: where they
    hold, which the log says: CUDA with flash-attn, and NCCL where tensor > 1. true: refuse to run without. Captured
    once in each generation phase, so no graph outlives an update; never for the gate."""


class RewardFunction(Section):
    """A Python function that scores responses (docs/rewards.md)."""

    path: str
    """Its file."""
    name: str
    """Its name in the file, and that of its part of the reward."""
    weight: float = Field(1.0, ge=0)
    """At 0 it is called and shown all the same."""


class RewardConfig(Section):
    """The score of a response: total = sum of weight x part, each part in [0, 1] (`rewards/parts.py`).

    A part whose weight is 0 is not computed, but for answer and format. One that does not apply to a prompt hands its
    weight to the others.
    """

    on_resume: ClassVar[OnResume] = OnResume.asked

    answer_weight: float = Field(1.0, ge=0)
    """Is the last boxed answer right?"""
    format_weight: float = Field(0.2, ge=0)
    """<think>...</think> and then exactly one boxed answer."""
    consistency_weight: float = Field(0.0, ge=0)
    """Do the visual claims agree with the prompt's facts? A response without claims gets 0; needs claim_pattern."""
    steps_weight: float = Field(0.0, ge=0)
    """Does the reasoning go in steps that lead to the boxed answer?"""
    repetition_weight: float = Field(0.0, ge=0)
    """1 without repetition, towards 0 for a response that goes round in circles."""
    overlong_weight: float = Field(0.0, ge=0)
    """1 for a response that ends in time, 0 for one that is cut."""
    model_weight: float = Field(0.0, ge=0)
    """The score of a reward model, squashed."""
    claim_pattern: str = ""
    """Regular expression with groups `name` and `value` that finds visual claims; empty: none are looked for."""
    functions: tuple[Annotated[RewardFunction, Field(strict=False)], ...] = Field((), strict=False)
    """Functions of your own, each {path, name, weight}: a Python file, the function in it, which returns a number from
    0 to 1 or a dict of such numbers, and its weight, 1 if left out."""
    model_centre: float = Field(-3.5, ge=-1000, le=1000)
    """The raw score of the reward model that counts 1/2; -3.5 and 4 spread the -15 to 8 of Skywork-VL-Reward."""
    model_scale: float = Field(4.0, gt=0)
    """Raw score above the centre that counts 0.73; smaller: a steeper logistic."""
    shuffle: bool = False
    """Control experiment: rewards are dealt to the wrong responses."""

    @property
    def weights(self) -> dict[str, float]:
        """Return the weight of each part by its name, own functions included."""
        ours = {name.removesuffix("_weight"): weight for name, weight in self if name.endswith("_weight")}
        return ours | {function.name: function.weight for function in self.functions}


class RewardModelConfig(Section):
    """The source of the scores that `reward.model_weight` weighs, and the training of the reward_model stage."""

    on_resume: ClassVar[OnResume] = OnResume.asked

    checkpoint: str = ""
    """A checkpoint of the reward_model stage: the model is loaded beside the policy, in the same layout. Its
    tokenizer must be the policy's."""
    url: str = ""
    """A server that scores chat messages, e.g. http://127.0.0.1:8001/pooling or /classify, both as vLLM has them (vLLM,
    or `r1v2 serve-reward-model`); pooling where neither is named. Its API key, if it has one, is read from the
    environment variable R1V2_REWARD_MODEL_API_KEY."""
    centring_weight: float = Field(0.0, ge=0)
    """In training: weight of (chosen score + rejected score)^2, which holds scores near zero."""

    @property
    def lies_beside_policy(self) -> bool:
        """Return whether the model is loaded into the process of the policy."""
        # A valid recipe names one source where scores count, and none where they do not.
        return bool(self.checkpoint)


class LossConfig(Section):
    """The way from token losses to one number."""

    on_resume: ClassVar[OnResume] = OnResume.asked

    aggregation: LossAggregation = Field(LossAggregation.sequence, strict=False)
    """sequence: the mean of per-response means, equation 8 of GRPO and equation 5 of the generation term of MPO; token:
    the mean over all tokens."""


class AlgorithmConfig(Section):
    """GRPO as in the paper's equation 8; the rest is off by default."""

    on_resume: ClassVar[OnResume] = OnResume.asked

    clip_low: float = Field(0.2, ge=0, le=1)
    """Ratios below 1 - clip_low are clipped."""
    clip_high: float = Field(0.2, ge=0)
    """Ratios above 1 + clip_high are clipped."""
    kl_coefficient: float = Field(0.0, ge=0)
    """Weight of the k3 estimate of KL(policy || reference)."""
    importance_cap: float = Field(0.0, ge=0)
    """Truncated importance sampling between engine and training forward: the largest weight; 0: off."""
    dynamic_sampling_rounds: int = Field(1, ge=1)
    """DAPO's dynamic sampling: while fewer than train.prompts_per_step groups are effective, as many further prompts
    are generated from, up to this many rounds in all or as the data has; only effective groups are trained on. 1:
    off."""
    gate_every: Annotated[int, OnResume.free] = Field(10, ge=1)
    """The gate compares engine and training forward on a few tokens before a generation phase: at the start of a run,
    also of a resumed one, when the calibrator has moved the reward, and every so many steps."""
    max_log_prob_difference: Annotated[float, OnResume.free] = Field(0.5, gt=0)
    """The run stops when the mean |engine - training| log-prob exceeds this: of a step, or of the gate before it."""


class PreferenceConfig(Section):
    """MPO on pairs of a chosen and a rejected response; weights 1, 0, 0 are DPO, 0, 0, 1 supervised training."""

    on_resume: ClassVar[OnResume] = OnResume.asked

    preference_weight: float = Field(0.8, ge=0)
    """Weight of the preference term (DPO)."""
    quality_weight: float = Field(0.2, ge=0)
    """Weight of the quality term (BCO)."""
    generation_weight: float = Field(1.0, ge=0)
    """Weight of the generation term: the likelihood of the chosen response."""
    beta: float = Field(0.1, gt=0)
    """Reward of a response = beta x (its log-prob - that of the model the stage started from), summed over tokens."""
    min_margin: float = Field(0.0, ge=-1e6, le=1e6)
    """tau: pairs with a smaller margin (reward of chosen - rejected) are left out; one without a margin counts as 0."""
    reference_dir: Annotated[str, OnResume.free] = ""
    """Folder for the log-probs under the model that the stage starts from, for all runs on the same pairs and model;
    empty: `run.output_dir`/reference."""


class BufferConfig(Section):
    """The Selective Sample Buffer."""

    on_resume: ClassVar[OnResume] = OnResume.asked

    capacity: int = Field(4096, ge=0)
    """Effective responses kept over all ranks, and replayed; 0: none, plain GRPO."""
    max_age: int = Field(20, ge=1)
    """Responses generated more than this many steps ago are dropped."""
    effective_by: EffectiveBy = Field(EffectiveBy.answer, strict=False)
    """A group is effective when some of its answers are right and some wrong (answer), or when its total rewards differ
    by more than 0.01 (reward), for prompts without answers. Dynamic sampling counts groups in the same way."""
    target_effective_fraction: float = Field(0.6, ge=0, le=1)
    """Fresh effective responses are topped up to this part of the batch."""
    priority_exponent: float = Field(1.0, ge=0)
    """alpha: responses are drawn with p ~ |advantage|^alpha; 0: all alike."""


class TrainConfig(Section):
    """The update."""

    parts: Annotated[tuple[Annotated[Part, Field(strict=False)], ...], OnResume.refused] = Field(
        (Part.adapter,), strict=False
    )
    """The parts that train: any of vision, adapter, language; in the reward_model stage also score, its new head."""
    steps: Annotated[int, OnResume.larger] = Field(100, ge=1)
    """Steps of this stage."""
    prompts_per_step: Annotated[int, OnResume.asked] = Field(64, ge=1)
    """Prompts over all data-parallel ranks (responses in the align stage, pairs in the mpo stage)."""
    updates_per_step: Annotated[int, OnResume.refused] = Field(1, ge=1)
    """Optimizer steps that share one generation phase; the responses to a prompt are trained in the same one."""
    packing: Packing = Field(Packing.shared, strict=False)
    """shared: a prompt once, followed by its responses; first_fit_decreasing: a row a response, one after the other
    without padding; nemo: the same by NeMo's packing strategy (extra `nemo`)."""
    tokens_per_microbatch: int = Field(8192, ge=1)
    """Tokens in one forward pass; a longer response, or pair of them, has one for itself."""
    learning_rate: Annotated[float, OnResume.refused] = Field(1e-6, ge=0)
    """The highest rate, reached after the warm-up."""
    min_learning_rate: Annotated[float, OnResume.refused] = Field(0.0, ge=0)
    """The rate at the end of the cosine decay."""
    warmup_steps: Annotated[int, OnResume.refused] = Field(0, ge=0)
    """Steps of linear warm-up."""
    weight_decay: Annotated[float, OnResume.refused] = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    adam_beta2: Annotated[float, OnResume.refused] = Field(0.95, ge=0, lt=1)
    """Decay of AdamW's squared-gradient average; that of the gradient average is 0.9."""
    clip_grad: Annotated[float, OnResume.asked] = Field(1.0, ge=0)
    """Norm to which gradients are clipped; 0: not."""
    skip_above_grad_norm: Annotated[float, OnResume.asked] = Field(0.0, ge=0)
    """An update whose gradient norm (before clipping) is above this is skipped, as one that is not finite always is;
    0: no bound."""
    recompute: Recompute = Field(Recompute.none, strict=False)
    """Activations that the backward pass computes again: none, selective (core attention) or full (whole layers)."""


class EvaluationConfig(Section):
    """Pass@1 over repeated sampled runs."""

    data: str = ""
    """Folder of shards for the evaluate command; during training `data.validation` is used."""
    every_steps: int = Field(0, ge=0)
    """During training, by the rules alone: no judge is asked; 0: never."""
    prompts: Annotated[int, OnResume.asked] = Field(0, ge=0)
    """So many prompts, from the start of the shards; 0: all."""
    runs: int = Field(5, ge=1)
    """Sampled responses per prompt."""
    temperature: Annotated[float, OnResume.asked] = Field(1.0, ge=0)
    """Divides the logits; 0: greedy."""
    top_p: Annotated[float, OnResume.asked] = Field(1.0, gt=0, le=1)
    """Nucleus; 1 samples from the whole distribution."""
    stop_at_pass_at_1: float = Field(0.0, ge=0, le=1)
    """A stage ends when validation Pass@1 reaches this; 0: never."""
    endpoint_url: str = ""
    """Evaluate what an OpenAI-compatible server serves, such as http://127.0.0.1:8000/v1, instead of a checkpoint. Its
    API key, if it has one, is read from the environment variable R1V2_ENDPOINT_API_KEY."""
    endpoint_model: str = ""
    """The model's name at the endpoint."""
    judge_url: str = ""
    """OpenAI-compatible server of a judge for answers that the rules find wrong; empty: the rules alone decide.
    Its API key, if it has one, is read from the environment variable R1V2_JUDGE_API_KEY."""
    judge_model: str = ""
    """The judge's name at its endpoint."""


class LoggingConfig(Section):
    """The places for metrics; `run.output_dir`/metrics.jsonl is always written."""

    trackers: tuple[Annotated[Tracker, Field(strict=False)], ...] = Field((), strict=False)
    """Further places: wandb, which gets the whole recipe and a table of sample rollouts every ten steps;
    wandb_offline, to be synchronised later; tensorboard, below `run.output_dir`."""
    wandb_project: str = ""
    """Its project; empty: that of the environment variable WANDB_PROJECT, or megatron_r1v2."""
    wandb_entity: str = ""
    """Its user or team; empty: WANDB_ENTITY, or the user's own."""
    wandb_group: str = ""
    """The group of runs that this one belongs to; empty: WANDB_RUN_GROUP."""
    wandb_tags: tuple[Annotated[str, Field(min_length=1)], ...] = Field((), strict=False)
    """Tags of the run; empty: WANDB_TAGS."""


class CheckpointConfig(Section):
    """Saving and resuming; checkpoints are below `run.output_dir`/checkpoints."""

    every_steps: int = Field(10, ge=0)
    """Also saved at the end of the stage, and when validation Pass@1 is the best so far; 0: only then. SIGTERM costs
    the step in progress, less what `keep_rollouts` keeps of it, and those since the newest checkpoint where saving them
    takes more than `grace_seconds`; a lost node always costs both: 1 where a checkpoint is small against a step."""
    keep_last: int = Field(2, ge=1)
    """Older checkpoints are deleted, but for the one with the best validation Pass@1 (evaluation.every_steps)."""
    asynchronous: bool = True
    """Write in the background."""
    accept_changes: bool = False
    """Go on from a checkpoint although settings differ that change what the curves mean (rewards, sampling, lengths,
    data, ...). The differences are listed in the log and the report, and the buffer is emptied."""
    resume_step: int = Field(0, ge=0)
    """Go on from the checkpoint of this step; later ones are put aside. 0: from the newest."""
    keep_rollouts: bool = True
    """Keep the finished rollouts of a step on disk until a checkpoint holds the step: one that is interrupted does not
    generate them again. They are the same tokens; the engine's log-probs of the rest may differ in the last bits, since
    they are generated in smaller batches."""
    lead_seconds: float = Field(1200.0, ge=0)
    """SIGUSR1 comes so long before the end (--signal of the sbatch script): a step and a save must fit in."""
    grace_seconds: float = Field(25.0, ge=1)
    """After SIGTERM, or a second Ctrl-C, the step is abandoned, and the process ends within so many seconds; the first
    Ctrl-C finishes the step, saves and ends, as SIGUSR1 does. torchrun waits 30 s for that, or its
    --shutdown-timeout."""


class HallucinationConfig(Section):
    """The calibrator: holds the rate of contradicted visual claims on `data.validation` below a target while training.

    A rate above the target, or too few responses with claims, pulls a brake: tau of MPO (`preference.min_margin`) goes
    up, the weight of the reward model in GRPO (`reward.model_weight`) goes down (`rl/calibration.py`).
    """

    on_resume: ClassVar[OnResume] = OnResume.asked

    target_rate: float = Field(0.0, ge=0, le=1)
    """The rate of contradicted claims to stay below; 0: off."""
    max_margin: float = Field(1.0, ge=0)
    """tau when the brake is pulled all the way; without it tau is preference.min_margin."""


class PairsConfig(Section):
    """The choice of preference pairs among the model's own responses to the prompts of `data.train`."""

    on_resume: ClassVar[OnResume] = OnResume.refused

    max_pairs_per_prompt: int = Field(4, ge=0)
    """Pairs of the responses to one prompt, a DropoutNTP pair not counted."""
    dropout_ntp_fraction: float = Field(0.25, ge=0, le=1)
    """For this part of the prompts with an image and a response fit to be chosen there is one more pair: the rejected
    response is the first half of the chosen one, continued without the image."""
