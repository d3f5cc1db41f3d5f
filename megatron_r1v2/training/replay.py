"""The samples behind the buffer's index, spread over data-parallel ranks, and the way to where they are trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1v2.parallel import objects
from megatron_r1v2.types import Prompt, RLTargets, Sample


class ReplayStore:
    """This data-parallel rank's part of the Selective Sample Buffer: samples, and each prompt's tiles once."""

    def __init__(self) -> None:
        self.samples: dict[str, Sample] = {}
        self.prompts: dict[str, Prompt] = {}

    def add(self, samples: Mapping[str, Sample], prompts: Mapping[str, Prompt]) -> None:
        """Keep samples by id, with their prompts."""
        self.samples.update(samples)
        for sample in samples.values():
            self.prompts[sample.prompt_key] = prompts[sample.prompt_key]

    def drop(self, sample_ids: Iterable[str]) -> None:
        """Forget samples (those that other ranks hold are not here), and prompts that nothing refers to."""
        for sample_id in sample_ids:
            self.samples.pop(sample_id, None)
        used = {sample.prompt_key for sample in self.samples.values()}
        self.prompts = {key: prompt for key, prompt in self.prompts.items() if key in used}

    def state_dict(self) -> dict[str, Any]:
        """Return the contents as tensors, numbers, strings, and lists and dictionaries of them."""
        return {
            "samples": {sample_id: asdict(sample) for sample_id, sample in sorted(self.samples.items())},
            "prompts": {key: plain_prompt(prompt) for key, prompt in sorted(self.prompts.items())},
        }

    def load_state_dicts(self, shards: Sequence[Mapping[str, Any]], *, data_rank: int, data_size: int) -> None:
        """Take this rank's share of a saved buffer: its own shard, or a new split when the number of ranks changed.

        Args:
            shards: of every data-parallel rank of the saved run.
        """
        prompts = {key: Prompt(**value) for shard in shards for key, value in shard["prompts"].items()}
        if len(shards) == data_size:
            mine = dict(shards[data_rank]["samples"])
        else:
            # By id, so that the new split does not depend on the old one.
            everything = sorted(
                (item for shard in shards for item in shard["samples"].items()), key=lambda item: item[0]
            )
            mine = dict(everything[data_rank::data_size])
        self.samples, self.prompts = {}, {}
        self.add({sample_id: _sample(value) for sample_id, value in mine.items()}, prompts)


def assign(lengths: Mapping[str, int], data_size: int) -> dict[str, int]:
    """Decide which data-parallel rank trains what: longest first, each to the rank with the fewest tokens.

    Args:
        lengths: tokens by name, of a prompt with its responses.

    Returns:
        Rank by name; the same on every rank.
    """
    load = [0] * data_size
    owner = {}
    # Names break ties: every rank must come to the same assignment without asking.
    for name in sorted(lengths, key=lambda name: (-lengths[name], name)):
        rank = min(range(data_size), key=lambda candidate: (load[candidate], candidate))
        owner[name] = rank
        load[rank] += lengths[name]
    return owner


def send_to_trainers(
    held: Mapping[str, Sample],
    prompts: Mapping[str, Prompt],
    trainer: Mapping[str, int],
    *,
    group: dist.ProcessGroup,
    device: torch.device,
) -> tuple[dict[str, Sample], dict[str, Prompt]]:
    """Collective over the data-parallel ranks: move samples from those that hold them to those that train them.

    Args:
        held: samples on this rank, by id; those without a trainer stay.
        device: where the backend wants its tensors.

    Returns:
        The samples that this rank trains, ordered by id, and their prompts.

    Raises:
        RuntimeError: a sample has a trainer but no rank holds it.
    """
    # A prompt goes once to each rank, however many of its samples do: its tiles are the larger part.
    outgoing: list[tuple[dict[str, Sample], dict[str, Prompt]]] = [({}, {}) for _ in range(group.size())]
    for sample_id, sample in held.items():
        if sample_id in trainer:
            samples, needed = outgoing[trainer[sample_id]]
            samples[sample_id] = sample
            needed[sample.prompt_key] = prompts[sample.prompt_key]
    mine: dict[str, Sample] = {}
    my_prompts: dict[str, Prompt] = {}
    for samples, needed in objects.exchange(outgoing, group, device):
        mine.update(samples)
        my_prompts.update(needed)
    lost = sorted(name for name, rank in trainer.items() if rank == group.rank() and name not in mine)
    if lost:
        raise RuntimeError(
            f"no rank holds {len(lost)} samples of the batch, {lost[0]!r} the first: the buffer's index "
            "and its samples disagree; resume from an older checkpoint or set buffer.capacity=0"
        )
    return dict(sorted(mine.items())), my_prompts


def _sample(saved: Mapping[str, Any]) -> Sample:
    return Sample(**{**saved, "rl": RLTargets(**saved["rl"])})


def plain_prompt(prompt: Prompt) -> dict[str, Any]:
    """Return a prompt as tensors, numbers, texts and dictionaries, without its encoded images and its pair."""
    # What is replayed has its reward, so encoded images (for a served reward model) and the pair are not needed again;
    # a Preference would not be read back by torch.load(weights_only=True) either.
    plain = dict(vars(prompt)) | {"images": (), "preference": None}
    plain["messages"] = tuple(dict(message) for message in prompt.messages)
    plain["facts"] = dict(prompt.facts)
    plain["metadata"] = dict(prompt.metadata)
    return plain
