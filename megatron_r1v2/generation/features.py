"""Image features: computed once for a prompt, used by its N responses and by the update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from megatron_r1v2.models.r1v2 import R1V2Model
from megatron_r1v2.types import Prompt

TILES_PER_PASS = 32
"""Tiles that are encoded at once."""


class FeatureCache:
    """Features of each prompt's tiles before the adapter, under a byte limit.

    They are valid until the vision tower's weights change; call `clear` then. Features that exceed the limit are
    computed again at each request. The tensor-parallel ranks share the vision tower, so they must make the same calls.

    Args:
        limit_bytes: the limit of the kept features on each rank of the first pipeline stage.
    """

    def __init__(self, limit_bytes: int, *, tiles_per_pass: int = TILES_PER_PASS) -> None:
        self.limit_bytes = limit_bytes
        self.tiles_per_pass = tiles_per_pass
        self.bytes_used = 0
        self.hits = 0
        self.prompts_computed = 0
        """The number of times that a prompt's features were computed."""
        self._features: dict[str, torch.Tensor] = {}

    def __len__(self) -> int:
        """Return the number of prompts whose features are kept."""
        return len(self._features)

    def get(self, prompt: Prompt, model: R1V2Model) -> torch.Tensor:
        """Collective over `groups.tp`: return the features of a prompt, without a graph.

        Args:
            prompt: a prompt with at least one tile.
            model: this rank's part, on the first pipeline stage.

        Returns:
            [T, F, K].
        """
        return self.fill([prompt], model)[0]

    def fill(self, prompts: Sequence[Prompt], model: R1V2Model) -> list[torch.Tensor]:
        """Collective over `groups.tp`: return the features of prompts; compute the missing ones together.

        Args:
            prompts: prompts with at least one tile each.
            model: this rank's part, on the first pipeline stage.

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

    def in_passes(self, prompts: Sequence[Prompt]) -> Iterator[list[Prompt]]:
        """Yield prompts in groups, each of one prompt or of as many as one pass of the tower encodes."""
        group: list[Prompt] = []
        tiles = 0
        for prompt in prompts:
            count = prompt.tiles_TCHW.shape[0]
            if group and tiles + count > self.tiles_per_pass:
                yield group
                group, tiles = [], 0
            group.append(prompt)
            tiles += count
        if group:
            yield group

    def clear(self) -> None:
        """Drop all features; keep the counters."""
        self._features.clear()
        self.bytes_used = 0

    def _compute(self, prompts: Sequence[Prompt], model: R1V2Model) -> list[torch.Tensor]:
        if not prompts:
            return []
        self.prompts_computed += len(prompts)
        features_TFK = self._encode(torch.cat([prompt.tiles_TCHW for prompt in prompts]), model)
        counts = [prompt.tiles_TCHW.shape[0] for prompt in prompts]
        # Copies: a view of one prompt would keep the features of all prompts in memory.
        return [part_TFK.clone() for part_TFK in torch.split(features_TFK, counts)]

    def _encode(self, tiles_TCHW: torch.Tensor, model: R1V2Model) -> torch.Tensor:
        tiles_TCHW = tiles_TCHW.to(next(model.parameters()).device)
        parts = torch.split(tiles_TCHW, self.tiles_per_pass)
        # Not inference_mode: the update feeds these features to the adapter, inside a graph.
        with torch.no_grad():
            return torch.cat([model.encode_tiles(part_TCHW) for part_TCHW in parts])

    def _keep(self, key: str, features_TFK: torch.Tensor) -> None:
        size = features_TFK.numel() * features_TFK.element_size()
        # No eviction: the update asks in the order of generation, so a full cache would lose each entry before its use.
        if self.bytes_used + size <= self.limit_bytes:
            self._features[key] = features_TFK
            self.bytes_used += size
