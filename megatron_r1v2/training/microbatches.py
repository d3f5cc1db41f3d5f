"""The microbatches of this rank, made alike for every stage."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from megatron_r1v2.config.choices import Packing
from megatron_r1v2.config.schema import TrainConfig
from megatron_r1v2.data.packing import PromptLengths, share_prompts
from megatron_r1v2.training.batches import RowFormat, collate, filler_sample, prompt_of, split_into_microbatches
from megatron_r1v2.types import Prompt, Sample, TrainingBatch


@dataclass(frozen=True)
class Microbatch:
    """Rows that go through the model together, with their names."""

    names: tuple[str, ...]
    """Sample ids of the rows."""
    batch: TrainingBatch


@dataclass(frozen=True)
class Microbatcher:
    """A maker of microbatches for one model and layout."""

    settings: TrainConfig
    rows: RowFormat

    def split(
        self,
        samples: Mapping[str, Sample],
        prompts: Mapping[str, Prompt],
        *,
        units: Mapping[str, Sequence[str]] | None = None,
        replayed: Collection[str] = (),
    ) -> list[Microbatch]:
        """Group samples into microbatches, those with the longest rows first.

        Args:
            samples: of one update on this rank, by id; may be empty.
            prompts: by key, to find tiles.
            units: ids of the samples that belong into one microbatch, as neighbours, by the name of the unit (a pair);
                None: each sample by itself.
            replayed: ids of samples that come from the buffer.
        """
        grouped = {name: (name,) for name in samples} if units is None else units
        microbatches = []
        for chosen in self._choose(samples, grouped):
            names = tuple(name for unit in chosen for name in grouped[unit])
            batch = collate(
                [samples[name] for name in names], prompts, self.rows, replayed=[name in replayed for name in names]
            )
            microbatches.append(Microbatch(names, batch))
        return microbatches

    def _choose(self, samples: Mapping[str, Sample], units: Mapping[str, Sequence[str]]) -> list[list[str]]:
        """Return the units of each microbatch."""
        if self.settings.packing is not Packing.shared:
            lengths = {unit: [len(samples[name].token_ids) for name in names] for unit, names in units.items()}
            return split_into_microbatches(lengths, self.settings, length_multiple=self.rows.length_multiple)
        responses: dict[tuple[str, tuple[int, ...]], dict[str, int]] = {}
        for unit, names in units.items():
            prompt = prompt_of(samples[names[0]])
            # Each response has the last prompt token before it, and its own last token is a label only.
            responses.setdefault(prompt, {})[unit] = sum(samples[name].response_length for name in names)
        groups = [PromptLengths(len(prompt[1]) - 1, responses[prompt]) for prompt in sorted(responses)]
        multiple = math.lcm(self.rows.length_multiple, self.rows.tensor_size)
        # Less the padding that the row may need at its end.
        return share_prompts(groups, self.settings.tokens_per_microbatch // multiple * multiple)

    def filler(self, prompt: Prompt, *, rows: int = 1) -> TrainingBatch:
        """Return a microbatch of weight zero, for a rank that has no sample.

        Args:
            prompt: any prompt, so that the shapes are usual ones.
            rows: of a unit.
        """
        return collate([filler_sample(prompt)] * rows, {prompt.key: prompt}, self.rows, weights=[0.0] * rows)
