"""One turn of our system for benchmarks/step_vs_trl.py: steps of the GRPO stage as `r1v2 grpo` does them.

python -m benchmarks.step_ours WORK CASE WARMUP STEPS OUTPUT
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp

import psutil
import yaml

from benchmarks import step_cases
from benchmarks.step_cases import CASES, RESPONSES, TEXT_TOKENS, TILE_TOKENS, Case, Clock, Turn
from megatron_r1v2.config.load import load_recipe
from megatron_r1v2.config.recipes import GrpoRecipe
from megatron_r1v2.monitoring.recorder import Recorder
from megatron_r1v2.stages.grpo.stage import GrpoStage
from megatron_r1v2.stages.session import open_session

ROOT = Path(__file__).parents[1]
DEMO_RECIPE = ROOT / "examples" / "digits" / "grpo.yaml"


class ClockedRecorder:
    """A recorder whose phases are timed by a clock too."""

    def __init__(self, recorder: Recorder, clock: Clock) -> None:
        self._recorder, self._clock = recorder, clock

    def __getattr__(self, name: str) -> object:
        return getattr(self._recorder, name)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Time a phase for both."""
        with self._clock.timed(phase), self._recorder.timed(phase):
            yield


def settings_of(work: Path, case: Case, output: Path) -> dict[str, dict[str, object]]:
    """Return the settings of a case that are not defaults."""
    demo = yaml.safe_load(DEMO_RECIPE.read_text()) if case.model == "demo" else {}
    most = 96 if case.model == "demo" else TEXT_TOKENS + (case.tiles + 1) * TILE_TOKENS
    changes: dict[str, dict[str, object]] = {
        "run": {"stage": "grpo", "output_dir": str(output)},
        "model": {
            "hf_path": str(work / ("demo-model" if case.configured else f"{case.model}-model-without-end")),
            "checkpoint": "",
            "precision": "fp32",
        },
        "data": {"train": str(work / case.data / "shards"), "max_prompt_tokens": most, "max_tiles": 15},
        "generation": {
            "responses_per_prompt": RESPONSES,
            "max_response_tokens": case.response_tokens,
            "kv_cache_gib": 1.0,
            "max_requests": case.prompts * RESPONSES,
        },
        "train": {
            "parts": ["adapter"] if case.parts == "adapter" else ["vision", "adapter", "language"],
            "prompts_per_step": case.prompts,
            "steps": 10_000,
            "learning_rate": 1e-6,
            "min_learning_rate": 0.0,
            "tokens_per_microbatch": 4096,
        },
        "checkpoint": {"every_steps": 0, "asynchronous": False},
    }
    if case.configured:
        del changes["generation"], changes["data"]["max_tiles"]
        changes["train"] = {"steps": 10_000}
    else:
        changes["buffer"] = {"capacity": 0, "effective_by": "reward"}
        functions = [{"path": step_cases.__file__, "name": "pseudo"}]
        changes["reward"] = {"functions": functions, "answer_weight": 0.0, "format_weight": 0.0}
    return {name: {**demo.get(name, {}), **changes.get(name, {})} for name in {**demo, **changes}}


def cpu_of_children() -> float:
    """Return the CPU seconds of the workers that check answers."""
    return sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children(recursive=True))


def run_turn(work: Path, case: Case, *, warmup: int, steps: int) -> Turn:
    """Do the steps of one process."""
    output = Path(mkdtemp(dir=work))
    settings = settings_of(work, case, output / "run")
    (output / "recipe.yaml").write_text(yaml.safe_dump(settings))
    recipe = load_recipe(output / "recipe.yaml", ())
    assert isinstance(recipe, GrpoRecipe)
    clock = Clock()
    with open_session(recipe, stage="grpo", shown=()) as opened, opened.loaded.verifiers() as pool:
        session = replace(opened, recorder=ClockedRecorder(opened.recorder, clock))
        stage = GrpoStage(session, recipe, pool)
        for _ in range(warmup + steps):
            before = cpu_of_children()
            with clock.timed("step"):
                stage.step()
                generated = session.recorder.values["rollout/tokens"]
                trained = session.recorder.values["ssb/distinct_samples"]
                session.end_step()
            clock.now["step"] += cpu_of_children() - before
            clock.now["trained_rows"] = trained
            clock.tokens = int(generated)
            clock.end_step()
    shutil.rmtree(output)
    shown = json.dumps(settings).replace(str(work), "WORK").replace(str(ROOT), ".")
    return Turn("ours", case.name, json.loads(shown), clock.steps[warmup:])


if __name__ == "__main__":
    folder, name, first, more, path = sys.argv[1:]
    run_turn(Path(folder), CASES[name], warmup=int(first), steps=int(more)).write(Path(path))
