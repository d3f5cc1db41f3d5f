"""The speed of a step: tokens a second of the update, and its share of the GPUs' peak."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_r1v2.config.choices import Part
from megatron_r1v2.models.r1v2 import R1V2Model
from megatron_r1v2.parallel import objects
from megatron_r1v2.parallel.groups import ParallelContext

PEAK_FLOPS: Mapping[str, float] = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H200": 989e12,
    "H20": 148e12,
    "GH200": 989e12,
    "GB200": 2500e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A40": 150e12,
}
"""Dense bf16 operations a second by a word of the GPU's name, from NVIDIA's data sheets."""


@dataclass(frozen=True)
class StepSpeed:
    """The numbers of a run that turn the tokens and seconds of an update into its speed."""

    flops_per_token: float
    """Of the update: forward, backward, and the gradients of what trains."""
    peak_flops: float | None
    """Of all devices together; None: it is not known."""

    @classmethod
    def measure(cls, model: R1V2Model, context: ParallelContext) -> StepSpeed:
        """Collective over the world: count the language model's weights, which do nearly all of the work.

        Args:
            model: this rank's part, frozen but for what trains.
        """
        weights = [parameter for name, parameter in model.named_parameters() if _multiplies(name, parameter.dim())]
        mine = (
            sum(parameter.numel() for parameter in weights),
            sum(parameter.numel() for parameter in weights if parameter.requires_grad),
        )
        # A replica's ranks hold a part each; the replicas hold the same.
        every = objects.all_gather(mine)
        held, trained = (sum(counts[index] for counts in every) / context.data_size for index in range(2))
        peak = peak_flops(context.device_name)
        # A product with a weight is two operations a token, and so are the gradients of its input and of the weight.
        return cls(2 * (2 * held + trained), peak * context.num_processes if peak else None)

    def metrics(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the speed of a step's update.

        Args:
            values: the metrics of the step so far; without tokens and seconds of an update there is no speed.
        """
        tokens, seconds = values.get("perf/update_tokens"), values.get("timing_s/update")
        if not tokens or not seconds:
            return {}
        speed = tokens / seconds
        share = {"perf/mfu/actor": speed * self.flops_per_token / self.peak_flops} if self.peak_flops else {}
        return {"perf/update_tokens_per_second": speed, **share}


def peak_flops(device_name: str) -> float | None:
    """Return the peak of a GPU by its name, such as "NVIDIA H100 80GB HBM3"; None: it is not in the table."""
    # By whole words: an H200 is no H20.
    words = f" {device_name.replace('-', ' ')} "
    return next((peak for name, peak in PEAK_FLOPS.items() if f" {name} " in words), None)


def _multiplies(name: str, dimensions: int) -> bool:
    """Return whether a parameter is a matrix that each token is multiplied by: rows of an embedding are looked up."""
    return name.startswith(f"{Part.language.value}.") and dimensions > 1 and "embedding" not in name
