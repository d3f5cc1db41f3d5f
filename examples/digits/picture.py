"""The picture of the README: Pass@1 over the stages of the demo, and answers to the same question before and after.

python -m examples.digits.picture --run runs/digits/grpo --output docs/demo.svg
"""

from __future__ import annotations

import argparse
import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from megatron_r1v2.evaluation.pass_at_1 import EvaluationResult, read_evaluation
from megatron_r1v2.report.read import Json
from megatron_r1v2.resilience.files import write_file

STAGES = ("aligned", "mpo", "grpo")
LABELS = ("adapter aligned", "after MPO", "after GRPO")
PAIRS_SHOWN = 3
RIGHT, WRONG = "#1a7f37", "#cf222e"


def turned_right(folder: Path) -> Iterator[tuple[Json, Json]]:
    """Yield the first responses to prompts that were answered wrongly before and rightly after."""
    before, after = (first_responses(folder / f"evaluation-{name}.rollouts.jsonl") for name in (STAGES[0], STAGES[-1]))
    for key, row in before.items():
        if key in after and not row["correct"] and after[key]["correct"] and "image_png" in row:
            yield row, after[key]


def first_responses(path: Path) -> Mapping[str, Json]:
    """Return the first response to each prompt, by key; the picture is kept where the file has it."""
    rows: dict[str, Json] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows.setdefault(row["prompt_key"], row)
    return rows


def draw_picture(results: Sequence[EvaluationResult], pairs: Sequence[tuple[Json, Json]]) -> Figure:
    """Return the figure: bars with their intervals on the left, a row for each pair on the right."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    layout = [["bars", f"image{row}", f"text{row}"] for row in range(len(pairs))] or [["bars"]]
    bars, *rows = figure.subplot_mosaic(layout, width_ratios=[4, 2, 5][: len(layout[0])]).values()
    draw_bars(bars, results)
    for (before, after), image, text in zip(pairs, rows[::2], rows[1::2], strict=True):
        png = base64.b64decode(str(before["image_png"]))
        image.imshow(np.asarray(Image.open(io.BytesIO(png)).convert("RGB")))
        image.axis("off")
        text.axis("off")
        text.text(0, 0.85, str(before["question"]), fontsize=9, weight="bold", va="center")
        for place, (name, row) in enumerate((("before", before), ("after", after))):
            words = f"{name}: {row['text']}"
            text.text(0, 0.5 - 0.33 * place, words, fontsize=8, color=(WRONG, RIGHT)[place], family="monospace")
    return figure


def draw_bars(axes: Axes, results: Sequence[EvaluationResult]) -> None:
    """Draw Pass@1 and its 95 % interval of each stage."""
    values = [100 * result.pass_at_1 for result in results]
    ends = [result.pass_at_1_interval or (result.pass_at_1, result.pass_at_1) for result in results]
    errors = [
        [value - 100 * low for value, (low, _) in zip(values, ends, strict=True)],
        [100 * high - value for value, (_, high) in zip(values, ends, strict=True)],
    ]
    drawn = axes.bar(LABELS, values, yerr=errors, capsize=4, color=["#b6c2cf", "#6e9bd1", "#1f5fa8"], width=0.6)
    axes.bar_label(drawn, [f"{value:.1f} %" for value in values], padding=3)
    axes.set_ylim(0, 110)
    axes.set_ylabel("Pass@1 on held-out handwriting, %")
    axes.spines[["top", "right"]].set_visible(False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.digits.picture", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="GRPO run of the demo")
    parser.add_argument("--output", type=Path, required=True, help="SVG file")
    options = parser.parse_args(arguments)
    results = [read_evaluation(options.run / f"evaluation-{name}.json") for name in STAGES]
    pairs = list(turned_right(options.run))[:PAIRS_SHOWN]
    svg = io.StringIO()
    # Without a date, with given names of elements, the same run gives the same file.
    with matplotlib.rc_context({"svg.hashsalt": "demo", "svg.fonttype": "none"}):
        draw_picture(results, pairs).savefig(
            svg, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    write_file(options.output, svg.getvalue())
    print(f"picture: {options.output}")


if __name__ == "__main__":
    main()
