"""The microbatches of this rank, made alike for every stage."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from megatron_r1v2.config.schema import TrainConfig
from megatron_r1v2.training.batches import RowFormat, collate, filler_sample, split_into_microbatches
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
        lengths = {unit: [len(samples[name].token_ids) for name in names] for unit, names in grouped.items()}
        microbatches = []
        for chosen in split_into_microbatches(lengths, self.settings, length_multiple=self.rows.length_multiple):
            names = tuple(name for unit in chosen for name in grouped[unit])
            batch = collate(
                [samples[name] for name in names], prompts, self.rows, replayed=[name in replayed for name in names]
            )
            microbatches.append(Microbatch(names, batch))
        return microbatches

    def filler(self, prompt: Prompt, *, rows: int = 1) -> TrainingBatch:
        """Return a microbatch of weight zero, for a rank that has no sample.

        Args:
            prompt: any prompt, so that the shapes are usual ones.
            rows: of a unit.
        """
        return collate([filler_sample(prompt)] * rows, {prompt.key: prompt}, self.rows, weights=[0.0] * rows)
