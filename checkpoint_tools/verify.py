"""Check that one checkpoint is undamaged, or that two of any kind hold the same model, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from checkpoint_tools.command_line import explained_errors, parser_of
from megatron_r1v2.checkpoint.detection import open_any
from megatron_r1v2.checkpoint.hf.safetensors_files import tensor_info
from megatron_r1v2.checkpoint.manifest import Manifest, combined, in_threads, sha256, tensor_entry
from megatron_r1v2.checkpoint.sources import CheckpointSpec, Source, SourceSpec

EXAMPLE = """example:
  python -m checkpoint_tools.verify r1v2-38b
  python -m checkpoint_tools.verify r1v2-38b r1v2-38b-megatron
  python -m checkpoint_tools.verify export other-export --logits

Takes Hugging Face folders in either layout, runs, checkpoints and exported parts (with --base). Of one: every tensor is
read; what our tools wrote is compared with its checksums. What others wrote is checked as far as the format allows:
torch_dist has a CRC-32 in every record, safetensors none, so a flipped bit in such a folder stays unseen unless it is
compared with a second copy. Of two: every parameter must have the same shape, dtype and bits. Exit code 0: all is well;
1: it is not."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = parser_of("verify", __doc__, EXAMPLE)
    parser.add_argument("first", type=Path, help="folder, run or checkpoint")
    parser.add_argument("second", type=Path, nargs="?", help="what to compare it with")
    parser.add_argument("--base", type=Path, help="model that a checkpoint or exported parts belong to")
    parser.add_argument("--logits", action="store_true", help="also compute both models' logits for one random input")
    parser.add_argument("--workers", type=int, default=2, help="threads (default: 2)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    if options.logits and options.second is None:
        parser.error("--logits needs two checkpoints")
    with explained_errors(parser):
        if options.second is None:
            found = check_one(options.first, options.base, workers=options.workers)
        else:
            specs = [open_any(path, options.base)[1] for path in (options.first, options.second)]
            found = compare(*specs, workers=options.workers)
            if options.logits:
                found["logits"] = compare_logits(*specs)
        print(json.dumps(found, indent=2) if options.json else told(found))
    if not found["ok"]:
        parser.exit(1)


def check_one(path: Path, base: Path | None, *, workers: int) -> dict[str, Any]:
    """Read everything in a checkpoint.

    Args:
        path: what the user names.
        base: see `open_any`.
        workers: threads.

    Returns:
        What was found: kind, number of parameters, checksum, and whether there were checksums to compare with.

    Raises:
        ValueError: something is damaged.
    """
    kind, spec = open_any(path, base)
    manifest = Manifest.of(spec.folder if isinstance(spec, CheckpointSpec) else path)
    if manifest is not None:
        manifest.check_files()
    with spec.open() as source:
        entries = in_threads(lambda ours: _entry(source, ours), source.names(), workers=workers)
    return {
        "ok": True,
        "kind": kind,
        "parameters": len(entries),
        "sha256": combined(entries),
        "checksums": "manifest" if manifest else "CRC-32 of each record" if kind == "checkpoint" else "none",
    }


def compare(first: SourceSpec, second: SourceSpec, *, workers: int) -> dict[str, Any]:
    """Compare two checkpoints, parameter by parameter, in our names.

    Args:
        first: how to open one.
        second: how to open the other.
        workers: threads.

    Returns:
        The checksum of each, the names that only one has, and the parameters that differ with the largest difference.
    """
    with first.open() as a, second.open() as b:
        names = [set(source.names()) for source in (a, b)]

        def both(ours: str) -> dict[str, Any]:
            left, right = a.parameter(ours), b.parameter(ours)
            entries = [tensor_entry(tensor_info(tensor), sha256(tensor)) for tensor in (left, right)]
            difference = None
            if entries[0] != entries[1] and left.shape == right.shape:
                difference = float((left.double() - right.double()).abs().max())
            return {"entries": entries, "largest_difference": difference}

        found = in_threads(both, sorted(names[0] & names[1]), workers=workers)
    different = {
        ours: {
            "first": _short(pair["entries"][0]),
            "second": _short(pair["entries"][1]),
            "largest_difference": pair["largest_difference"],
        }
        for ours, pair in found.items()
        if pair["entries"][0] != pair["entries"][1]
    }
    return {
        "ok": not different and names[0] == names[1],
        "parameters": len(found),
        "sha256": [combined({ours: pair["entries"][side] for ours, pair in found.items()}) for side in (0, 1)],
        "only_first": sorted(names[0] - names[1]),
        "only_second": sorted(names[1] - names[0]),
        "different": different,
    }


def compare_logits(first: SourceSpec, second: SourceSpec) -> dict[str, float]:
    """Compute both models' logits in fp32 for one random prompt with an image.

    Returns:
        The largest logit and the largest difference.
    """
    # megatron-core takes seconds to import, which only this needs.
    from megatron_r1v2.checkpoint.logits import logits_of_both

    one, two = logits_of_both(first, second)
    return {"largest": float(one.abs().max()), "largest_difference": float((one - two).abs().max())}


def told(found: dict[str, Any]) -> str:
    """Return what was found, in words."""
    if "kind" in found:
        return (
            f"{found['kind']}: {found['parameters']} parameters read, sha256 {found['sha256']}\n"
            f"compared with: {found['checksums']}"
        )
    lines = [f"{found['parameters'] - len(found['different'])} of {found['parameters']} parameters are the same"]
    for side in ("first", "second"):
        names = found[f"only_{side}"]
        lines += [f"only in the {side}: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"] if names else []
    for ours, pair in list(found["different"].items())[:20]:
        lines.append(f"  {ours}: {pair['first']} / {pair['second']}, largest difference {pair['largest_difference']}")
    if len(found["different"]) > 20:
        lines.append(f"  and {len(found['different']) - 20} more")
    lines += [f"sha256 {digest}" for digest in dict.fromkeys(found["sha256"])]
    if "logits" in found:
        lines.append(
            f"logits: largest difference {found['logits']['largest_difference']:.3g} "
            f"(largest logit {found['logits']['largest']:.3g})"
        )
    return "\n".join([*lines, "the same" if found["ok"] else "NOT the same"])


def _entry(source: Source, ours: str) -> dict[str, Any]:
    tensor: torch.Tensor = source.parameter(ours)
    return tensor_entry(tensor_info(tensor), sha256(tensor))


def _short(entry: dict[str, Any]) -> str:
    return f"{entry['dtype']} {entry['shape']} {entry['sha256'][:12]}"


if __name__ == "__main__":
    main()
