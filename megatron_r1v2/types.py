"""The types that cross a boundary between two parts of the system; imports torch only.

A step moves data in one direction:

    Prompt -> Rollout -> ScoredRollout -> Sample -> TrainingBatch

Shape suffixes are explained in `megatron_r1v2/models/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch  # takes seconds; the command lines that read these names must not

Modality = Literal["image", "text"]
AnswerType = Literal["numeric", "choice", "exact", "math"]
FinishReason = Literal["stop", "length", "segment"]
"""stop: it ended itself; length: it was cut; segment: it goes on in the next step (`generation.segment_tokens`)."""


@dataclass(frozen=True)
class Preference:
    """Two responses to one prompt, one better than the other, as text without the end-of-turn token.

    Example: chosen "left 3, right 5, 3+5=8</think>\\boxed{8}", rejected "left 3, right 6, 3+6=9</think>\\boxed{9}",
    margin 0.8, source "correctness".
    """

    chosen: str
    rejected: str
    margin: float | None = None
    """Reward of `chosen` minus reward of `rejected`; None where nobody scored them."""
    source: str = ""
    """The rule that made the pair, such as "correctness"."""


@dataclass(frozen=True)
class Prompt:
    """One question, templated and tokenized, with its images cut into tiles.

    Example: key "digits-000017", token_ids of "<|im_start|>user\n<img><IMG_CONTEXT>...</img>\n... <think>\n",
    tiles_TCHW of shape [3, 3, 32, 32], answer "8", answer_type "numeric", facts {"left": "3", "right": "5"}.
    """

    key: str
    """Unique over the data set; seeds, the buffer and the reports refer to it."""
    messages: tuple[Mapping[str, str], ...]
    """Chat messages ({"role": ..., "content": ...}); "<image>" in a content marks the place of an image."""
    token_ids: tuple[int, ...]
    """The templated prompt, each image expanded to its `<IMG_CONTEXT>` tokens, ending where the response begins."""
    tiles_TCHW: torch.Tensor
    """uint8 [T, 3, height, width]: all tiles of all images in order of appearance; T = 0 for a text-only prompt."""
    answer: str | None = None
    """None where nothing will be compared with it: a request to the server."""
    answer_type: AnswerType | None = None
    images: tuple[bytes, ...] = ()
    """The encoded images in order of appearance, for a served reward model, which cuts them in its own way."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Facts about the images, by name; a claim that contradicts one is a hallucination."""
    alternatives: tuple[str, ...] = ()
    """Further answers that are as right as `answer`."""
    tolerances: tuple[float, ...] = ()
    """How far from `answer` a number may be, absolute: one for all of its parts or one for each (separated by ", ")."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Names that an evaluation is broken down by, such as {"benchmark": "MMMU", "subject": "Art"}."""
    response: str | None = None
    """A reference response (supervised data only), without the end-of-turn token."""
    preference: Preference | None = None
    """A better and a worse response (preference data only)."""
    data_set: str = ""
    """The name of its data set, where data.train has several."""

    @property
    def modality(self) -> Modality:
        """Return "image" when the prompt has at least one tile."""
        return "image" if self.tiles_TCHW.shape[0] else "text"


@dataclass(frozen=True)
class Rollout:
    """One sampled response.

    Example: prompt_key "digits-000017", sample_index 3, token_ids (61, 12, 7, 2), one log-prob each,
    policy_version 12, finish_reason "stop".
    """

    prompt_key: str
    sample_index: int
    """Number of this response among the N of the prompt, 0 .. N-1."""
    token_ids: tuple[int, ...]
    """The response, the stop token included when there is one."""
    rollout_log_probs: tuple[float, ...]
    """The engine's log-probs of `token_ids` under the sampling distribution (divided by the temperature)."""
    policy_version: int
    """Optimizer steps that the weights which sampled this (its first segment) had seen."""
    finish_reason: FinishReason
    step: int = 0
    """Steps of the run that were done when it began."""
    old_log_probs: tuple[float, ...] = ()
    """Log-probs of the tokens of earlier segments, each by the training forward with the weights that sampled it."""


@dataclass(frozen=True)
class ScoredRollout:
    """A rollout with its rewards."""

    rollout: Rollout
    text: str
    """The response as text, special tokens included, the stop token left out."""
    rewards: Mapping[str, float]
    """Each part of the reward that applies, by name, in [0, 1], unweighted."""
    total: float
    """The weighted sum that the advantages are computed from."""
    rule_correct: bool
    """Whether the answer rule found the answer right; False where the prompt has none."""
    claims: tuple[tuple[str, str], ...] = ()
    """Claims of the response about the images: (name, value)."""
    model_score: float | None = None
    """Raw score of the reward model, from which margins of preference pairs are computed; None: there was no model."""
    checked: bool = True
    """False: a check timed out or crashed and gave 0, so that the response may be right after all."""


@dataclass(frozen=True)
class RLTargets:
    """A sampled response's quantities for reinforcement learning, beside its tokens."""

    rollout_log_probs: tuple[float, ...]
    """The engine's log-probs of the response."""
    advantage: float
    reward: float
    policy_version: int
    """Optimizer steps that the weights which sampled the response had seen."""
    group_effective: bool
    """Whether something could be learned from its group (`buffer.effective_by`)."""
    old_log_probs: tuple[float, ...] = ()
    """Log-probs of the response by the training forward when it was generated; the ratio is taken against these. Of the
    first tokens only, or of none: those of the others are not computed yet."""

    @property
    def is_fresh(self) -> bool:
        """Return whether old log-probs are still to be computed."""
        return len(self.old_log_probs) < len(self.rollout_log_probs)


@dataclass(frozen=True)
class Sample:
    """One response as the training forward sees it."""

    prompt_key: str
    sample_index: int
    token_ids: tuple[int, ...]
    """Prompt and response together."""
    prompt_length: int
    """Tokens of the prompt: `token_ids[prompt_length:]` is the response, which alone is trained."""
    modality: Modality
    rl: RLTargets | None = None
    """Fresh or replayed from the buffer; None for a response that was given, not sampled (SFT, pairs, fillers)."""

    @property
    def response_length(self) -> int:
        """Return the number of response tokens."""
        return len(self.token_ids) - self.prompt_length

    @property
    def response_columns(self) -> slice:
        """Return the columns of a row that belong to the response."""
        # Column s holds the log-prob of token s + 1, so the response begins one column early.
        return slice(self.prompt_length - 1, len(self.token_ids) - 1)


@dataclass(frozen=True)
class TrainingBatch:
    """One microbatch, padded on the right, with everything that the loss needs.

    `labels_BS[b, s]` is the token after `token_ids_BS[b, s]`; every other [B, S] tensor is aligned with the labels.
    """

    token_ids_BS: torch.Tensor
    """int64 [B, S]."""
    position_ids_BS: torch.Tensor
    """int64 [B, S]."""
    labels_BS: torch.Tensor
    """int64 [B, S]."""
    response_mask_BS: torch.Tensor
    """float32 [B, S]: 1 where the label is a response token."""
    image_mask_BS: torch.Tensor
    """bool [B, S]: the `<IMG_CONTEXT>` tokens of the prompt; one in a response is a word like any other."""
    tiles_TCHW: torch.Tensor
    """uint8 [T, 3, height, width]: the tiles of the distinct prompts of the batch, on the host until they are used."""
    tile_index: torch.Tensor
    """int64 [tiles of all rows in row order]: index of each among the distinct tiles; rows of one prompt share them."""
    image_prompts: tuple[Prompt, ...]
    """The distinct prompts that have tiles, in the order of `tiles_TCHW`."""
    advantages_B: torch.Tensor
    """float32 [B]."""
    old_log_probs_BS: torch.Tensor
    """float32 [B, S]; NaN at response tokens whose old log-probs the forward pass of the only update will give."""
    rollout_log_probs_BS: torch.Tensor
    """float32 [B, S]."""
    replayed_B: torch.Tensor
    """bool [B]: the row comes from the buffer."""
    weights_B: torch.Tensor
    """float32 [B]: 1, or 0 for a row that only fills a microbatch."""
    num_prompt_tokens_B: tuple[int, ...]
    """Tokens before the response of each row."""
    num_response_tokens_B: tuple[int, ...]
    """Response tokens of each row."""
    num_tiles_B: tuple[int, ...]
    """Tiles of each row."""
    rows_per_prompt: tuple[int, ...]
    """Neighbouring rows of one prompt, counted: (2, 1) for two rows of one and a row of another."""
    has_image_B: torch.Tensor
    """bool [B]."""
    reference_log_probs_BS: torch.Tensor | None = None
    """float32 [B, S], where the loss has a KL term."""
    reference_sums_B: torch.Tensor | None = None
    """float64 [B]: log-probs of the whole responses under the reference, where the loss compares those."""
    entropy_BS: torch.Tensor | None = None
    """float32 [B, S], of the policy in training, where it is measured."""


class NoRoomError(ValueError):
    """A key-value cache of what is free has no room for one sequence."""


class DataEndsRunError(ValueError):
    """The data would end a run: rows longer than the recipe or the model allows, or too few of them."""
