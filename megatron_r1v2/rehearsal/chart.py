"""A chart of a rank's memory over the step, as SVG: stacked by what holds it, phases named along the axis."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from megatron_r1v2.planning.memory import GIB
from megatron_r1v2.rehearsal.ledger import CATEGORIES, Sample

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 900, 420, 60, 40, 90
# Distinct for readers who do not tell red from green.
_COLOURS = dict(
    zip(CATEGORIES, ("#4477aa", "#66ccee", "#228833", "#bbbbbb", "#ccbb44", "#aa3377", "#ee6677"), strict=True)
)


def memory_chart(title: str, samples: Sequence[Sample], limit: int) -> str:
    """Draw the course of a rank's memory.

    Args:
        limit: bytes that the GPU holds, drawn as a line.
    """
    if not samples:
        raise ValueError("there is nothing to draw: the rehearsal has seen no tensor")
    highest = max(limit, *(sum(sample.held.values()) for sample in samples))
    x_of = [_LEFT + (_WIDTH - _LEFT - 10) * index / max(1, len(samples) - 1) for index in range(len(samples))]

    def y_of(size: int) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * size / highest

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        f'font-size="11"><rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>'
        f'<text x="{_LEFT}" y="20" font-size="14">{escape(title)}</text>'
    ]
    below = [0] * len(samples)
    for number, category in enumerate(CATEGORIES):
        above = [low + sample.held.get(category, 0) for low, sample in zip(below, samples, strict=True)]
        upper = [f"{x:.1f},{y_of(size):.1f}" for x, size in zip(x_of, above, strict=True)]
        lower = [f"{x:.1f},{y_of(size):.1f}" for x, size in zip(x_of, below, strict=True)]
        parts.append(f'<polygon fill="{_COLOURS[category]}" points="{" ".join([*upper, *reversed(lower)])}"/>')
        x = _LEFT + number * 118
        parts.append(
            f'<rect x="{x}" y="{_HEIGHT - 18}" width="10" height="10" fill="{_COLOURS[category]}"/>'
            f'<text x="{x + 14}" y="{_HEIGHT - 9}">{category.replace("_", " ")}</text>'
        )
        below = above
    parts.append(
        f'<line x1="{_LEFT}" x2="{_WIDTH - 10}" y1="{y_of(limit):.1f}" y2="{y_of(limit):.1f}" stroke="black" '
        f'stroke-dasharray="4"/><text x="{_WIDTH - 12}" y="{y_of(limit) - 4:.1f}" text-anchor="end">'
        f"{limit / GIB:.1f} GiB, what tensors may take</text>"
        f'<text x="{_LEFT - 6}" y="{y_of(highest) + 4:.1f}" text-anchor="end">{highest / GIB:.1f}</text>'
        f'<text x="{_LEFT - 6}" y="{y_of(0):.1f}" text-anchor="end">0 GiB</text>'
    )
    return "".join([*parts, *_phase_marks(samples, x_of), "</svg>\n"])


def _phase_marks(samples: Sequence[Sample], x_of: Sequence[float]) -> list[str]:
    marks = []
    last = ""
    for sample, x in zip(samples, x_of, strict=True):
        if sample.phase == last:
            continue
        last = sample.phase
        y = _HEIGHT - _BOTTOM
        marks.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{y}" stroke="#888888" stroke-width="0.5"/>'
            f'<text transform="translate({x + 3:.1f},{y + 8}) rotate(35)">{escape(sample.phase)}</text>'
        )
    return marks
