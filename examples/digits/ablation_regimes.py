"""Sets of prompts of which about a half, a quarter and a tenth teach a model something, made from its own responses.

The responses to a prompt but for the last eight sort it: into those with both right and wrong ones, which teach, and
the rest. The last eight, a group of GRPO, say how often a prompt of either kind teaches, without the bias of having
been sorted by it. Both kinds are then mixed in shares that give the wanted fraction of effective responses. The rest
teach now and then too: where more often than wanted, a set has them alone, and regimes.json says what to expect.

python -m examples.digits.ablation_regimes ROWS.rollouts.jsonl --data runs/shards/grpo --output runs/regimes
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_r1v2.data.samples import parse_sample
from megatron_r1v2.data.shards import fill_shards
from megatron_r1v2.data.stream import read_shards
from megatron_r1v2.evaluation.filter_prompts import read_results
from megatron_r1v2.resilience.files import atomic_folder, write_json

REGIMES: Mapping[str, float] = {"easy": 0.5, "middle": 0.25, "hard": 0.1}
"""The wanted fraction of effective responses in the first steps, by name: the fewer, the harder it is to learn."""
GROUP = 8
"""Responses to a prompt in GRPO."""
PROMPTS = 360
"""Of each set: alike, so that no arm sees a prompt more often than another."""


@dataclass(frozen=True)
class Regime:
    """The mixture of one set."""

    name: str
    wanted: float
    expected: float
    """Fraction of effective responses by the responses that did not sort the prompts."""
    teaching_share: float
    """Prompts with right and wrong ones among the responses that sort, over all."""
    prompts: int


def is_effective(responses: Sequence[bool]) -> bool:
    """Return whether a group of responses has right and wrong ones."""
    return 0 < sum(responses) < len(responses)


def plan_regimes(results: Mapping[str, Sequence[bool]], prompts: int) -> list[tuple[Regime, list[str]]]:
    """Return each regime with the keys of its prompts, in the order of the results.

    Args:
        results: responses to each prompt, right or wrong, more than a group.
        prompts: of each regime.

    Raises:
        ValueError: the results hold too few prompts of a kind.
    """
    teaching, settled = [], []
    often: dict[bool, list[bool]] = {True: [], False: []}
    for key, responses in results.items():
        teaches = is_effective(responses[:-GROUP])
        (teaching if teaches else settled).append(key)
        often[teaches].append(is_effective(responses[-GROUP:]))
    if not teaching or not settled:
        raise ValueError(
            f"of {len(results)} prompts {len(teaching)} have right and wrong responses; some must, not all"
        )
    high, low = (sum(often[kind]) / len(often[kind]) for kind in (True, False))
    plans = []
    for name, wanted in REGIMES.items():
        share = min(1.0, max(0.0, (wanted - low) / (high - low))) if high > low else 0.0
        keys = _draw(name, teaching, settled, share=share, prompts=prompts)
        expected = share * high + (1 - share) * low
        regime = Regime(name, wanted, round(expected, 4), round(share, 4), prompts)
        plans.append((regime, [key for key in results if key in keys]))
    return plans


def _draw(name: str, teaching: Sequence[str], settled: Sequence[str], *, share: float, prompts: int) -> set[str]:
    """Return the keys of a regime's prompts, a share of them from those that teach."""
    num_teaching = round(share * prompts)
    if num_teaching > len(teaching) or prompts - num_teaching > len(settled):
        raise ValueError(
            f"regime {name!r} needs {num_teaching} prompts that teach and {prompts - num_teaching} others, there are "
            f"{len(teaching)} and {len(settled)}; ask for fewer prompts"
        )
    generator = random.Random(f"regime-{name}")
    return {*generator.sample(teaching, num_teaching), *generator.sample(settled, prompts - num_teaching)}


def write_regimes(rows: Path, data: Path, output: Path, *, prompts: int = PROMPTS) -> list[Regime]:
    """Write a folder of shards for each regime, and regimes.json; the folder appears when all are complete.

    Args:
        rows: `evaluation-NAME.rollouts.jsonl` of the model that training starts from.
        data: the data set that was evaluated.

    Raises:
        ValueError: the output exists, or the rows are too few for a regime.
    """
    plans = plan_regimes(read_results([rows]), prompts)
    with atomic_folder(output) as unfinished:
        for regime, keys in plans:
            wanted, folder = set(keys), unfinished / regime.name
            folder.mkdir()
            fill_shards(folder, (sample for sample in read_shards(data, parse_sample) if sample.key in wanted))
        write_json(unfinished / "regimes.json", [asdict(regime) for regime, _ in plans])
    return [regime for regime, _ in plans]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.digits.ablation_regimes",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("rows", type=Path, help="evaluation-NAME.rollouts.jsonl")
    parser.add_argument("--data", type=Path, required=True, help="the data set that was evaluated")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="of each regime (%(default)s)")
    options = parser.parse_args(arguments)
    for regime in write_regimes(options.rows, options.data, options.output, prompts=options.prompts):
        share, expected = f"{regime.teaching_share:.0%}", f"{regime.expected:.1%}"
        print(f"{regime.name}: {regime.prompts} prompts, {share} of them teach, {expected} effective expected")


if __name__ == "__main__":
    main()
