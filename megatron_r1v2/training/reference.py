"""The reference policy: a second copy of the trained parameters, put in their place for a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_r1v2.models.r1v2 import R1V2Model


class ReferenceWeights:
    """The trained parameters as they were when the stage started; for an adapter that is 184 MB, not a second model."""

    def __init__(self, model: R1V2Model) -> None:
        """Copy the trained parameters; call after freezing and before a checkpoint of the stage is loaded."""
        self._copies = {
            name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad
        }

    @contextmanager
    def in_place_of(self, model: R1V2Model) -> Iterator[None]:
        """Let the model compute with the reference weights inside the block.

        Args:
            model: the one that was copied; its parameters keep their storage, which DDP's buffers hold.
        """
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            current = {name: parameters[name].detach().clone() for name in self._copies}
            for name, copy in self._copies.items():
                # Copied, not assigned: DDP's buffers and the optimizer hold views of this storage.
                parameters[name].copy_(copy)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in current.items():
                    parameters[name].copy_(value)
