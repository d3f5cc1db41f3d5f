"""Wall time of GRPO steps on two ranks with uneven response lengths, with and without segments, in turns.

`python -m benchmarks.segments --run runs/digits --output benchmarks/results/segments_cpu.json` takes the MPO model of a
finished demo. At a high temperature some of its responses end early and some never: the rank with the longest one makes
the other wait. The learning rate is so small that both ways train the same model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

_ROOT = Path(__file__).parents[1]
_MEASURES = ("timing_s/step", "timing_s/generate", "rollout/wait_s/max", "rollout/tokens", "response_length/max")


def run_steps(arguments: argparse.Namespace, segment_tokens: int, folder: Path) -> list[dict[str, float]]:
    """Run GRPO on two ranks and return the metrics of each step.

    Raises:
        subprocess.CalledProcessError: the run failed; its output is printed.
    """
    demo = arguments.run.resolve()
    command = (
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "megatron_r1v2", "grpo", str(_ROOT / "examples/digits/grpo.yaml")),
        f"run.output_dir={folder}",
        f"model.hf_path={demo / 'base'}",
        f"model.checkpoint={demo / 'mpo'}",
        f"data.train={demo / 'shards/grpo'}",
        f"generation.temperature={arguments.temperature}",
        f"generation.max_response_tokens={arguments.longest}",
        f"generation.segment_tokens={segment_tokens}",
        f"train.steps={arguments.steps}",
        f"train.prompts_per_step={arguments.prompts}",
        "train.learning_rate=1.0e-9",
        "train.min_learning_rate=0.0",
        "train.warmup_steps=0",
        "checkpoint.every_steps=0",
        "evaluation.every_steps=0",
        "logging.trackers=[]",
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.stderr.write(done.stdout[-3000:] + done.stderr[-3000:])
        done.check_returncode()
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "timing_s/step" in row]


def summarize(rows: Sequence[Mapping[str, float]], skipped: int) -> dict[str, float]:
    """Return the medians of the steps after the first ones, and the seconds of 1,000 response tokens over them."""
    kept = rows[skipped:]
    medians = {name: statistics.median(row[name] for row in kept) for name in _MEASURES if name in kept[0]}
    seconds, tokens = (sum(row[name] for row in kept) for name in ("timing_s/step", "rollout/tokens"))
    return {**medians, "steps": len(kept), "seconds of 1,000 response tokens": 1000 * seconds / tokens}


def main(argv: Sequence[str] | None = None) -> None:
    """Run both ways in turns; add the measurements to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/digits"), help="folder of a finished demo")
    parser.add_argument("--output", type=Path, required=True, help="JSON file, to which each call adds its turns")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--skipped", type=int, default=6, help="first steps, in which segments have not filled up")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--longest", type=int, default=384)
    parser.add_argument("--segment", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.6)
    arguments = parser.parse_args(argv)
    found = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
    for _ in range(arguments.turns):
        turn: dict[str, object] = {
            "date": time.strftime("%Y-%m-%d %H:%M"),
            "load": os.getloadavg()[0],
            "torch": torch.__version__,
            "settings": {name: value for name, value in vars(arguments).items() if name not in ("run", "output")},
        }
        for name, tokens in (("whole", 0), ("segments", arguments.segment)):
            with tempfile.TemporaryDirectory() as folder:
                turn[name] = summarize(run_steps(arguments, tokens, Path(folder) / "run"), arguments.skipped)
        found.append(turn)
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")
        sys.stdout.write(json.dumps(turn, indent=1) + "\n")


if __name__ == "__main__":
    main()
