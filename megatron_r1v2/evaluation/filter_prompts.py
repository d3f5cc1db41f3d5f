"""Prompts that a model answers sometimes rightly and sometimes wrongly: the work of `r1v2 filter-prompts`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_r1v2.data.samples import ShardSample, parse_sample
from megatron_r1v2.data.shards import fill_shards
from megatron_r1v2.data.stream import read_shards
from megatron_r1v2.evaluation.benchmarks.files import read_rows
from megatron_r1v2.resilience.files import atomic_folder, write_json
from megatron_r1v2.rl.prompt_pool import PoolPrompt, filtered_prompt_pool

POOL_FILE = "pool.json"

PoolRecord = dict[str, int | list[dict[str, object]]]
"""The content of pool.json: counts of prompts, and those that are kept."""


def read_results(files: Iterable[Path]) -> dict[str, list[bool]]:
    """Read the verdicts of the answer rules, by prompt.

    Args:
        files: `evaluation-NAME.rollouts.jsonl` of one model, different ones.

    Raises:
        ValueError: a file is missing, given twice, damaged, or of something else than an evaluation.
    """
    results: dict[str, list[bool]] = defaultdict(list)
    seen: set[Path] = set()
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is not there; python -m megatron_r1v2 evaluate writes it")
        if file.resolve() in seen:
            raise ValueError(f"{file} is given twice: its responses would count double")
        seen.add(file.resolve())
        for place, row in read_rows(file):
            key, right = row.get("prompt_key"), row.get("rule_correct")
            if not isinstance(key, str) or not isinstance(right, bool):
                raise ValueError(
                    f"{place}: no prompt_key and rule_correct; give evaluation-NAME.rollouts.jsonl as "
                    "python -m megatron_r1v2 evaluate writes it"
                )
            results[key].append(right)
    return results


def write_pool(results: Mapping[str, Sequence[bool]], data: Path, output: Path, *, most: int = 0) -> PoolRecord:
    """Write the prompts that are worth training on, in the order of their data set.

    Args:
        most: keep so many, the most telling; 0: all.

    Raises:
        ValueError: the output exists, a prompt is not in the data set, or none is worth training on.
    """
    if output.exists():
        raise ValueError(f"{output} exists already; choose another folder or delete it first")
    keys = [key for key, of_prompt in results.items() for _ in of_prompt]
    effective = filtered_prompt_pool(keys, [right for of_prompt in results.values() for right in of_prompt])
    kept = effective[:most] if most else effective
    if not kept:
        raise ValueError(
            f"none of the {len(results)} prompts has both right and wrong responses (there are {len(keys)} responses); "
            "sample more of them (evaluation.runs), at a higher evaluation.temperature, or of another model"
        )
    with atomic_folder(output) as shards:
        wanted = {prompt.prompt_key for prompt in kept}
        found: set[str] = set()

        def wanted_samples() -> Iterator[ShardSample]:
            for sample in read_shards(data, parse_sample):
                # Also of the prompts that are dropped: a response to a prompt of other data must not pass unseen.
                found.add(sample.key)
                if sample.key in wanted:
                    yield sample

        fill_shards(shards, wanted_samples())
        unknown = results.keys() - found
        if unknown:
            raise ValueError(
                f"{len(unknown)} prompts of the responses are not in {data}, {min(unknown)!r} for one; give the data "
                "set that was evaluated (evaluation.data)"
            )
        record = _record(results, kept, len(effective), absent=len(found - results.keys()))
        write_json(shards / POOL_FILE, record)
    return record


def _record(
    results: Mapping[str, Sequence[bool]], kept: Sequence[PoolPrompt], num_effective: int, *, absent: int
) -> PoolRecord:
    return {
        "prompts": len(results) + absent,
        "without responses": absent,
        "always right": sum(all(of_prompt) for of_prompt in results.values()),
        "always wrong": sum(not any(of_prompt) for of_prompt in results.values()),
        "sometimes right": num_effective,
        "kept": [asdict(prompt) for prompt in kept],
    }
