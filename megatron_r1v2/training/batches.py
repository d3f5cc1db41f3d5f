"""The way from samples to padded microbatches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from megatron_r1v2.config.choices import Fp8, Packing
from megatron_r1v2.config.schema import ParallelConfig, TrainConfig
from megatron_r1v2.data.packing import first_fit_decreasing, nemo_first_fit_decreasing
from megatron_r1v2.types import Prompt, RLTargets, Sample, TrainingBatch

# Rows are padded to a multiple of this at least: a few lengths instead of many keep kernels and shapes few.
LENGTH_MULTIPLE = 8


def split_into_microbatches(
    lengths: Mapping[str, Sequence[int]], settings: TrainConfig, *, length_multiple: int = LENGTH_MULTIPLE
) -> list[list[str]]:
    """Group units (one row, or the two of a pair) of separate rows by their tokens.

    Args:
        lengths: tokens of each row by unit, of one update on this rank; all units have equally many rows.
        length_multiple: packed sequences are padded to a multiple of this.

    Returns:
        Units of each microbatch, longest first: too little memory shows at once.
    """
    # What a packed sequence occupies, its padding included.
    padded = {
        name: sum(math.ceil(length / length_multiple) * length_multiple for length in rows)
        for name, rows in lengths.items()
    }
    pack = nemo_first_fit_decreasing if settings.packing is Packing.nemo else first_fit_decreasing
    return pack(padded, settings.tokens_per_microbatch)


@dataclass(frozen=True)
class RowFormat:
    """The layout of samples as rows of a batch."""

    pad_id: int
    """The token that fills rows."""
    image_token_id: int
    """`<IMG_CONTEXT>`."""
    tensor_size: int
    """TP ranks: sequence parallelism splits the length over them."""
    device: torch.device
    length_multiple: int = LENGTH_MULTIPLE
    """Lengths are multiples of this; FP8 wants more than bf16."""


def collate(
    samples: Sequence[Sample],
    prompts: Mapping[str, Prompt],
    rows: RowFormat,
    *,
    replayed: Sequence[bool] | None = None,
    weights: Sequence[float] | None = None,
) -> TrainingBatch:
    """Pad samples into one microbatch.

    Args:
        samples: its rows; at least one.
        prompts: by key, to find tiles.
        replayed: for each row, whether it comes from the buffer; None: no row does.
        weights: per row; None: 1.

    Returns:
        The batch; column s predicts token s + 1.
    """
    multiple = math.lcm(rows.length_multiple, rows.tensor_size)
    # The last token of a row is a label only, so rows have one column less than tokens.
    length = math.ceil((max(len(sample.token_ids) for sample in samples) - 1) / multiple) * multiple
    count = len(samples)
    tokens = torch.full((count, length + 1), rows.pad_id, dtype=torch.int64)
    mask = torch.zeros(count, length)
    old, rollout = torch.zeros(count, length), torch.zeros(count, length)
    for row, sample in enumerate(samples):
        ids = torch.tensor(sample.token_ids[: length + 1])
        tokens[row, : len(ids)] = ids
        span = sample.response_columns
        mask[row, span] = 1.0
        if sample.rl is not None:
            rollout[row, span] = torch.tensor(sample.rl.rollout_log_probs)
            missing = sample.response_length - len(sample.rl.old_log_probs)
            old[row, span] = torch.tensor((*sample.rl.old_log_probs, *[math.nan] * missing))
    # An <IMG_CONTEXT> that the model wrote itself has no image behind it.
    in_prompt = torch.arange(length) < torch.tensor([[sample.prompt_length] for sample in samples])
    tiles, tile_index, image_prompts = _shared_tiles([prompts[sample.prompt_key] for sample in samples])
    batch = TrainingBatch(
        token_ids_BS=tokens[:, :-1].contiguous(),
        position_ids_BS=torch.arange(length).expand(count, length).contiguous(),
        labels_BS=tokens[:, 1:].contiguous(),
        response_mask_BS=mask,
        image_mask_BS=(tokens[:, :-1] == rows.image_token_id) & in_prompt,
        tiles_TCHW=tiles,
        tile_index=tile_index,
        image_prompts=image_prompts,
        advantages_B=torch.tensor([sample.rl.advantage if sample.rl is not None else 0.0 for sample in samples]),
        old_log_probs_BS=old,
        rollout_log_probs_BS=rollout,
        replayed_B=torch.tensor(list(replayed) if replayed is not None else [False] * count, dtype=torch.bool),
        weights_B=torch.tensor(list(weights) if weights is not None else [1.0] * count),
        num_prompt_tokens_B=tuple(sample.prompt_length for sample in samples),
        num_response_tokens_B=tuple(sample.response_length for sample in samples),
        num_tiles_B=tuple(prompts[sample.prompt_key].tiles_TCHW.shape[0] for sample in samples),
        rows_per_prompt=tuple(len(list(rows)) for _, rows in itertools.groupby(samples, key=prompt_of)),
        has_image_B=torch.tensor([sample.modality == "image" for sample in samples]),
    )
    return _to_device(batch, rows.device)


def length_multiple(fp8: Fp8, parallel: ParallelConfig) -> int:
    """Compute the number that the length of a row must be a multiple of.

    TransformerEngine's FP8 products want 8 tokens on a rank; with blockwise scales, sequence parallelism gathers whole
    blocks of 128 tokens of each rank.
    """
    if fp8 is Fp8.none:
        return LENGTH_MULTIPLE
    ranks = parallel.tensor if parallel.sequence else 1
    return ranks * (128 if fp8 is Fp8.blockwise else 8)


def response_sample(prompt: Prompt, response: Sequence[int], *, index: int = 0, rl: RLTargets | None = None) -> Sample:
    """Put a response behind its prompt.

    Args:
        index: which of the responses to the prompt this is.
        rl: where it was sampled for reinforcement learning.
    """
    return Sample(
        prompt_key=prompt.key,
        sample_index=index,
        token_ids=(*prompt.token_ids, *response),
        prompt_length=len(prompt.token_ids),
        modality=prompt.modality,
        rl=rl,
    )


def with_old_log_probs(sample: Sample, log_probs_S: torch.Tensor) -> Sample:
    """Return a fresh sample with the old log-probs that it lacks: all, or those of its last segment.

    Args:
        log_probs_S: float32 [S], by the training forward with the weights that sampled.
    """
    if sample.rl is None:
        raise ValueError(f"the sample of prompt {sample.prompt_key!r} was not sampled for reinforcement learning")
    known = sample.rl.old_log_probs
    computed = log_probs_S[sample.response_columns][len(known) :].tolist()
    return replace(sample, rl=replace(sample.rl, old_log_probs=(*known, *computed)))


def prompt_of(sample: Sample) -> tuple[str, tuple[int, ...]]:
    """Return the key and the tokens of a sample's prompt: samples of the same prompt can share it in a row."""
    # The tokens too: a replayed sample may come from before a change of the template.
    return sample.prompt_key, sample.token_ids[: sample.prompt_length]


def filler_sample(prompt: Prompt) -> Sample:
    """Make a sample for a rank that has none: megatron-core's schedule runs at least one microbatch.

    Args:
        prompt: any prompt, so that the shapes are usual ones.

    Returns:
        A sample with a response of one token, to be collated with weight 0.
    """
    return response_sample(prompt, prompt.token_ids[-1:])


def _shared_tiles(prompts: Sequence[Prompt]) -> tuple[torch.Tensor, torch.Tensor, tuple[Prompt, ...]]:
    """Stack the tiles of distinct prompts, and index the tiles of each row."""
    # The N responses to a prompt share its tiles: the vision tower computes an image once, not N times.
    first_tile: dict[str, int] = {}
    distinct: list[Prompt] = []
    tiles: list[torch.Tensor] = []
    index: list[torch.Tensor] = []
    count = 0
    for prompt in prompts:
        num_tiles = prompt.tiles_TCHW.shape[0]
        if num_tiles and prompt.key not in first_tile:
            first_tile[prompt.key] = count
            distinct.append(prompt)
            tiles.append(prompt.tiles_TCHW)
            count += num_tiles
        if num_tiles:
            index.append(torch.arange(num_tiles) + first_tile[prompt.key])
    stacked = torch.cat(tiles) if tiles else prompts[0].tiles_TCHW
    return stacked, torch.cat(index) if index else torch.zeros(0, dtype=torch.int64), tuple(distinct)


def _to_device(batch: TrainingBatch, device: torch.device) -> TrainingBatch:
    # Not the tiles: where the tower is frozen, their features are in the cache by now.
    tensors = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    moved = {name: value.to(device) for name, value in tensors.items() if name != "tiles_TCHW"}
    return TrainingBatch(**{**vars(batch), **moved})
