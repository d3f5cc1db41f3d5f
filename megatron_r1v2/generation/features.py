"""Image features of a step: computed once a prompt, used by its N responses and by the update."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_r1v2.models.r1v2 import R1V2Model
from megatron_r1v2.types import Prompt


class FeatureCache:
    """What the vision tower says of each prompt's tiles, before the adapter, under a byte limit.

    Valid as long as the vision tower's weights are: `clear()` when they have changed. What does not fit is computed
    again when it is asked for. Ranks of one tensor-parallel group must ask for the same prompts in the same order,
    since the vision tower is split over them.
    """

    def __init__(self, limit_bytes: int, *, tiles_per_pass: int = 32) -> None:
        """Make an empty cache.

        Args:
            limit_bytes: of the features kept, on each rank of the first pipeline stage.
            tiles_per_pass: tiles in one forward pass of the vision tower, when `fill` computes for several prompts.
        """
        self.limit_bytes = limit_bytes
        self.tiles_per_pass = tiles_per_pass
        self.bytes_used = 0
        self.hits = 0
        self.prompts_computed = 0
        """How often a prompt's features were computed, again or for the first time."""
        self._features: dict[str, torch.Tensor] = {}

    def __len__(self) -> int:
        """Return how many prompts are held."""
        return len(self._features)

    def get(self, prompt: Prompt, model: R1V2Model) -> torch.Tensor:
        """Return the features of a prompt, without a graph.

        Args:
            prompt: with at least one tile.
            model: this rank's part, of the first pipeline stage.

        Returns:
            [T, F, K].
        """
        return self.fill([prompt], model)[0]

    def fill(self, prompts: Sequence[Prompt], model: R1V2Model) -> list[torch.Tensor]:
        """Return the features of several prompts; the missing ones are computed together.

        Args:
            prompts: each with at least one tile.
            model: this rank's part, of the first pipeline stage.

        Returns:
            [T, F, K] for each prompt.
        """
        held = {prompt.key: self._features[prompt.key] for prompt in prompts if prompt.key in self._features}
        self.hits += len(held)
        missing = [prompt for prompt in {prompt.key: prompt for prompt in prompts}.values() if prompt.key not in held]
        for prompt, features_TFK in zip(missing, self._compute(missing, model), strict=True):
            held[prompt.key] = features_TFK
            self._keep(prompt.key, features_TFK)
        return [held[prompt.key] for prompt in prompts]

    def clear(self) -> None:
        """Forget all features; the counters stay."""
        self._features.clear()
        self.bytes_used = 0

    def _compute(self, prompts: Sequence[Prompt], model: R1V2Model) -> list[torch.Tensor]:
        if not prompts:
            return []
        self.prompts_computed += len(prompts)
        features_TFK = self._encode(torch.cat([prompt.tiles_TCHW for prompt in prompts]), model)
        counts = [prompt.tiles_TCHW.shape[0] for prompt in prompts]
        # Each prompt owns its memory: a view would keep the features of all alive.
        return [part_TFK.clone() for part_TFK in features_TFK.split(counts)]

    def _encode(self, tiles_TCHW: torch.Tensor, model: R1V2Model) -> torch.Tensor:
        tiles_TCHW = tiles_TCHW.to(next(model.parameters()).device)
        # no_grad and not inference_mode: the update puts these into a graph.
        with torch.no_grad():
            return torch.cat([model.encode_tiles(part_TCHW) for part_TCHW in tiles_TCHW.split(self.tiles_per_pass)])

    def _keep(self, key: str, features_TFK: torch.Tensor) -> None:
        size = features_TFK.numel() * features_TFK.element_size()
        if self.bytes_used + size <= self.limit_bytes:
            self._features[key] = features_TFK
            self.bytes_used += size
