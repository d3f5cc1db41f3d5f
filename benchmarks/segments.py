"""Wall time of GRPO steps on two ranks with uneven response lengths, with and without segments, in turns.

    python -m benchmarks.segments --run runs/digits --output benchmarks/results/segments_cpu.json

It takes the MPO model of a finished demo. At temperature 3 its responses have 8 to about 300 tokens, 58 on average, and
the last ones of a step decode alone. The learning rate is so small that both ways sample from the same model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

ROOT = Path(__file__).parents[1]
_MEASURES = ("timing_s/step", "timing_s/generate", "timing_s/log_probs", "timing_s/update", "rollout/wait_s/max")


def run_steps(options: argparse.Namespace, segment_tokens: int, folder: Path) -> list[dict[str, float]]:
    """Run GRPO on two ranks and return the metrics of each step.

    Args:
        segment_tokens: 0: without segments.
        folder: of the run.

    Raises:
        subprocess.CalledProcessError: the run failed; the end of its output is shown.
    """
    demo = options.run.resolve()
    command = (
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "megatron_r1v2", "grpo", str(ROOT / "examples/digits/grpo.yaml")),
        f"run.output_dir={folder}",
        f"model.hf_path={demo / 'base'}",
        f"model.checkpoint={demo / 'mpo'}",
        f"data.train={demo / 'shards/grpo'}",
        f"generation.temperature={options.temperature}",
        f"generation.max_response_tokens={options.longest}",
        f"generation.segment_tokens={segment_tokens}",
        f"train.steps={options.steps}",
        f"train.prompts_per_step={options.prompts}",
        "train.learning_rate=1.0e-9",
        "train.min_learning_rate=0.0",
        "train.warmup_steps=0",
        "checkpoint.every_steps=0",
        "evaluation.every_steps=0",
        "logging.trackers=[]",
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.stderr.write(done.stdout[-3000:] + done.stderr[-3000:])
        done.check_returncode()
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "timing_s/step" in row]


def summarize(rows: Sequence[Mapping[str, float]], skipped: int) -> dict[str, float]:
    """Return medians of the steps after the first ones, and their seconds for 1,000 generated tokens."""
    # The last step also saves a checkpoint.
    kept = rows[skipped:-1]
    medians = {name: statistics.median(row[name] for row in kept) for name in _MEASURES}
    seconds = sum(row["timing_s/step"] for row in kept)
    # Of the step itself: the tokens of the groups that ended in it may be of earlier steps.
    tokens = sum(row["perf/generated_tokens_per_second"] * row["timing_s/generate"] for row in kept)
    longest = max(row.get("response_length/max", 0) for row in kept)
    lengths = {"tokens a step": tokens / len(kept), "longest response": longest}
    return {**medians, **lengths, "steps": len(kept), "seconds of 1,000 tokens": 1000 * seconds / tokens}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run both ways in turns; add the measurements to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/digits"), help="folder of a finished demo")
    parser.add_argument("--output", type=Path, required=True, help="JSON file, to which each call adds its turns")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--skipped", type=int, default=10, help="first steps, in which segments fill up")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--longest", type=int, default=384)
    parser.add_argument("--segment", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=3.0)
    options = parser.parse_args(arguments)
    found = json.loads(options.output.read_text()) if options.output.exists() else []
    for _ in range(options.turns):
        turn: dict[str, object] = {
            "date": time.strftime("%Y-%m-%d %H:%M"),
            "load": os.getloadavg()[0],
            "torch": torch.__version__,
            "settings": {name: value for name, value in vars(options).items() if name not in ("run", "output")},
        }
        for name, tokens in (("whole", 0), ("segments", options.segment)):
            with TemporaryDirectory() as folder:
                turn[name] = summarize(run_steps(options, tokens, Path(folder) / "run"), options.skipped)
        found.append(turn)
        options.output.write_text(json.dumps(found, indent=1) + "\n")
        sys.stdout.write(json.dumps(turn, indent=1) + "\n")


if __name__ == "__main__":
    main()
