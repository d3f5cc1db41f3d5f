"""Settings that accept one of a few words."""

from __future__ import annotations

from enum import Enum


class StageName(str, Enum):
    """A stage that a recipe is written for."""

    align = "align"
    pairs = "pairs"
    mpo = "mpo"
    reward_model = "reward_model"
    grpo = "grpo"


class Layers(str, Enum):
    """The implementation of the layers that megatron-core builds."""

    local = "local"
    te = "te"


class Fp8(str, Enum):
    """The scaling of the language model's matrix products to 8 bits; the vision tower stays in bf16."""

    none = "none"
    tensorwise = "tensorwise"
    blockwise = "blockwise"


class Precision(str, Enum):
    """The dtype of parameters and activations."""

    fp32 = "fp32"
    bf16 = "bf16"


class Part(str, Enum):
    """A part of the model that can be trained; score is the scalar head that only a reward model has."""

    vision = "vision"
    adapter = "adapter"
    language = "language"
    score = "score"


class LossAggregation(str, Enum):
    """The way from token losses to one number: the mean of per-response means (eq. 8), or one mean over all tokens."""

    sequence = "sequence"
    token = "token"


class EffectiveBy(str, Enum):
    """The difference within a group that something can be learned from."""

    answer = "answer"
    reward = "reward"


class Recompute(str, Enum):
    """The activations that the backward pass computes again instead of keeping."""

    none = "none"
    selective = "selective"
    full = "full"


class Packing(str, Enum):
    """The way in which sequences of different lengths share a microbatch."""

    shared = "shared"
    first_fit_decreasing = "first_fit_decreasing"
    nemo = "nemo"


class TooLong(str, Enum):
    """The treatment of a prompt that is longer than `data.max_prompt_tokens`."""

    error = "error"
    skip = "skip"
    fewer_tiles = "fewer_tiles"


class Tracker(str, Enum):
    """A place for metrics beside the run's own folder."""

    wandb = "wandb"
    wandb_offline = "wandb_offline"
    tensorboard = "tensorboard"


class OnResume(str, Enum):
    """The fate of a run that is resumed with another value of a setting."""

    refused = "refused"
    """The run would be another one: stage, seed, schedule."""
    larger = "larger"
    """It may grow; a smaller value is refused."""
    asked = "asked"
    """The curves would mean something else from here on: it needs checkpoint.accept_changes."""
    free = "free"
    """It is listed."""
