"""The verification of one checkpoint, and the comparison of two of any kind, tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_r1v2.checkpoint.detection import open_checkpoint
from megatron_r1v2.checkpoint.identity import TensorIdentity, combined_digest, tensor_identity
from megatron_r1v2.checkpoint.manifest import Manifest
from megatron_r1v2.checkpoint.sources import CheckpointSpec, SourceSpec
from megatron_r1v2.checkpoint.tensor_files import in_threads

_SHOWN_NAMES = 8
_SHOWN_TENSORS = 20


@dataclass(frozen=True)
class Verification:
    """The result of reading one checkpoint through."""

    kind: str
    parameters: int
    sha256: str
    """Of all parameters (`combined_digest`)."""
    checksums: str
    """The checksums that the bytes were compared with."""

    def as_json(self) -> dict[str, object]:
        """Return the result for --json."""
        return {"ok": True, **vars(self)}

    def __str__(self) -> str:
        return f"{self.kind}: {self.parameters} parameters read, sha256 {self.sha256}\ncompared with: {self.checksums}"


@dataclass(frozen=True)
class TensorPair:
    """One parameter in two checkpoints."""

    first: TensorIdentity
    second: TensorIdentity
    largest_difference: float | None
    """None: the two are equal, or of different shapes."""

    @property
    def equal(self) -> bool:
        """Return whether shape, dtype and bits agree."""
        return self.first == self.second


@dataclass(frozen=True)
class LogitDifference:
    """Two models' logits for one random prompt with an image."""

    largest: float
    largest_difference: float


@dataclass(frozen=True)
class Comparison:
    """The result of comparing two checkpoints."""

    common: dict[str, TensorPair]
    only_first: list[str]
    only_second: list[str]
    logits: LogitDifference | None = None

    @property
    def ok(self) -> bool:
        """Return whether both hold the same model."""
        return not self.different and not self.only_first and not self.only_second

    @property
    def different(self) -> dict[str, TensorPair]:
        """Return the parameters that differ."""
        return {ours: pair for ours, pair in self.common.items() if not pair.equal}

    @property
    def digests(self) -> list[str]:
        """Return the digest of the common parameters on either side."""
        return [
            combined_digest({ours: pair.first for ours, pair in self.common.items()}),
            combined_digest({ours: pair.second for ours, pair in self.common.items()}),
        ]

    def as_json(self) -> dict[str, object]:
        """Return the result for --json."""
        different = {
            ours: {"first": str(p.first), "second": str(p.second), "largest_difference": p.largest_difference}
            for ours, p in self.different.items()
        }
        return {
            "ok": self.ok,
            "parameters": len(self.common),
            "sha256": self.digests,
            "only_first": self.only_first,
            "only_second": self.only_second,
            "different": different,
            **({"logits": vars(self.logits)} if self.logits else {}),
        }

    def __str__(self) -> str:
        different = self.different
        lines = [f"{len(self.common) - len(different)} of {len(self.common)} parameters are the same"]
        for side, names in (("first", self.only_first), ("second", self.only_second)):
            more = " ..." if len(names) > _SHOWN_NAMES else ""
            lines += [f"only in the {side}: {', '.join(names[:_SHOWN_NAMES])}{more}"] if names else []
        for ours, pair in list(different.items())[:_SHOWN_TENSORS]:
            lines.append(f"  {ours}: {pair.first} / {pair.second}, largest difference {pair.largest_difference}")
        if len(different) > _SHOWN_TENSORS:
            lines.append(f"  and {len(different) - _SHOWN_TENSORS} more")
        lines += [f"sha256 {digest}" for digest in dict.fromkeys(self.digests)]
        if self.logits:
            lines.append(
                f"logits: largest difference {self.logits.largest_difference:.3g} "
                f"(largest logit {self.logits.largest:.3g})"
            )
        return "\n".join([*lines, "the same" if self.ok else "NOT the same"])


def verify(path: Path, base: Path | None, *, workers: int) -> Verification:
    """Read everything in a checkpoint.

    Args:
        path: see `open_checkpoint`, as `base`.

    Raises:
        ValueError: something is damaged.
    """
    kind, spec = open_checkpoint(path, base)
    manifest = Manifest.of(spec.folder if isinstance(spec, CheckpointSpec) else path)
    if manifest is not None:
        manifest.check_files(weights=True)
    with spec.open() as source:
        identities = in_threads(lambda ours: tensor_identity(source.parameter(ours)), source.names(), workers=workers)
    checksums = "manifest" if manifest else "CRC-32 of each record" if kind == "checkpoint" else "none"
    return Verification(kind, len(identities), combined_digest(identities), checksums)


def compare(first: SourceSpec, second: SourceSpec, *, workers: int, logits: bool = False) -> Comparison:
    """Compare two checkpoints, parameter by parameter, in our names."""
    with first.open() as a, second.open() as b:
        names = [set(source.names()) for source in (a, b)]

        def pair(ours: str) -> TensorPair:
            left, right = a.parameter(ours), b.parameter(ours)
            identities = tensor_identity(left), tensor_identity(right)
            difference = None
            if identities[0] != identities[1] and left.shape == right.shape:
                # In float64, where the difference of two smaller floats is exact.
                difference = float((left.double() - right.double()).abs().max())
            return TensorPair(*identities, difference)

        common = in_threads(pair, sorted(names[0] & names[1]), workers=workers)
    difference = compare_logits(first, second) if logits else None
    return Comparison(common, sorted(names[0] - names[1]), sorted(names[1] - names[0]), difference)


def compare_logits(first: SourceSpec, second: SourceSpec) -> LogitDifference:
    """Compute both models' logits in fp32 for one random prompt with an image."""
    # megatron-core takes seconds to import, which only this needs.
    from megatron_r1v2.checkpoint.logits import logits_of_both

    one, two = logits_of_both(first, second)
    return LogitDifference(float(one.abs().max()), float((one - two).abs().max()))
