"""One rehearsed rank: a stage of the product run as it is, for one step, in this process; nothing is put back after it.

`python -m megatron_r1v2.rehearsal.rank SPEC.json RESULT.json` is what `r1v2 rehearse` starts for each rank.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from megatron_r1v2.config.choices import StageName
from megatron_r1v2.config.load import load_recipe_as
from megatron_r1v2.config.recipes import STAGES, PairsRecipe, TrainingRecipe
from megatron_r1v2.rehearsal.collectives import Collective
from megatron_r1v2.rehearsal.fake_tensors import FakeTensors
from megatron_r1v2.rehearsal.ledger import PhaseMemory, Sample, phase_of
from megatron_r1v2.rehearsal.watch import Watch

if TYPE_CHECKING:
    from megatron_r1v2.rehearsal.stand_ins import Script

_MOST_TEXT = 600
"""Of an error: torch lists all its kernels where one is missing."""
_MODULES = {StageName.grpo: "grpo.stage"}
_START = "start"
PHASE_FILE = "phase"
"""Beside the result, while a rank is rehearsed: the phase in which its process is."""


@dataclass(frozen=True)
class RankSpec:
    """The task of one rehearsing process."""

    recipe: str
    """YAML file with the settings of the rehearsal; its paths exist."""
    stage: StageName
    rank: int
    world_size: int
    gpus_per_node: int
    gpu_memory_gib: float
    gpu_reserve_gib: float = 0.0
    """Of it: not for tensors."""
    device: str = "cuda"
    """cuda: the branches of the cluster, on fakes; cpu: those of this machine."""
    is_fake: bool = True
    """False: tensors with memory, to check the rehearsal itself."""
    rehearsed_prompts: int = 1
    """Long prompts that a replica generates from."""
    prompts_of_step: int = 1
    """Prompts of a replica in a step of the recipe."""
    mixed_groups: int = 1
    """Long prompts over all replicas whose responses are trained on."""
    whole_groups: int | None = None
    """Long prompts over all replicas whose responses end in the step in which they began; None: all."""
    decoded_tokens: int = 4
    """Of each response, before the rest is filled in."""

    @classmethod
    def read(cls, path: Path) -> RankSpec:
        """Read a file that `write` has written."""
        values = json.loads(path.read_text())
        return cls(**{**values, "stage": StageName(values["stage"])})

    def write(self, path: Path) -> None:
        """Write it for another process."""
        path.write_text(json.dumps(asdict(self)))


@dataclass
class RankResult:
    """The findings of one rehearsed rank."""

    rank: int
    place: str = ""
    """The coordinates in words, such as "TP 0, stage 1, DP 0"."""
    stage: int = 0
    """Pipeline stage."""
    phases: list[PhaseMemory] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    flops: dict[str, int] = field(default_factory=dict)
    questions: list[tuple[str, str, int]] = field(default_factory=list)
    """Rule, line that asked, how often."""
    engine_steps: dict[str, int] = field(default_factory=dict)
    """Steps of the engine that prefill, decode or mix both, and evicted requests."""
    host_peak: int = 0
    """Bytes of the CPU tensors that live at once, files and samples not counted."""
    checkpoint_bytes: int = 0
    """The bytes that this rank hands to the writers of a checkpoint."""
    seconds: float = 0.0
    own_peak: int = 0
    """Bytes of memory that the rehearsal itself has taken."""
    operators: int = 0
    error: str = ""
    """The exception that ended it; empty: it came to its end."""
    error_phase: str = ""

    @classmethod
    def read(cls, path: Path) -> RankResult:
        """Read a file that `write` has written."""
        values: dict[str, Any] = json.loads(path.read_text())
        values["phases"] = [PhaseMemory(**phase) for phase in values["phases"]]
        values["samples"] = [Sample(**sample) for sample in values["samples"]]
        values["collectives"] = [
            Collective(**{**call, "ranks": tuple(call["ranks"])}) for call in values["collectives"]
        ]
        values["questions"] = [tuple(question) for question in values["questions"]]
        return cls(**values)

    def write(self, path: Path) -> None:
        """Write it for another process."""
        path.write_text(json.dumps(asdict(self)))


def rehearse_rank(
    spec: RankSpec, watch: Watch | None = None, *, on_phase: Callable[[str], object] = lambda _: None
) -> RankResult:
    """Run the stage of a recipe as one rank, and return what was seen, an exception included.

    Args:
        watch: sees it; None: one that counts the bytes of tensors.
        on_phase: told the name of each phase that begins, by the watch that is made here.
    """
    from megatron_r1v2.config.command_line import quiet_libraries

    quiet_libraries()
    # Fakes each have a folder of their own: another rank's checkpoint is none to resume.
    folder = Path(spec.recipe).parent / (f"run-{spec.rank}" if spec.is_fake else "run")
    recipe = load_recipe_as(STAGES[spec.stage], spec.recipe, [f"run.output_dir={folder}"])
    watch = watch or _start_watch(spec, on_phase)
    result = RankResult(spec.rank)
    started = time.perf_counter()
    with ExitStack() as at_the_end:
        try:
            with watch.phase(_START):
                at_the_end.callback(_install(watch, spec, recipe), result)
                run = _stage_function(spec.stage)
                with watch:
                    run(recipe)
        except BaseException as error:  # whatever it is, it is what the rehearsal has found
            result.error, result.error_phase = _describe(error), phase_of(error)
    result.seconds = time.perf_counter() - started
    _collect(result, watch)
    return result


def _start_watch(spec: RankSpec, on_phase: Callable[[str], object]) -> Watch:
    """Make the watch of a rank; where it is fake, with its GPU."""
    if not spec.is_fake:
        return Watch(spec.device, on_phase=on_phase)
    from megatron_r1v2.rehearsal import fake_cuda

    if spec.device == "cuda":
        # Before megatron-core is imported, which asks while it is and keeps some functions.
        fake_cuda.install(
            gpus_per_node=spec.gpus_per_node,
            memory_bytes=int(spec.gpu_memory_gib * 2**30),
            usable_bytes=int((spec.gpu_memory_gib - spec.gpu_reserve_gib) * 2**30),
        )
    fake_cuda.install_for_fakes()
    return FakeTensors(spec.device, hides_device=spec.device == "cuda", on_phase=on_phase)


def _stage_function(stage: StageName) -> Callable[[object], object]:
    module = import_module(f"megatron_r1v2.stages.{_MODULES.get(stage, stage.value)}")
    return cast(Callable[[object], object], getattr(module, f"run_{stage.value}"))


def _install(watch: Watch, spec: RankSpec, recipe: TrainingRecipe | PairsRecipe) -> Callable[[RankResult], None]:
    """Install labels and stand-ins; return what ends the processes of the latter and adds what they know."""
    from megatron_r1v2.rehearsal import labels, stand_ins
    from megatron_r1v2.rehearsal.cluster import Place, note_object_collectives
    from megatron_r1v2.rehearsal.hollow_files import install_load_after_save

    Place(spec.rank, spec.world_size, spec.gpus_per_node).enter()
    script = _make_script(spec, recipe)
    if isinstance(watch, FakeTensors):
        # Before the script, which these answers follow.
        add_answers = _install_answers(watch, spec, script)
    else:
        stand_ins.install_shares(lambda _: None)
        add_answers = lambda _: None  # noqa: E731  # a real rank has nothing to add
    install_load_after_save(is_alone=spec.is_fake)
    note_object_collectives(watch)
    stand_ins.install_script(script)
    stand_ins.install_files()
    stand_ins.install_reward_model()
    stand_ins.install_counted_cache()
    engine_steps = stand_ins.install_full_cache(lambda: watch.ledger.current_phase == labels.GENERATE)
    labels.install(watch)
    # After the labels, which the stand-ins get too.
    stand_ins.install_stand_in_features(
        rehearsed=spec.rehearsed_prompts,
        prompts_of_step=spec.prompts_of_step,
        is_step=lambda: watch.ledger.current_phase != labels.EVALUATE,
    )

    def finish(result: RankResult) -> None:
        add_answers(result)
        result.engine_steps = dict(engine_steps)

    return finish


def _make_script(spec: RankSpec, recipe: TrainingRecipe | PairsRecipe) -> Script:
    from megatron_r1v2.data.tokenizer import ChatTokenizer
    from megatron_r1v2.rehearsal.rows import RIGHT_END, WRONG_END
    from megatron_r1v2.rehearsal.stand_ins import Script

    tokenizer = ChatTokenizer(recipe.model.hf_path)
    stop = tokenizer.stop_ids(recipe.generation.stop_tokens)[0]
    filler = tokenizer.encode_text(" a")[-1]  # of bytes, the first one is a blank: no reasoning
    return Script(
        drawn=(*(filler,) * (spec.decoded_tokens - 1), stop),
        filler=filler,
        right=(*tokenizer.encode_text(RIGHT_END), stop),
        wrong=(*tokenizer.encode_text(WRONG_END), stop),
        max_prompt_tokens=recipe.data.max_prompt_tokens,
        max_response_tokens=recipe.generation.max_response_tokens,
        mixed_groups=spec.mixed_groups,
        whole_groups=spec.whole_groups,
    )


def _install_answers(watch: FakeTensors, spec: RankSpec, script: Script) -> Callable[[RankResult], None]:
    """Install what stands in for other ranks, files and kernels; return what ends it and adds what it knows."""
    from megatron_r1v2.rehearsal import flash_attention
    from megatron_r1v2.rehearsal.cluster import install_fake_groups
    from megatron_r1v2.rehearsal.hollow_files import HollowCheckpoints, install_hollow_weights
    from megatron_r1v2.rehearsal.other_ranks import OtherRanks

    install_fake_groups(watch)
    checkpoints, others = HollowCheckpoints(), OtherRanks(watch, script)
    checkpoints.install()
    others.install()
    install_hollow_weights(watch)
    if spec.device == "cuda":
        flash_attention.install(watch.add_flops)

    def finish(result: RankResult) -> None:
        others.close()
        result.checkpoint_bytes = checkpoints.num_bytes
        result.questions = [(rule, line, number) for (rule, line), number in watch.questions.items()]

    return finish


def _describe(error: BaseException) -> str:
    """Return an exception with the innermost lines of our code and of megatron-core's."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [
        f"{frame.filename.partition('site-packages/')[2] or frame.filename}:{frame.lineno} {frame.name}"
        for frame in frames
        if "megatron" in frame.filename and "megatron_r1v2/rehearsal/" not in frame.filename
    ]
    return f"{type(error).__name__}: {str(error)[:_MOST_TEXT]} (at {' < '.join(reversed(lines[-3:]))})"


def _collect(result: RankResult, watch: Watch) -> None:
    result.phases, result.samples = watch.ledger.phases, watch.ledger.samples
    result.collectives = watch.collectives.calls
    result.flops = dict(watch.flops)
    result.host_peak = max((phase.peak for phase in watch.host.phases), default=0)
    result.own_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result.operators = watch.num_operators


def main(argv: Sequence[str]) -> int:
    """Rehearse the rank of a specification and write the result."""
    specification, output = map(Path, argv)
    phase = output.with_name(PHASE_FILE)
    result = rehearse_rank(RankSpec.read(specification), on_phase=phase.write_text)
    result.write(output)
    # Not through Python's exit: threads and process groups of the rank would wait for others.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
