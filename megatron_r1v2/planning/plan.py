"""The plan of a recipe on a cluster: memory, limits, times and the best layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megatron_r1v2.config.choices import Fp8, Layers, Part, StageName
from megatron_r1v2.config.recipes import PairsRecipe, Recipe, TrainingRecipe
from megatron_r1v2.models.architecture import R1V2Architecture
from megatron_r1v2.planning.hardware import Hardware
from megatron_r1v2.planning.memory import GIB, MemoryPlan, kv_cache_bytes, largest_that_fits, plan_memory
from megatron_r1v2.planning.parameters import Layout, whole_model_counts
from megatron_r1v2.planning.roofline import StepTime, cache_tokens, host_seconds, step_time
from megatron_r1v2.planning.search import Proposal, propose_layout
from megatron_r1v2.planning.tails import Lengths, Replica, Tail, read_lengths, simulate_tails
from megatron_r1v2.planning.workload import Workload


@dataclass(frozen=True)
class Cluster:
    """The GPUs of a run."""

    gpus: int
    gpus_per_node: int
    gpu_memory_gib: float
    reserve_gib: float
    """GiB of each GPU beside our tensors: CUDA, NCCL, kernels' workspace, the allocator's gaps."""
    hardware: Hardware

    @property
    def limit(self) -> int:
        """Return the bytes of a rank that tensors may take."""
        return int((self.gpu_memory_gib - self.reserve_gib) * GIB)


@dataclass(frozen=True)
class AssumedLengths:
    """The lengths of responses that the times are for."""

    mean: int = 0
    """0: half of the longest response."""
    spread: float = 0.8
    """Standard deviation of their logarithm."""
    metrics: Path | None = None
    """A run's metrics.jsonl, or its folder, which decides both."""
    segment_tokens: int = 0
    """Tokens of a response in a phase, where it is generated in segments; 0: the recipe's, or half of the mean."""

    def resolve(self, longest: int) -> Lengths:
        """Return the lengths.

        Args:
            longest: `generation.max_response_tokens`.

        Raises:
            ValueError: the mean is more than the longest, or the metrics cannot be read.
        """
        if self.mean > longest:
            raise ValueError(
                f"--mean-response-tokens={self.mean} is more than generation.max_response_tokens={longest}; lower it"
            )
        if self.metrics is not None:
            return read_lengths(self.metrics, longest)
        return Lengths(self.mean or max(1, longest // 2), longest, self.spread)


@dataclass(frozen=True)
class Plan:
    """The cost of a recipe on a cluster."""

    name: str
    cluster: Cluster
    architecture: R1V2Architecture
    layout: Layout
    work: Workload
    lengths: Lengths
    """Of responses, for the times."""
    segment_tokens: int
    """Tokens of a response in a phase, where it is generated in segments."""
    counts: Mapping[Part, int]
    memory: MemoryPlan
    limits: Mapping[str, float]
    """The largest value of a setting that fits, the others as they are."""
    time: StepTime
    proposal: Proposal
    steps: int
    """Of the whole run; 0: the stage has none."""
    notes: tuple[str, ...]

    @property
    def mean_response(self) -> float:
        """Return the tokens of a response on average."""
        return self.lengths.mean

    @cached_property
    def tails(self) -> Sequence[Tail]:
        """Simulate decode on 1, 8 and 64 replicas, with whole responses and in segments, in seconds.

        Returns:
            Nothing where no responses are sampled for training.
        """
        if self.work.stage is not StageName.grpo:
            return ()
        replica = Replica.planned(self.architecture, self.layout, self.work, self.cluster.hardware)
        return simulate_tails(replica, self.lengths, segment_tokens=self.segment_tokens)

    def host_seconds(self, *, cuda_graphs: bool) -> float:
        """Return the seconds of a step in which decode waits for the CPU, with CUDA graphs or without."""
        return host_seconds(
            self.architecture,
            self.layout,
            self.work,
            self.cluster.hardware,
            mean_response=self.mean_response,
            cuda_graphs=cuda_graphs,
        )

    @property
    def fits(self) -> bool:
        """Return whether the recipe as it stands fits."""
        return self.memory.peak.total <= self.cluster.limit


def make_plan(
    recipe: TrainingRecipe | PairsRecipe,
    hf_config: Mapping[str, object],
    cluster: Cluster,
    *,
    stage: StageName | None = None,
    tiles: int = 0,
    lengths: AssumedLengths | None = None,
) -> Plan:
    """Plan a run.

    Args:
        recipe: the settings; paths in it need not exist.
        stage: the stage as which it is planned; None: its own.
        tiles: tiles of a prompt; 0: the most that the recipe allows.
        lengths: of responses, for the times; None: half of the longest response on average.

    Raises:
        ValueError: a layout that does not divide the model or the cluster, or a cache that holds no sequence.
    """
    # Imported here, because transformers and torch take seconds that neither --help nor a wrong recipe has to wait.
    from megatron_r1v2.checkpoint.hf.architecture import r1v2_architecture
    from megatron_r1v2.checkpoint.hf.config import sizes_config

    architecture = r1v2_architecture(sizes_config(hf_config))
    layout = _layout(recipe, cluster)
    work = Workload.from_recipe(recipe, architecture, stage=stage, tiles=tiles, gpu_bytes=cluster.limit)
    lengths = lengths or AssumedLengths()
    found = lengths.resolve(work.response_tokens)
    mean_response = found.mean
    return Plan(
        name=recipe.run.name,
        cluster=cluster,
        architecture=architecture,
        layout=layout,
        work=work,
        lengths=found,
        segment_tokens=lengths.segment_tokens or recipe.generation.segment_tokens or max(1, round(found.mean / 2)),
        counts=whole_model_counts(architecture),
        memory=plan_memory(architecture, layout, work),
        limits=largest_that_fits(architecture, layout, work, cluster.limit),
        time=step_time(architecture, layout, work, cluster.hardware, mean_response=mean_response),
        proposal=propose_layout(
            architecture,
            work,
            cluster.hardware,
            gpus=cluster.gpus,
            gpus_per_node=cluster.gpus_per_node,
            limit=cluster.limit,
            mean_response=mean_response,
        ),
        steps=recipe.train.steps if isinstance(recipe, TrainingRecipe) else 0,
        notes=(*_notes(recipe, work.stage), *_cache_notes(architecture, layout, work)),
    )


def _layout(recipe: Recipe, cluster: Cluster) -> Layout:
    tensor, pipeline = recipe.parallel.tensor, recipe.parallel.pipeline
    if cluster.gpus < 1 or cluster.gpus % (tensor * pipeline):
        raise ValueError(
            f"--gpus={cluster.gpus} is not a multiple of parallel.tensor={tensor} x parallel.pipeline={pipeline} = "
            f"{tensor * pipeline}; change one of them"
        )
    if cluster.limit <= 0:
        raise ValueError(
            f"--reserve={cluster.reserve_gib} leaves nothing of --gpu-memory={cluster.gpu_memory_gib}; lower it"
        )
    return Layout(
        tensor,
        pipeline,
        cluster.gpus // tensor // pipeline,
        recipe.parallel.first_stage_layers,
        recipe.parallel.sequence,
    )


def _cache_notes(architecture: R1V2Architecture, layout: Layout, work: Workload) -> Iterator[str]:
    """Yield the size of a cache that takes what is free, if there is one."""
    if work.kv_cache_gib != "auto" or "generate" not in work.phases:
        return
    most = max(kv_cache_bytes(architecture, layout, work, stage) for stage in range(layout.pipeline))
    tokens = cache_tokens(architecture, layout, work)
    yield f"generation.kv_cache_gib=auto: {most / GIB:.1f} GiB of a GPU in generate, {tokens:.0f} tokens on a replica"


def _notes(recipe: Recipe, stage: StageName) -> tuple[str, ...]:
    notes = [
        f"planned as the {stage.value} stage (--stage for another)",
        "worst case: rows of data.max_prompt_tokens + generation.max_response_tokens, every prompt with all its tiles",
        "generation as with flash-attn: without it, attention gathers the cache of all requests layer by layer",
    ]
    if stage is StageName.grpo:
        notes.append(
            "every response is computed in log-probs and update; those of uniform groups are left out, so it is less"
        )
    if stage is StageName.mpo:
        notes.append("log-probs are those of the reference, computed once before the first step: not in the times")
    if recipe.model.layers is Layers.te:
        notes.append("model.layers=te: activations are those of the local layers, TransformerEngine keeps less")
    if recipe.model.fp8 is not Fp8.none:
        notes.append(
            f"model.fp8={recipe.model.fp8.value}: on Hopper each 8-bit weight has a transposed copy for backward "
            "passes, so it takes as much memory as in bf16 (and comes on top of bf16 weights without model.fp8_weights)"
        )
    return tuple(notes)
