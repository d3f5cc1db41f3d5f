"""Rehearsals of few layers, and the line through two of them to all layers of a model.

Every layer of a tower is the same, so bytes and FLOPs of a phase grow by the same amount with each. Two rehearsals
whose layer counts lie on a line with those of the model therefore say what all layers need, in a hundredth of the time.
A phase whose fullest moment is another one with all layers than with few is the exception: there the line is too low.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from math import gcd

from megatron_r1v2.rehearsal.ledger import PhaseMemory


@dataclass(frozen=True)
class Layers:
    """The layers of a model."""

    vision: int
    language: int

    @classmethod
    def of(cls, config: Mapping[str, object]) -> Layers:
        """Read them from a model's configuration, as transformers' InternVL has it."""
        return cls(*(_section(config, name)["num_hidden_layers"] for name in ("vision_config", "text_config")))

    def given_to(self, config: Mapping[str, object]) -> dict[str, object]:
        """Return a configuration with so many layers."""
        changed = deepcopy(dict(config))
        _section(changed, "vision_config")["num_hidden_layers"] = self.vision
        _section(changed, "text_config")["num_hidden_layers"] = self.language
        return changed


def _section(config: Mapping[str, object], name: str) -> dict[str, int]:
    section = config[name]
    assert isinstance(section, dict)
    return section


@dataclass(frozen=True)
class Line:
    """Two layer counts on a line with all layers."""

    few: Layers
    more: Layers
    whole: Layers

    @classmethod
    def through(cls, whole: Layers, *, at_least: int = 1) -> Line:
        """Find the smallest two layer counts on a line with those of a model."""
        found = []
        for vision, language in product(range(at_least, whole.vision), range(at_least, whole.language)):
            steps = gcd(whole.vision - vision, whole.language - language)
            more = Layers(vision + (whole.vision - vision) // steps, language + (whole.language - language) // steps)
            found.append(cls(Layers(vision, language), more, whole))
        return min(found, key=lambda line: line.more.vision + line.more.language)

    def extend(self, few: float, more: float) -> float:
        """Return the value for all layers of what has two values for few and for more layers."""
        return few + (more - few) * (self.whole.language - self.few.language) / (self.more.language - self.few.language)

    def peaks(self, few: Sequence[PhaseMemory], more: Sequence[PhaseMemory]) -> list[tuple[str, float]]:
        """Return the peak of each phase of a rank with all layers, by its name, in their order.

        Raises:
            ValueError: the two did not run the same phases.
        """
        names = [phase.name for phase in few]
        if names != [phase.name for phase in more]:
            raise ValueError(f"phases differ: {names} with {self.few}, {[each.name for each in more]} with {self.more}")
        return [(low.name, self.extend(low.peak, high.peak)) for low, high in zip(few, more, strict=True)]
