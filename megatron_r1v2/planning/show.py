"""The presentation of a plan, as tables for people or as JSON for programs."""

from __future__ import annotations

from dataclasses import asdict

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from megatron_r1v2.planning.memory import GIB, MemoryPlan
from megatron_r1v2.planning.plan import Plan
from megatron_r1v2.planning.roofline import StepTime
from megatron_r1v2.planning.search import LayoutCandidate

_COLUMNS = {
    "parameters": "params",
    "gradients": "grads",
    "optimizer": "optim.",
    "activations": "activ.",
    "kv_cache": "KV",
    "image_features": "images",
    "buffers": "buffers",
}


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Print a plan to a console; None: standard output."""
    console = console or Console()
    counts = ", ".join(f"{part.value} {count:,}" for part, count in plan.counts.items())
    layout = plan.layout
    console.print(f"[bold]{plan.name}[/bold]: {sum(plan.counts.values()):,} parameters ({counts})")
    console.print(
        f"TP{layout.tensor} PP{layout.pipeline} DP{layout.data}, recompute {plan.work.recompute.value}, "
        f"FP8 {plan.work.fp8.value}, on "
        f"{plan.cluster.gpus} x {plan.cluster.gpu_memory_gib:g} GiB"
    )
    console.print(_memory_table(plan))
    console.print(
        f"In the host's memory of each process: SSB up to {plan.memory.host_buffer / GIB:.1f} GiB, "
        f"its image tiles up to {plan.memory.host_tiles / GIB:.1f} GiB"
    )
    console.print(_verdict(plan), highlight=False)
    limits = ", ".join(f"{name} {value:g}" for name, value in plan.limits.items())
    console.print(f"Largest that fit, the other settings as they are: {limits}")
    console.print(_time_table(plan))
    if plan.steps:
        console.print(_run_time(plan), highlight=False)
    console.print(_assumptions(plan), highlight=False)
    if plan.tails:
        console.print(_tail_table(plan))
        console.print(_tail_assumptions(plan), highlight=False)
    console.print("[bold]Best layout[/bold]: " + plan.proposal.reason, highlight=False)
    if plan.proposal.best is not None:
        console.print("  " + " ".join(plan.proposal.best.settings), highlight=False, soft_wrap=True)
    for note in plan.notes:
        console.print(f"- {note}", highlight=False)


def as_json(plan: Plan) -> dict[str, object]:
    """Return a plan as JSON values, in bytes and seconds."""
    best = plan.proposal.best
    return {
        "name": plan.name,
        "parameters": {part.value: count for part, count in plan.counts.items()},
        "layout": asdict(plan.layout),
        "limit_bytes": plan.cluster.limit,
        "fits": plan.fits,
        "ranks": _ranks(plan.memory),
        "host": {"buffer": plan.memory.host_buffer, "tiles": plan.memory.host_tiles},
        "largest": dict(plan.limits),
        "steps": plan.steps,
        "seconds": _seconds(plan.time),
        "host_seconds": {
            "with_cuda_graphs": plan.host_seconds(cuda_graphs=True),
            "without_cuda_graphs": plan.host_seconds(cuda_graphs=False),
        },
        "mean_response_tokens": plan.mean_response,
        "tails": [asdict(tail) for tail in plan.tails],
        "hardware": asdict(plan.cluster.hardware),
        "best": None if best is None else _candidate(best),
        "reason": plan.proposal.reason,
        "notes": list(plan.notes),
    }


def _memory_table(plan: Plan) -> Table:
    # Short column names, so that the table fits into the eighty columns of a batch job's log.
    title = "GiB on a rank (activ.: activations with logits; images: their features)"
    table = Table(title=title, box=SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("stage")
    table.add_column("phase")
    for title in (*_COLUMNS.values(), "total"):
        table.add_column(title, justify="right")
    for rank in plan.memory.ranks:
        numbers = [f"{getattr(rank, name) / GIB:.2f}" for name in _COLUMNS]
        style = "red" if rank.total > plan.cluster.limit else ""
        table.add_row(str(rank.stage), rank.phase, *numbers, f"{rank.total / GIB:.2f}", style=style)
    return table


def _verdict(plan: Plan) -> str:
    peak = plan.memory.peak
    free = (plan.cluster.limit - peak.total) / GIB
    fullest = f"stage {peak.stage}, {peak.phase}: {peak.total / GIB:.1f} of {plan.cluster.limit / GIB:.1f} GiB"
    reserve = f"({plan.cluster.reserve_gib:g} GiB of each GPU are kept for CUDA, NCCL and gaps)"
    if plan.fits:
        return f"[green]It fits[/green]: {fullest}, {free:.1f} free {reserve}"
    return f"[red]It does not fit[/red]: {fullest}, {-free:.1f} too many {reserve}"


def _time_table(plan: Plan) -> Table:
    table = Table(title="Seconds of a step")
    seconds = _seconds(plan.time)
    for name in seconds:
        table.add_column(name, justify="right")
    table.add_row(*(f"{value:.1f}" for value in seconds.values()))
    return table


def _run_time(plan: Plan) -> str:
    hours = plan.steps * plan.time.total / 3600
    return f"A run of train.steps={plan.steps}: {hours:,.1f} hours, without starts, evaluations and saving"


def _tail_table(plan: Plan) -> Table:
    title = "Decode with its tail: seconds of a phase, tokens a second, and what waiting for the last responses costs"
    table = Table(title=title, box=SIMPLE_HEAD, padding=0, show_edge=False)
    for name in ("replicas", "segments", "seconds", "tokens/s", "lost"):
        table.add_column(name, justify="right")
    for tail in plan.tails:
        segments = f"{tail.segment_tokens:,}" if tail.segment_tokens else "none"
        rate = f"{tail.tokens / tail.seconds:,.0f}"
        table.add_row(str(tail.replicas), segments, f"{tail.seconds:.0f}", rate, f"{tail.lost:.0%}")
    return table


def _tail_assumptions(plan: Plan) -> str:
    lengths = plan.lengths
    return (
        f"Simulated, not measured: log-normal lengths of {lengths.mean:.0f} tokens on average with a spread of "
        f"{lengths.spread:.2f}, cut at {lengths.cut} ({lengths.clipped():.0%} of them); in segments a response goes on "
        "in the next phase. Each replica has the prompts of one in the recipe."
    )


def _assumptions(plan: Plan) -> str:
    hardware = plan.cluster.hardware
    decoding = f", {plan.time.decode_rows:.0f} responses decoding at once on a replica" if plan.time.decode else ""
    return (
        f"Assumed for the times: {hardware.name} ({hardware.bf16_flops / 1e12:.0f} TFLOP/s bf16 dense, "
        f"{hardware.bandwidth / 1e12:.2f} TB/s), {hardware.matmul_efficiency:.0%} of the FLOP/s "
        f"({hardware.fp8_efficiency:.0%} of twice as many in FP8), "
        f"{hardware.bandwidth_efficiency:.0%} of the bandwidth, {hardware.link_efficiency:.0%} of the links, responses "
        f"of {plan.mean_response:.0f} tokens on average, {plan.work.tiles} tiles a prompt{decoding}. "
        f"{_graphs(plan)}{_host(plan)}Not measured."
    )


def _host(plan: Plan) -> str:
    if not plan.time.decode:
        return ""
    host, graphs = plan.cluster.hardware.host, plan.work.cuda_graphs
    launches = host.graph_launches_per_layer if graphs else host.launches_per_layer
    return (
        f"Host: where decode waits for the CPU, with {launches} launches a layer ({'with' if graphs else 'without'} "
        f"CUDA graphs) of {host.launch_seconds * 1e6:.0f} us, counted in the code. "
    )


def _graphs(plan: Plan) -> str:
    if not plan.time.decode:
        return ""
    host = plan.cluster.hardware.host
    return (
        f"Decode would wait for the CPU for {plan.host_seconds(cuda_graphs=False):.0f} s of a step without CUDA graphs "
        f"({host.launches_per_layer} launches a layer) and {plan.host_seconds(cuda_graphs=True):.0f} s with them "
        f"({host.graph_launches_per_layer}): an estimate. "
    )


def _seconds(time: StepTime) -> dict[str, float]:
    return {
        "vision": time.vision,
        "prefill": time.prefill,
        "decode": time.decode,
        "host": time.host,
        "log-probs": time.log_probs,
        "update": time.update,
        "step": time.total,
    }


def _ranks(memory: MemoryPlan) -> list[dict[str, object]]:
    return [{**asdict(rank), "total": rank.total} for rank in memory.ranks]


def _candidate(candidate: LayoutCandidate) -> dict[str, object]:
    return {
        "name": candidate.name,
        "settings": list(candidate.settings),
        "seconds": _seconds(candidate.time),
        "peak_bytes": candidate.memory.peak.total,
    }
