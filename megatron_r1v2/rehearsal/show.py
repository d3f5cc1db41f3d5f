"""The findings of a rehearsal, as tables for people or as JSON for programs."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import asdict

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from megatron_r1v2.config.choices import Fp8, StageName
from megatron_r1v2.planning.memory import GIB, RankMemory
from megatron_r1v2.rehearsal.collectives import count_by_kind
from megatron_r1v2.rehearsal.ledger import CATEGORIES, PhaseMemory
from megatron_r1v2.rehearsal.rank import RankResult
from megatron_r1v2.rehearsal.run import Rehearsal, planned_flops, planned_memory

NOT_PROVEN = (
    "Not proven by a rehearsal: kernels and their workspace, numbers, speed, CUDA graphs, TransformerEngine and FP8, "
    "gaps of the allocator, NCCL's buffers."
)
_WIDTH = 110
_SHORT = {
    "parameters": "params",
    "gradients": "grads",
    "optimizer": "optim.",
    "buffers": "buffers",
    "kv_cache": "KV",
    "image_features": "images",
    "activations": "activ.",
}


def print_rehearsal(found: Rehearsal, console: Console | None = None) -> None:
    """Print a rehearsal to a console; None: standard output."""
    # Into a file or a job's log, tables as wide as they are.
    console = console or Console(width=None if sys.stdout.isatty() else _WIDTH)
    plan = found.plan
    layout = plan.layout
    console.print(
        f"[bold]{plan.name}[/bold], rehearsed as TP{layout.tensor} PP{layout.pipeline} DP{layout.data} on "
        f"{plan.cluster.gpus} x {plan.cluster.gpu_memory_gib:g} GiB"
    )
    for sentence in found.data:
        console.print(f"- {sentence}", highlight=False, markup=False, soft_wrap=True)
    for rank in found.ranks:
        console.print(_memory_table(found, rank))
        for phase in _fullest(rank):
            console.print(f"  fullest in {phase.name}: {phase.line}", highlight=False, soft_wrap=True, markup=False)
        console.print(_rank_summary(rank), highlight=False, soft_wrap=True)
        if rank.error:
            console.print(f"[red]{rank.place}, {rank.error_phase}[/red]: ", end="")
            console.print(rank.error, markup=False, highlight=False, soft_wrap=True)
    console.print(_collective_table(found))
    for mismatch in found.mismatches:
        console.print(f"would hang: {mismatch}", style="red", highlight=False, soft_wrap=True, markup=False)
    console.print("Questions that a fake cannot answer, and the rule that did (how often):", highlight=False)
    lines = _lines_of_rules(found)
    for rule, count in _rules(found).most_common():
        (line, most), *others = lines[rule].most_common()
        more = f", and {len(others)} other places" if others else ""
        console.print(f"- {rule} ({count}): {line} ({most}){more}", highlight=False, markup=False, soft_wrap=True)
    console.print("Settings that the rehearsal changes:", highlight=False)
    for change in found.changes:
        console.print(f"- {change}", highlight=False, markup=False, soft_wrap=True)
    console.print(_verdict(found), highlight=False, soft_wrap=True)
    for note in _notes(found):
        console.print(f"- {note}", highlight=False, soft_wrap=True)
    console.print(NOT_PROVEN, highlight=False, soft_wrap=True)


def as_json(found: Rehearsal) -> dict[str, object]:
    """Return a rehearsal as JSON values, in bytes."""
    return {
        "name": found.plan.name,
        "passed": found.passed,
        "layout": asdict(found.plan.layout),
        "limit_bytes": found.plan.cluster.limit,
        "ranks": [_rank_json(found, rank) for rank in found.ranks],
        "mismatches": list(found.mismatches),
        "rules": dict(_rules(found)),
        "changes": list(found.changes),
        "data": list(found.data),
        "notes": [*_notes(found), NOT_PROVEN],
    }


def _memory_table(found: Rehearsal, rank: RankResult) -> Table:
    has_fp8 = found.plan.work.fp8 is not Fp8.none
    title = f"{rank.place}: GiB at the fullest moment of each phase"
    table = Table(title=title, box=SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("phase", no_wrap=True)
    kinds = [_SHORT[category] for category in CATEGORIES]
    for name in (*kinds, *["FP8"] * has_fp8, "total", "plan", "most", "TFLOP", "plan"):
        table.add_column(name, justify="right")
    flops = planned_flops(found.plan, found.step, rank.stage)
    for phase in rank.phases:
        peak = found.peak(rank, phase)
        numbers = [f"{phase.at_peak.get(category, 0) / GIB:.2f}" for category in CATEGORIES]
        if has_fp8:
            numbers.append(f"{found.fp8_bytes(rank, phase) / GIB:.2f}")
        planned = [planned_memory(ranks, rank, phase) for ranks in (found.planned, found.plan.memory.ranks)]
        plan, most = (f"{memory.total / GIB:.2f}" if memory is not None else "" for memory in planned)
        # Of the first step: the second one has samples of the buffer too.
        of_plan = f"{flops.pop(phase.name) / 1e12:.1f}" if phase.name in flops else ""
        style = "red" if peak > found.plan.cluster.limit else ""
        table.add_row(
            phase.name, *numbers, f"{peak / GIB:.2f}", plan, most, f"{phase.flops / 1e12:.1f}", of_plan, style=style
        )
    return table


def _fullest(rank: RankResult) -> list[PhaseMemory]:
    """Return the phases with the highest peaks, the outermost left out: it has no line of its own."""
    inner = [phase for phase in rank.phases[1:] if phase.line]
    return sorted(inner, key=lambda phase: -phase.peak)[:3]


def _rank_summary(rank: RankResult) -> str:
    steps = ", ".join(f"{count} {kind}" for kind, count in sorted(rank.engine_steps.items()))
    engine = f"  engine steps: {steps}\n" if steps else ""
    return engine + (
        f"  in the host's memory: {rank.host_peak / GIB:.2f} GiB of tensors at most; to a checkpoint: "
        f"{rank.checkpoint_bytes / GIB:.2f} GiB. Rehearsed in {rank.seconds:.0f} s and {rank.own_peak / GIB:.2f} GiB, "
        f"{rank.operators} operators"
    )


def _collective_table(found: Rehearsal) -> Table:
    table = Table(title="Collectives", box=SIMPLE_HEAD, padding=0, show_edge=False)
    for name in ("rank", "kind", "group", "dtype"):
        table.add_column(name)
    for name in ("calls", "GiB"):
        table.add_column(name, justify="right")
    for rank in found.ranks:
        for (kind, size, dtype), (count, num_bytes) in sorted(count_by_kind(rank.collectives).items()):
            table.add_row(str(rank.rank), kind, str(size), dtype, str(count), f"{num_bytes / GIB:.3f}")
    return table


def _rules(found: Rehearsal) -> Counter[str]:
    rules: Counter[str] = Counter()
    for rank in found.ranks:
        for rule, _, count in rank.questions:
            rules[rule] += count
    return rules


def _lines_of_rules(found: Rehearsal) -> dict[str, Counter[str]]:
    """Return how often each line of code asked what a rule answered."""
    lines: dict[str, Counter[str]] = {}
    for rank in found.ranks:
        for rule, line, count in rank.questions:
            lines.setdefault(rule, Counter())[line.partition(" < ")[0]] += count
    return lines


def _verdict(found: Rehearsal) -> str:
    limit = found.plan.cluster.limit / GIB
    failed = [f"{rank.place}, {rank.error_phase}" for rank in found.ranks if rank.error]
    if failed:
        return f"[red]It does not run[/red]: {'; '.join(failed)}"
    if found.mismatches:
        count = len(found.mismatches)
        return f"[red]It would hang[/red]: {count} times ranks call different collectives, or in another order"
    if found.too_full:
        rank, phase = max(found.too_full, key=lambda each: found.peak(*each))
        peak = found.peak(rank, phase) / GIB
        return f"[red]It does not fit[/red]: {rank.place}, {phase.name}: {peak:.1f} of {limit:.1f} GiB"
    phases = ((rank, phase) for rank in found.ranks for phase in rank.phases)
    rank, phase = max(phases, key=lambda each: found.peak(*each))
    peak = found.peak(rank, phase) / GIB
    return (
        f"[green]It runs and fits[/green]: at most {peak:.1f} of {limit:.1f} GiB ({rank.place}, "
        f"{found.plan.cluster.reserve_gib:g} GiB of each GPU are kept for CUDA, NCCL and gaps)"
    )


def _notes(found: Rehearsal) -> list[str]:
    notes = ["two steps, on rows as long as the recipe allows; what lies beside `images` of other prompts is made"]
    if found.makes_weights:
        notes.append(
            "names and shapes of the weights are those of the configuration: no folder of the model was looked at; "
            "without --hf-config that in model.hf_path is"
        )
    layout = found.plan.layout
    if len(found.ranks) == layout.pipeline and layout.tensor * layout.data > 1:
        notes.append(
            "one rank of each pipeline stage: collectives of its tensor- and data-parallel groups are compared with "
            "nobody's, so a rank of these that skips one is not found; --all-ranks compares them"
        )
    if found.plan.work.fp8 is not Fp8.none:
        notes.append(
            "FP8 and TransformerEngine: rehearsed with local layers in bf16; what FP8 adds is the planner's, in every "
            "total"
        )
    if found.plan.work.stage is StageName.reward_model and not found.data:
        positions = found.plan.architecture.language.max_positions
        tokens = min(found.plan.work.response_tokens, positions - found.plan.work.prompt_tokens)
        notes.append(f"nothing limits responses of this stage: made ones have {tokens} tokens; see --data")
    return notes


def _memory_json(planned: RankMemory | None) -> dict[str, object] | None:
    return None if planned is None else {**asdict(planned), "total": planned.total}


def _rank_json(found: Rehearsal, rank: RankResult) -> dict[str, object]:
    phases = []
    flops = planned_flops(found.plan, found.step, rank.stage)
    for phase in rank.phases:
        planned = planned_memory(found.planned, rank, phase)
        most = planned_memory(found.plan.memory.ranks, rank, phase)
        values = {
            "fp8_planned": found.fp8_bytes(rank, phase),
            "planned": _memory_json(planned),
            "planned_most": _memory_json(most),  # of the fullest step
            "planned_flops": flops.pop(phase.name, None),  # of the first step
        }
        phases.append({**asdict(phase), **values})
    return {
        "rank": rank.rank,
        "place": rank.place,
        "phases": phases,
        "collectives": [
            {"kind": kind, "ranks": size, "dtype": dtype, "calls": count, "bytes": num_bytes}
            for (kind, size, dtype), (count, num_bytes) in sorted(count_by_kind(rank.collectives).items())
        ],
        "questions": [{"rule": rule, "line": line, "count": count} for rule, line, count in rank.questions],
        "engine_steps": rank.engine_steps,
        "host_bytes": rank.host_peak,
        "checkpoint_bytes": rank.checkpoint_bytes,
        "seconds": rank.seconds,
        "own_bytes": rank.own_peak,
        "operators": rank.operators,
        "error": rank.error,
        "error_phase": rank.error_phase,
    }
