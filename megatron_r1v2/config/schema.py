"""The sections of a recipe: every setting with its default, its bounds, and its meaning below it.

Which sections a stage reads is in `config/recipes.py`. Megatron's own sizes are derived from the model's HF
configuration; `model.transformer_config` passes anything else through to megatron-core verbatim.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field

from megatron_r1v2.config.choices import (
    Fp8,
    Layers,
    LossAggregation,
    Packing,
    Part,
    Precision,
    Recompute,
    ScoreEndpoint,
    StageName,
    WandbMode,
)


class Section(BaseModel):
    """Settings that belong together: immutable, and checked when they are made.

    Strict: 1 is no text and true is no number. Choices and lists, which YAML has as text and lists, are `strict=False`.
    """

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, defer_build=True
    )

    def changed(self, **settings: object) -> Self:
        """Return a checked copy in which some settings are others.

        Raises:
            pydantic.ValidationError: a value is not accepted.
        """
        return type(self)(**{**dict(self), **settings})


class RunConfig(Section):
    """What this run is called and where it writes."""

    stage: StageName | None = Field(None, strict=False)
    """What the recipe is for; each recipe says it."""
    name: str = Field("r1v2", pattern=r"\S")
    """Shown in the report and in wandb."""
    output_dir: str = Field("runs/r1v2", pattern=r"\S")
    """Everything the run writes goes below this folder."""
    seed: int = Field(1234, ge=0, le=2**31 - 1)
    """Seeds data order, sampling and buffer draws."""


class ModelConfig(Section):
    """Which weights to start from and how to compute with them."""

    hf_path: str = ""
    """Folder of the whole model in the layout of transformers' InternVL (see checkpoint_tools/reassemble.py)."""
    checkpoint: str = ""
    """A checkpoint folder of an earlier stage to take the weights from; empty: the weights in `hf_path`."""
    layers: Layers = Field(Layers.local, strict=False)
    """local: torch and megatron-core only; te: TransformerEngine for the language model (GPU)."""
    precision: Precision = Field(Precision.bf16, strict=False)
    """fp32 or bf16."""
    fp8: Fp8 = Field(Fp8.none, strict=False)
    """8-bit matrix products of the language model, all layers but the first and the last; needs layers=te and a Hopper
    GPU. tensorwise: one scale a tensor; blockwise: one for each 128 values (CUDA 12.9)."""
    fp8_weights: bool = False
    """Keep the weights of a frozen language model in 8 bits too: half the memory."""
    transformer_config: dict[str, object] = Field(default_factory=dict)
    """Passed to megatron-core's TransformerConfig of the language model as it stands."""


class ParallelConfig(Section):
    """How the model is split over processes; data parallelism takes the rest of the world size."""

    tensor: int = Field(1, ge=1)
    """Tensor-parallel ranks."""
    pipeline: int = Field(1, ge=1)
    """Pipeline stages."""
    sequence: bool = False
    """Sequence parallelism of the language model; needs tensor > 1."""
    first_stage_layers: int = Field(0, ge=0)
    """Language layers on the first stage, which also has the vision tower; 0: even split."""
    timeout_minutes: float = Field(60.0, gt=0)
    """How long a collective may wait before the run is ended."""


class DataConfig(Section):
    """Where prompts come from."""

    train: str = ""
    """Folder of WebDataset shards made by `r1v2 prepare`."""
    validation: str = ""
    """The same, for evaluation during training; empty: none."""
    max_prompt_tokens: int = Field(4096, ge=1)
    """A longer prompt is an error naming its key."""
    max_tiles: int = Field(12, ge=1)
    """Tiles an image is cut into at most, not counting the thumbnail."""
    max_corrupt_fraction: float = Field(0.01, ge=0, le=1)
    """Corrupt samples are skipped and counted; the run stops when they are more than this part of all read."""
    shuffle: bool = True
    """Draw a new order of the whole data set every epoch; false keeps the order of the shards."""


class GenerationConfig(Section):
    """How responses are sampled."""

    responses_per_prompt: int = Field(8, ge=1)
    """N of GRPO."""
    max_response_tokens: int = Field(8192, ge=1)
    """A response that reaches this is cut and marked "length"."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits; training uses the same."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus; GRPO refuses anything below 1."""
    stop_tokens: tuple[Annotated[str, Field(min_length=1)], ...] = Field(("<|im_end|>",), strict=False, min_length=1)
    """Tokens, as text, that end a response."""
    kv_cache_gib: float = Field(20.0, gt=0)
    """Memory for keys and values of a generation phase, given back afterwards."""
    max_requests: int = Field(256, ge=1)
    """Responses in flight at once on one model replica."""
    max_tokens_per_step: int = Field(8192, ge=1)
    """Tokens one engine step may process: longer prefills are cut into chunks."""
    feature_cache_gib: float = Field(16.0, ge=0)
    """Image features kept for a step; what does not fit is computed again."""
    cuda_graphs: bool = False
    """Replay captured graphs in steps that only decode, instead of launching their kernels one by one; needs CUDA, and
    NCCL where tensor > 1; without flash-attn a graph attends over the longest sequence there may be. Captured anew in
    each generation phase, so no graph outlives an update."""


class RewardConfig(Section):
    """How a response is scored: total = sum of weight x part, each part in [0, 1] (`rewards/parts.py`).

    A part whose weight is 0 is not computed, but for answer and format. One that does not apply to a prompt hands its
    weight to the others.
    """

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
    numeric_tolerance: float = Field(1e-6, ge=0, le=1)
    """Numeric answers may differ by this part of the right one; whole numbers may not differ from whole numbers."""
    claim_pattern: str = ""
    """Regular expression with groups `name` and `value` that finds visual claims; empty: none are looked for."""
    steps_wanted: int = Field(3, ge=1)
    """Distinct steps (lines, sentences, clauses) of a reasoning that is complete; fewer get their share."""
    steps_conclusion: int = Field(2, ge=1)
    """The boxed answer must stand in one of the last so many steps."""
    repetition_tokens: int = Field(8, ge=1)
    """So many tokens in a row that have been there before are a repetition."""
    overlong_buffer_tokens: int = Field(1024, ge=0)
    """The overlong part falls from 1 to 0 over the last so many of generation.max_response_tokens; 0: a step."""
    model_centre: float = Field(-3.5, ge=-1000, le=1000)
    """The raw score of the reward model that counts 1/2; -3.5 and 4 spread the -15 to 8 of Skywork-VL-Reward."""
    model_scale: float = Field(4.0, gt=0)
    """Raw score above the centre that counts 0.73; smaller: a steeper logistic."""
    verifier_workers: int = Field(2, ge=1)
    """Processes that check answers, on each data-parallel rank."""
    verifier_timeout_seconds: float = Field(5.0, gt=0)
    """A check that takes longer scores 0 and is counted."""
    shuffle: bool = False
    """Control experiment: rewards are dealt to the wrong responses."""

    @property
    def weights(self) -> dict[str, float]:
        """Return the weight of each part by its name."""
        return {name.removesuffix("_weight"): weight for name, weight in self if name.endswith("_weight")}


class RewardModelConfig(Section):
    """Where the scores for `reward.model_weight` come from, and how the reward_model stage trains."""

    checkpoint: str = ""
    """A checkpoint of the reward_model stage: the model is loaded beside the policy, in the same layout."""
    hf_path: str = ""
    """The model that the checkpoint was made from; empty: `model.hf_path`. Its tokenizer must be the policy's."""
    url: str = ""
    """A server that scores, e.g. http://127.0.0.1:8001 (vLLM, or `r1v2 serve-reward-model`)."""
    endpoint: ScoreEndpoint = Field(ScoreEndpoint.pooling, strict=False)
    """What is asked below `url`: pooling or classify, both as vLLM has them, with chat messages."""
    served_name: str = ""
    """`model` in the requests; empty: left out."""
    api_key_variable: str = ""
    """Environment variable that holds the server's API key; empty: none is sent."""
    timeout_seconds: float = Field(120.0, gt=0)
    """For one answer, from first to last byte."""
    attempts: int = Field(5, ge=1)
    """How often a request is made before the run ends; the pause doubles from one second to at most 30."""
    concurrency: int = Field(16, ge=1)
    """Requests under way at once, from each model replica."""
    centring_weight: float = Field(0.0, ge=0)
    """In training: weight of (chosen score + rejected score)^2, which holds scores near zero."""


class AlgorithmConfig(Section):
    """GRPO as in the paper's equation 8; the rest is off by default."""

    clip_low: float = Field(0.2, ge=0, le=1)
    """Ratios below 1 - clip_low are clipped."""
    clip_high: float = Field(0.2, ge=0)
    """Ratios above 1 + clip_high are clipped."""
    kl_coefficient: float = Field(0.0, ge=0)
    """Weight of the k3 estimate of KL(policy || reference)."""
    loss_aggregation: LossAggregation = Field(LossAggregation.sequence, strict=False)
    """sequence (eq. 8) or token."""
    advantage_epsilon: float = Field(1e-6, ge=0)
    """Added to the standard deviation of a group."""
    importance_cap: float = Field(0.0, ge=0)
    """Truncated importance sampling between engine and training forward: the largest weight; 0: off."""
    dynamic_sampling_rounds: int = Field(1, ge=1)
    """DAPO's dynamic sampling: while fewer than train.prompts_per_step groups are effective, as many further prompts
    are generated from, up to this many rounds in all; only effective groups are trained on. 1: off."""
    max_log_prob_difference: float = Field(0.5, gt=0)
    """The run stops when the mean |engine - training| log-prob exceeds this: of a step, or of the gate before it."""
    gate_tokens: int = Field(8, ge=0)
    """Before each generation phase the engine generates so many tokens to one prompt of each modality, and the training
    forward's log-probs of them are compared; 0: it is not done."""


class PreferenceConfig(Section):
    """MPO on pairs of a chosen and a rejected response; weights 1, 0, 0 are DPO, 0, 0, 1 supervised training."""

    preference_weight: float = Field(0.8, ge=0)
    """Weight of the preference term (DPO)."""
    quality_weight: float = Field(0.2, ge=0)
    """Weight of the quality term (BCO)."""
    generation_weight: float = Field(1.0, ge=0)
    """Weight of the generation term: the likelihood of the chosen response."""
    beta: float = Field(0.1, gt=0)
    """Reward of a response = beta x (its log-prob - that of the model the stage started from), summed over tokens."""
    generation_aggregation: LossAggregation = Field(LossAggregation.sequence, strict=False)
    """Of the generation term. sequence: the mean of per-response means (eq. 5); token: the mean over all tokens."""
    delta_momentum: float = Field(0.0, ge=0, lt=1)
    """delta of the quality term, from the rewards of earlier steps: 0: their mean; else the part of the old value that
    stays in a moving average."""
    min_margin: float = Field(0.0, ge=-1e6, le=1e6)
    """tau: pairs with a smaller margin (reward of chosen - rejected) are left out; one without a margin counts as 0."""
    reference_dir: str = ""
    """Where log-probs under the model that the stage starts from are kept, for all runs on the same pairs and model;
    empty: `run.output_dir`/reference."""


class BufferConfig(Section):
    """The Selective Sample Buffer."""

    enabled: bool = True
    """Keep effective responses and replay them; false: plain GRPO."""
    capacity: int = Field(4096, ge=1)
    """Responses kept over all ranks."""
    max_age: int = Field(20, ge=1)
    """Responses generated more than this many steps ago are dropped."""
    priority_exponent: float = Field(1.0, ge=0)
    """alpha in p ~ |advantage|^alpha."""
    target_effective_fraction: float = Field(0.6, ge=0, le=1)
    """Fresh effective responses are topped up to this part of the batch."""
    balance_modalities: bool = True
    """Draw image and text responses in the proportion in which fresh ones were generated."""


class TrainConfig(Section):
    """The update."""

    parts: tuple[Annotated[Part, Field(strict=False)], ...] = Field((Part.adapter,), strict=False)
    """Which parts train: any of vision, adapter, language; the reward_model stage also trains score, its new head."""
    steps: int = Field(100, ge=1)
    """Steps of this stage."""
    prompts_per_step: int = Field(64, ge=1)
    """Prompts over all data-parallel ranks (responses in the align stage, pairs in the mpo stage)."""
    updates_per_step: int = Field(1, ge=1)
    """Optimizer steps that share one generation phase."""
    micro_batch_size: int = Field(1, ge=1)
    """Rows in one forward pass, where rows are padded to the longest; the two of a pair always go together."""
    packing: Packing = Field(Packing.none, strict=False)
    """none: padded rows; first_fit_decreasing: rows laid one after the other without padding; nemo: the same by NeMo's
    packing strategy (extra `nemo`)."""
    tokens_per_microbatch: int = Field(0, ge=0)
    """Tokens in one forward pass, where rows are packed."""
    learning_rate: float = Field(1e-6, ge=0)
    """The highest rate, reached after the warm-up."""
    min_learning_rate: float = Field(0.0, ge=0)
    """Where the cosine decay ends."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the gradient average."""
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    """Decay of the squared-gradient average."""
    clip_grad: float = Field(1.0, ge=0)
    """Norm to which gradients are clipped; 0: not."""
    skip_above_grad_norm: float = Field(0.0, ge=0)
    """An update whose gradient norm (before clipping) is above this is skipped, as one that is not finite always is;
    0: no bound."""
    max_skipped_updates: int = Field(3, ge=1)
    """The run stops when so many updates in a row are skipped; what they were made of is in run.output_dir/skipped."""
    recompute: Recompute = Field(Recompute.none, strict=False)
    """What the backward pass computes again to save memory: none, selective (core attention) or full (whole layers)."""


class EvaluationConfig(Section):
    """Pass@1 over repeated sampled runs."""

    data: str = ""
    """Folder of shards for the evaluate command; during training `data.validation` is used."""
    every_steps: int = Field(0, ge=0)
    """During training, by the rules alone: no judge is asked; 0: never."""
    prompts: int = Field(0, ge=0)
    """How many prompts, from the start of the shards; 0: all."""
    runs: int = Field(5, ge=1)
    """Sampled responses per prompt."""
    temperature: float = Field(1.0, ge=0)
    """Divides the logits; 0: greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus; 1 samples from the whole distribution."""
    seed: int = Field(0, ge=0, le=2**31 - 1)
    """Evaluations with the same seed see the same random numbers."""
    stop_at_pass_at_1: float = Field(0.0, ge=0, le=1)
    """A stage ends when validation Pass@1 reaches this; 0: never."""
    save_every_prompts: int = Field(64, ge=1)
    """The evaluate command keeps responses on disk after so many prompts; an interrupted one goes on from there. Each
    time it waits for the longest response: more is faster."""
    endpoint_url: str = ""
    """Evaluate what an OpenAI-compatible server serves, such as http://127.0.0.1:8000/v1, instead of a checkpoint."""
    endpoint_model: str = ""
    """The model's name at the endpoint."""
    endpoint_key_variable: str = ""
    """Environment variable that holds the endpoint's API key; empty: no key is sent."""
    judge_url: str = ""
    """OpenAI-compatible server of a judge for answers that the rules find wrong; empty: the rules alone decide."""
    judge_model: str = ""
    """The judge's name at its endpoint."""
    judge_key_variable: str = ""
    """Environment variable that holds the API key of the judge's endpoint; empty: no key is sent."""
    judge_max_tokens: int = Field(8192, ge=1)
    """The judge's longest answer, its reasoning included; one that is cut off gives no verdict."""
    concurrency: int = Field(32, ge=1, le=1024)
    """Requests in flight at once at an endpoint."""
    timeout_seconds: float = Field(3600.0, gt=0)
    """An endpoint's whole answer must be there by then; long reasoning takes long."""
    attempts: int = Field(6, ge=1)
    """Times a request is sent while the server is busy, down or too slow, with pauses of 1, 2, 4 ... 30 seconds; then
    the evaluation ends, and the same command goes on with it."""


class LoggingConfig(Section):
    """Where metrics go; `run.output_dir`/metrics.jsonl is always written."""

    wandb: WandbMode = Field(WandbMode.disabled, strict=False)
    """disabled, offline (to be synchronised later) or online."""
    wandb_project: str = "megatron_r1v2"
    """The project that wandb files the run under."""
    tensorboard: bool = False
    """Also write TensorBoard events below `run.output_dir`."""
    sample_rollouts: int = Field(8, ge=0)
    """Rollouts per step kept for the report."""


class CheckpointConfig(Section):
    """Saving and resuming; checkpoints are below `run.output_dir`/checkpoints."""

    every_steps: int = Field(10, ge=0)
    """Also saved at the end of the stage, and when validation Pass@1 is the best so far; 0: only then. SIGTERM costs
    the step in progress and those since the newest checkpoint, less what `keep_rollouts` keeps of them: 1 where a
    checkpoint is small against a step."""
    keep_last: int = Field(2, ge=1)
    """Older checkpoints are deleted, but for the one with the best validation Pass@1 (evaluation.every_steps)."""
    asynchronous: bool = True
    """Write in the background."""
    resume: bool = True
    """Continue from the newest checkpoint in the folder that is not damaged, if there is one. At the same layout with
    the same bits; at another number of replicas, TP or PP with the same data order and buffer, equal to rounding."""
    keep_rollouts: bool = True
    """Keep the finished rollouts of a step on disk until a checkpoint holds the step: one that is interrupted does not
    generate them again. They are the same tokens; the engine's log-probs of the rest may differ in the last bits, since
    they are generated in smaller batches."""
    lead_seconds: float = Field(1200.0, ge=0)
    """SIGUSR1 comes so long before the end (--signal of the sbatch script): a step and a save must fit in."""
    grace_seconds: float = Field(25.0, ge=1)
    """After SIGTERM the step is abandoned, and the process ends within so many seconds."""


class HallucinationConfig(Section):
    """The calibrator: holds the rate of contradicted visual claims on `data.validation` below a target while training.

    A rate above the target, or too few responses with claims, pulls a brake: tau of MPO (`preference.min_margin`) goes
    up, the weight of the reward model in GRPO (`reward.model_weight`) goes down (`rl/calibration.py`).
    """

    target_rate: float = Field(0.0, ge=0, le=1)
    """The rate of contradicted claims to stay below; 0: off."""
    every_steps: int = Field(0, ge=0)
    """Steps from one measurement to the next; 0: at the evaluations of evaluation.every_steps alone."""
    min_coverage: float = Field(0.5, ge=0, le=1)
    """Fewer responses with claims than this are as bad as a rate above the target: silence is no cure."""
    slack: float = Field(0.2, ge=0, le=1)
    """The brake is let go only while the rate is below (1 - slack) x target_rate."""
    patience: int = Field(2, ge=1)
    """Measurements in a row that must be so before the brake is let go."""
    tighten: float = Field(0.5, ge=0, le=1)
    """Each violation pulls the brake by this part of what is left of it."""
    loosen: float = Field(0.05, ge=0, le=1)
    """Each calm measurement lets it go by this part of the whole."""
    max_margin: float = Field(1.0, ge=0)
    """tau when the brake is pulled all the way; without it tau is preference.min_margin."""
    min_model_weight: float = Field(0.0, ge=0)
    """Weight of the reward model when the brake is pulled all the way; without it it is reward.model_weight."""


class PairsConfig(Section):
    """How the pairs command makes preference pairs of the model's own responses to the prompts of `data.train`."""

    output: str = ""
    """Folder of preference shards to write; it must not exist yet."""
    prompts: int = Field(0, ge=0)
    """How many prompts, from the start of the shards; 0: all."""
    max_pairs_per_prompt: int = Field(4, ge=0)
    """Pairs of the responses to one prompt, a DropoutNTP pair not counted."""
    min_margin: float = Field(0.0, ge=0)
    """Total reward of the chosen response minus that of the rejected one: at least this, and always above 0."""
    reject_ill_formed: bool = False
    """Cut and ill-formed responses may be the rejected one (they are never chosen); false: they are left out."""
    dropout_ntp_fraction: float = Field(0.25, ge=0, le=1)
    """For this part of the prompts with an image and a response fit to be chosen there is one more pair: the rejected
    response is the first half of the chosen one, continued without the image."""
