"""The plan of a recipe on a cluster: memory, limits, times and the best layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_r1v2.config.choices import Fp8, Layers, Part, StageName
from megatron_r1v2.config.recipes import PairsRecipe, Recipe, TrainingRecipe
from megatron_r1v2.models.architecture import R1V2Architecture
from megatron_r1v2.planning.memory import GIB, MemoryPlan, largest_that_fits, plan_memory
from megatron_r1v2.planning.parameters import Layout, whole_model_counts
from megatron_r1v2.planning.roofline import Hardware, StepTime, step_time
from megatron_r1v2.planning.search import Proposal, propose_layout
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
class Plan:
    """The cost of a recipe on a cluster."""

    name: str
    cluster: Cluster
    architecture: R1V2Architecture
    layout: Layout
    work: Workload
    mean_response: int
    counts: Mapping[Part, int]
    memory: MemoryPlan
    limits: Mapping[str, float]
    """The largest value of a setting that fits, the others as they are."""
    time: StepTime
    proposal: Proposal
    notes: tuple[str, ...]

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
    mean_response: int = 0,
) -> Plan:
    """Plan a run.

    Args:
        recipe: the settings; paths in it need not exist.
        stage: the stage as which it is planned; None: its own.
        tiles: tiles of a prompt; 0: the most that the recipe allows.
        mean_response: tokens of a response on average, for the times; 0: half of the longest response.

    Raises:
        ValueError: a layout that does not divide the model or the cluster, or a cache that holds no sequence.
    """
    # Imported here, because transformers and torch take seconds that neither --help nor a wrong recipe has to wait.
    from megatron_r1v2.checkpoint.hf.architecture import r1v2_architecture
    from megatron_r1v2.checkpoint.hf.config import sizes_config

    architecture = r1v2_architecture(sizes_config(hf_config))
    layout = _layout(recipe, cluster)
    work = Workload.from_recipe(recipe, architecture, stage=stage, tiles=tiles)
    mean_response = mean_response or max(1, work.response_tokens // 2)
    if mean_response > work.response_tokens:
        raise ValueError(
            f"--mean-response-tokens={mean_response} is more than generation.max_response_tokens="
            f"{work.response_tokens}; lower it"
        )
    return Plan(
        name=recipe.run.name,
        cluster=cluster,
        architecture=architecture,
        layout=layout,
        work=work,
        mean_response=mean_response,
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
        notes=_notes(recipe, work.stage),
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
