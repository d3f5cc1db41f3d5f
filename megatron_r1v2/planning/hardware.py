"""GPUs by their vendors' figures, and the parts of them that we expect to attain."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Host:
    """The seconds that the CPU needs for a step of decode. Counted in the code and assumed, not measured."""

    launches_per_layer: int = 65
    graph_launches_per_layer: int = 1
    """With CUDA graphs."""
    launch_seconds: float = 7e-6
    step_seconds: float = 2.5e-3
    """Outside of the layers: scheduling, the drawing of tokens, bookkeeping."""
    response_seconds: float = 13e-6
    """Of each response that gets a token."""


@dataclass(frozen=True)
class Hardware:
    """A GPU by its vendor's figures, and the parts of them that we expect to attain."""

    name: str
    bf16_flops: float
    """Dense, per second."""
    bandwidth: float
    """Bandwidth of the GPU's memory, bytes per second."""
    link: float
    """Bandwidth to the GPUs of the same node, bytes per second and direction."""
    network: float
    """Bandwidth to other nodes, bytes per second, direction and GPU."""
    memory_gib: float
    fp8_flops: float = 0.0
    """Dense, per second; 0: no 8-bit products."""
    matmul_efficiency: float = 0.45
    """Attained part of the FLOP/s in forward and backward passes. Assumed, not measured."""
    fp8_efficiency: float = 0.35
    """The same of the FP8 FLOP/s: less, since casts and scales come on top. Assumed, not measured."""
    bandwidth_efficiency: float = 0.6
    """Attained part of the memory bandwidth in decode. Assumed, not measured."""
    link_efficiency: float = 0.6
    """Attained part of the links. Assumed, not measured."""
    collective_seconds: float = 15e-6
    """Latency of one all-reduce in decode. Assumed, not measured."""
    host: Host = Host()


HARDWARE: dict[str, Hardware] = {
    "a100": Hardware("A100 SXM 80 GB", 312e12, 2.04e12, 300e9, 25e9, 79.2),
    "h100": Hardware("H100 SXM 80 GB", 989e12, 3.35e12, 450e9, 50e9, 79.6, 1979e12),
    "h200": Hardware("H200 SXM 141 GB", 989e12, 4.8e12, 450e9, 50e9, 139.8, 1979e12),
    "b200": Hardware("B200 180 GB", 2250e12, 7.7e12, 900e9, 50e9, 178.4, 4500e12),
}
