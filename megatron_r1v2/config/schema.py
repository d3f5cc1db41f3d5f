"""Every setting of a run, with its default, its meaning and what is accepted.

One YAML file holds a run; its sections are the classes below (`RunRecipe`). Megatron's own sizes are derived from the
model's HF configuration; `model.transformer_config` passes anything else through to megatron-core verbatim.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from megatron_r1v2.config.checkpoint import CheckpointConfig
from megatron_r1v2.config.choices import (
    Fp8,
    Layers,
    LossAggregation,
    Packing,
    Part,
    Precision,
    Recompute,
    ScoreEndpoint,
    WandbMode,
)
from megatron_r1v2.config.hallucination import HallucinationConfig
from megatron_r1v2.config.pairs import PairsConfig


@dataclass
class RunConfig:
    """What this run is called and where it writes."""

    name: str = "r1v2"
    """Shown in the report and in wandb."""
    output_dir: str = "runs/r1v2"
    """Everything the run writes goes below this folder."""
    seed: int = 1234
    """Seeds data order, sampling and buffer draws."""


@dataclass
class ModelConfig:
    """Which weights to start from and how to compute with them."""

    hf_path: str = ""
    """Folder of the whole model in the layout of transformers' InternVL (see checkpoint_tools/reassemble.py)."""
    checkpoint: str = ""
    """A checkpoint folder of an earlier stage to take the weights from; empty: the weights in `hf_path`."""
    layers: Layers = Layers.local
    """local: torch and megatron-core only; te: TransformerEngine for the language model (GPU)."""
    precision: Precision = Precision.bf16
    """fp32 or bf16."""
    fp8: Fp8 = Fp8.none
    """8-bit matrix products of the language model, all layers but the first and the last; needs layers=te and a Hopper
    GPU. tensorwise: one scale a tensor; blockwise: one for each 128 values (CUDA 12.9)."""
    fp8_weights: bool = False
    """Keep the weights of a frozen language model in 8 bits too: half the memory."""
    transformer_config: dict[str, Any] = field(default_factory=dict)
    """Passed to megatron-core's TransformerConfig of the language model as it stands."""


@dataclass
class ParallelConfig:
    """How the model is split over processes; data parallelism takes the rest of the world size."""

    tensor: int = 1
    """Tensor-parallel ranks."""
    pipeline: int = 1
    """Pipeline stages."""
    sequence: bool = False
    """Sequence parallelism of the language model; needs tensor > 1."""
    first_stage_layers: int = 0
    """Language layers on the first stage, which also has the vision tower; 0: even split."""
    timeout_minutes: float = 60.0
    """How long a collective may wait before the run is ended."""


@dataclass
class DataConfig:
    """Where prompts come from."""

    train: str = ""
    """Folder of WebDataset shards made by `r1v2 prepare`."""
    validation: str = ""
    """The same, for evaluation during training; empty: none."""
    max_prompt_tokens: int = 4096
    """A longer prompt is an error naming its key."""
    max_tiles: int = 12
    """Tiles an image is cut into at most, not counting the thumbnail."""
    max_corrupt_fraction: float = 0.01
    """Corrupt samples are skipped and counted; the run stops when they are more than this part of all read."""
    shuffle_buffer: int = 1000
    """0 keeps the order of the shards; anything else draws a new order of the whole data set every epoch."""


@dataclass
class GenerationConfig:
    """How responses are sampled."""

    responses_per_prompt: int = 8
    """N of GRPO."""
    max_response_tokens: int = 8192
    """A response that reaches this is cut and marked "length"."""
    temperature: float = 1.0
    """Divides the logits; training uses the same."""
    top_p: float = 1.0
    """Nucleus; GRPO refuses anything below 1."""
    stop_tokens: list[str] = field(default_factory=lambda: ["<|im_end|>"])
    """Tokens, as text, that end a response."""
    kv_cache_gib: float = 20.0
    """Memory for keys and values of a generation phase, given back afterwards."""
    max_requests: int = 256
    """Responses in flight at once on one model replica."""
    max_tokens_per_step: int = 8192
    """Tokens one engine step may process: longer prefills are cut into chunks."""
    feature_cache_gib: float = 16.0
    """Image features kept for a step; what does not fit is computed again."""
    cuda_graphs: bool = False
    """Replay captured graphs in steps that only decode, instead of launching their kernels one by one; needs CUDA, and
    NCCL where tensor > 1; without flash-attn a graph attends over the longest sequence there may be. Captured anew in
    each generation phase, so no graph outlives an update."""


@dataclass
class RewardConfig:
    """How a response is scored: total = sum of weight x part, each part in [0, 1] (`rewards/parts.py`).

    A part whose weight is 0 is not computed, but for answer and format. One that does not apply to a prompt hands its
    weight to the others.
    """

    answer_weight: float = 1.0
    """Is the last boxed answer right?"""
    format_weight: float = 0.2
    """<think>...</think> and then exactly one boxed answer."""
    consistency_weight: float = 0.0
    """Do the visual claims agree with the prompt's facts? A response without claims gets 0; needs claim_pattern."""
    steps_weight: float = 0.0
    """Does the reasoning go in steps that lead to the boxed answer?"""
    repetition_weight: float = 0.0
    """1 without repetition, towards 0 for a response that goes round in circles."""
    overlong_weight: float = 0.0
    """1 for a response that ends in time, 0 for one that is cut."""
    model_weight: float = 0.0
    """The score of a reward model, squashed."""
    numeric_tolerance: float = 1e-6
    """Numeric answers may differ by this part of the right one; whole numbers may not differ from whole numbers."""
    claim_pattern: str = ""
    """Regular expression with groups `name` and `value` that finds visual claims; empty: none are looked for."""
    steps_wanted: int = 3
    """Distinct steps (lines, sentences, clauses) of a reasoning that is complete; fewer get their share."""
    steps_conclusion: int = 2
    """The boxed answer must stand in one of the last so many steps."""
    repetition_tokens: int = 8
    """So many tokens in a row that have been there before are a repetition."""
    overlong_buffer_tokens: int = 1024
    """The overlong part falls from 1 to 0 over the last so many of generation.max_response_tokens; 0: a step."""
    model_centre: float = -3.5
    """The raw score of the reward model that counts 1/2; -3.5 and 4 spread the -15 to 8 of Skywork-VL-Reward."""
    model_scale: float = 4.0
    """Raw score above the centre that counts 0.73; smaller: a steeper logistic."""
    verifier_workers: int = 2
    """Processes that check answers, on each data-parallel rank."""
    verifier_timeout_seconds: float = 5.0
    """A check that takes longer scores 0 and is counted."""
    shuffle: bool = False
    """Control experiment: rewards are dealt to the wrong responses."""

    @property
    def weights(self) -> dict[str, float]:
        """Return the weight of each part by its name."""
        names = [setting.name for setting in fields(self) if setting.name.endswith("_weight")]
        return {name.removesuffix("_weight"): getattr(self, name) for name in names}


@dataclass
class RewardModelConfig:
    """Where the scores for `reward.model_weight` come from, and how the reward_model stage trains."""

    checkpoint: str = ""
    """A checkpoint of the reward_model stage: the model is loaded beside the policy, in the same layout."""
    hf_path: str = ""
    """The model that the checkpoint was made from; empty: `model.hf_path`. Its tokenizer must be the policy's."""
    url: str = ""
    """A server that scores, e.g. http://127.0.0.1:8001 (vLLM, or `r1v2 serve-reward-model`)."""
    endpoint: ScoreEndpoint = ScoreEndpoint.pooling
    """What is asked below `url`: pooling or classify, both as vLLM has them, with chat messages."""
    served_name: str = ""
    """`model` in the requests; empty: left out."""
    api_key_variable: str = ""
    """Environment variable that holds the server's API key; empty: none is sent."""
    timeout_seconds: float = 120.0
    """For one answer, from first to last byte."""
    attempts: int = 5
    """How often a request is made before the run ends; the pause doubles from one second to at most 30."""
    concurrency: int = 16
    """Requests under way at once, from each model replica."""
    centring_weight: float = 0.0
    """In training: weight of (chosen score + rejected score)^2, which holds scores near zero."""


@dataclass
class AlgorithmConfig:
    """GRPO as in the paper's equation 8; the rest is off by default."""

    clip_low: float = 0.2
    """Ratios below 1 - clip_low are clipped."""
    clip_high: float = 0.2
    """Ratios above 1 + clip_high are clipped."""
    kl_coefficient: float = 0.0
    """Weight of the k3 estimate of KL(policy || reference)."""
    loss_aggregation: LossAggregation = LossAggregation.sequence
    """sequence (eq. 8) or token."""
    advantage_epsilon: float = 1e-6
    """Added to the standard deviation of a group."""
    importance_cap: float = 0.0
    """Truncated importance sampling between engine and training forward: the largest weight; 0: off."""
    dynamic_sampling_rounds: int = 1
    """DAPO's dynamic sampling: while fewer than train.prompts_per_step groups are effective, as many further prompts
    are generated from, up to this many rounds in all; only effective groups are trained on. 1: off."""
    max_log_prob_difference: float = 0.5
    """The run stops when the mean |engine - training| log-prob exceeds this: of a step, or of the gate before it."""
    gate_tokens: int = 8
    """Before each generation phase the engine generates so many tokens to one prompt of each modality, and the training
    forward's log-probs of them are compared; 0: it is not done."""


@dataclass
class PreferenceConfig:
    """MPO on pairs of a chosen and a rejected response; weights 1, 0, 0 are DPO, 0, 0, 1 supervised training."""

    preference_weight: float = 0.8
    """Weight of the preference term (DPO)."""
    quality_weight: float = 0.2
    """Weight of the quality term (BCO)."""
    generation_weight: float = 1.0
    """Weight of the generation term: the likelihood of the chosen response."""
    beta: float = 0.1
    """Reward of a response = beta x (its log-prob - that of the model the stage started from), summed over tokens."""
    generation_aggregation: LossAggregation = LossAggregation.sequence
    """Of the generation term. sequence: the mean of per-response means (eq. 5); token: the mean over all tokens."""
    delta_momentum: float = 0.0
    """delta of the quality term, from the rewards of earlier steps: 0: their mean; else the part of the old value that
    stays in a moving average."""
    min_margin: float = 0.0
    """tau: pairs with a smaller margin (reward of chosen - rejected) are left out; one without a margin counts as 0."""
    reference_dir: str = ""
    """Where log-probs under the model that the stage starts from are kept, for all runs on the same pairs and model;
    empty: `run.output_dir`/reference."""


@dataclass
class BufferConfig:
    """The Selective Sample Buffer."""

    enabled: bool = True
    """Keep effective responses and replay them; false: plain GRPO."""
    capacity: int = 4096
    """Responses kept over all ranks."""
    max_age: int = 20
    """Responses generated more than this many steps ago are dropped."""
    priority_exponent: float = 1.0
    """alpha in p ~ |advantage|^alpha."""
    target_effective_fraction: float = 0.6
    """Fresh effective responses are topped up to this part of the batch."""
    balance_modalities: bool = True
    """Draw image and text responses in the proportion in which fresh ones were generated."""


@dataclass
class TrainConfig:
    """The update."""

    parts: list[Part] = field(default_factory=lambda: [Part.adapter])
    """Which parts train: any of vision, adapter, language; the reward_model stage also trains score, its new head."""
    steps: int = 100
    """Steps of this stage."""
    prompts_per_step: int = 64
    """Prompts over all data-parallel ranks (responses in the align stage, pairs in the mpo stage)."""
    updates_per_step: int = 1
    """Optimizer steps that share one generation phase."""
    micro_batch_size: int = 1
    """Rows in one forward pass, where rows are padded to the longest; the two of a pair always go together."""
    packing: Packing = Packing.none
    """none: padded rows; first_fit_decreasing: rows laid one after the other without padding; nemo: the same by NeMo's
    packing strategy (extra `nemo`)."""
    tokens_per_microbatch: int = 0
    """Tokens in one forward pass, where rows are packed."""
    learning_rate: float = 1e-6
    """The highest rate, reached after the warm-up."""
    min_learning_rate: float = 0.0
    """Where the cosine decay ends."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    adam_beta1: float = 0.9
    """Decay of the gradient average."""
    adam_beta2: float = 0.95
    """Decay of the squared-gradient average."""
    clip_grad: float = 1.0
    """Norm to which gradients are clipped; 0: not."""
    skip_above_grad_norm: float = 0.0
    """An update whose gradient norm (before clipping) is above this is skipped, as one that is not finite always is;
    0: no bound."""
    max_skipped_updates: int = 3
    """The run stops when so many updates in a row are skipped; what they were made of is in run.output_dir/skipped."""
    recompute: Recompute = Recompute.none
    """What the backward pass computes again to save memory: none, selective (core attention) or full (whole layers)."""


@dataclass
class EvaluationConfig:
    """Pass@1 over repeated sampled runs."""

    data: str = ""
    """Folder of shards for the evaluate command; during training `data.validation` is used."""
    every_steps: int = 0
    """During training, by the rules alone: no judge is asked; 0: never."""
    prompts: int = 0
    """How many prompts, from the start of the shards; 0: all."""
    runs: int = 5
    """Sampled responses per prompt."""
    temperature: float = 1.0
    """Divides the logits; 0: greedy."""
    top_p: float = 1.0
    """Nucleus; 1 samples from the whole distribution."""
    seed: int = 0
    """Evaluations with the same seed see the same random numbers."""
    stop_at_pass_at_1: float = 0.0
    """A stage ends when validation Pass@1 reaches this; 0: never."""
    save_every_prompts: int = 64
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
    judge_max_tokens: int = 8192
    """The judge's longest answer, its reasoning included; one that is cut off gives no verdict."""
    concurrency: int = 32
    """Requests in flight at once at an endpoint."""
    timeout_seconds: float = 3600.0
    """An endpoint's whole answer must be there by then; long reasoning takes long."""
    attempts: int = 6
    """Times a request is sent while the server is busy, down or too slow, with pauses of 1, 2, 4 ... 30 seconds; then
    the evaluation ends, and the same command goes on with it."""


@dataclass
class LoggingConfig:
    """Where metrics go; `run.output_dir`/metrics.jsonl is always written."""

    wandb: WandbMode = WandbMode.disabled
    """disabled, offline (to be synchronised later) or online."""
    wandb_project: str = "megatron_r1v2"
    """The project that wandb files the run under."""
    tensorboard: bool = False
    """Also write TensorBoard events below `run.output_dir`."""
    sample_rollouts: int = 8
    """Rollouts per step kept for the report."""


@dataclass
class RunRecipe:
    """A whole run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    buffer: BufferConfig = field(default_factory=BufferConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    hallucination: HallucinationConfig = field(default_factory=HallucinationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
