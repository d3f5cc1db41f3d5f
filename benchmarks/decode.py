"""Tokens a CPU second of generation: our engine's and transformers' `generate`, by responses in flight.

    python -m benchmarks.decode --work WORK --output benchmarks/results/decode_cpu.json

The model, the prompts and the clock are those of benchmarks/step_vs_trl.py: the random InternVL of 33 M parameters,
prompts of 100 tokens of text and 64 of an image, responses of 48 tokens, 8 to a prompt (1 where one is in flight).
Prefill counts. Each turn is a process on one thread, the systems take turns, and a run that `--seconds` ends goes on
where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.step_cases import CASES, RESPONSES, Clock

ROOT = Path(__file__).parents[1]
CASE = CASES["33m-image64-response48-adapter"]
IN_FLIGHT = (1, 8, 64, 256)
SYSTEMS = ("ours", "transformers")
_REPEATS = 3


def time_ours(work: Path, in_flight: int) -> list[float]:
    """Return tokens a CPU second of each phase of our engine."""
    import yaml

    from benchmarks.step_ours import settings_of
    from megatron_r1v2.config.load import load_recipe
    from megatron_r1v2.generation.engine import Sampling
    from megatron_r1v2.stages.loaded_model import open_model

    responses = min(RESPONSES, in_flight)
    with TemporaryDirectory() as folder:
        settings = settings_of(work, CASE, Path(folder) / "run")
        settings["generation"]["max_requests"] = in_flight
        (Path(folder) / "recipe.yaml").write_text(yaml.safe_dump(settings))
        recipe = load_recipe(Path(folder) / "recipe.yaml")
    with open_model(recipe) as loaded:
        engine, features = loaded.engine(), loaded.feature_cache()
        prompts = loaded.training_stream().next(in_flight // responses)

        def generate(version: int) -> int:
            features.clear()
            sampling = Sampling(responses, version, 1.0, CASE.response_tokens)
            return sum(len(each.token_ids) for each in engine.generate(prompts, sampling, features=features))

        return rates(generate)


def time_transformers(work: Path, in_flight: int) -> list[float]:
    """Return tokens a CPU second of each `generate`."""
    import torch

    from benchmarks.step_peers import Loop, messages_of

    responses = min(RESPONSES, in_flight)
    loop = Loop(work, CASE)
    inputs = [
        loop.processor(
            text=loop.processor.apply_chat_template(messages_of(prompt), add_generation_prompt=True),
            images=[prompt["image"]],
            return_tensors="pt",
        )
        for prompt in loop.prompts[: in_flight // responses]
    ]

    def generate(version: int) -> int:
        with torch.no_grad():
            features = [loop.features(each["pixel_values"]) for each in inputs]
        rows = loop.generate([each["input_ids"] for each in inputs], features, responses=responses)
        return sum(len(row) for group in rows for row in group)

    return rates(generate)


def rates(generate: Callable[[int], int]) -> list[float]:
    """Return tokens a CPU second of a few calls, after one that is not counted."""
    clock, found = Clock(), []
    for version in range(_REPEATS + 1):
        with clock.timed("generate"):
            tokens = generate(version)
        found.append(tokens / clock.now.pop("generate"))
    return found[1:]


def report(work: Path) -> dict[str, dict[str, float]]:
    """Return medians by responses in flight, and ours against transformers'."""
    found: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for path in (work / "decode").glob("*.json"):
        turn = json.loads(path.read_text())
        found[turn["in_flight"]][turn["system"]] += turn["tokens_a_cpu_second"]
    result = {}
    for in_flight, systems in sorted(found.items()):
        medians = {system: round(statistics.median(each), 1) for system, each in systems.items()}
        if len(medians) == len(SYSTEMS):
            medians["ours_of_transformers"] = round(medians["ours"] / medians["transformers"], 3)
        result[str(in_flight)] = medians
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of benchmarks/step_vs_trl.py")
    parser.add_argument("--turns", type=int, default=2, help="of each system and number in flight")
    parser.add_argument("--in-flight", type=int, nargs="*", default=IN_FLIGHT)
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin no turn after so many")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--turn", nargs=3, metavar=("SYSTEM", "IN_FLIGHT", "OUTPUT"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    work = options.work.resolve()
    if options.turn:
        system, in_flight, output = options.turn
        times = {"ours": time_ours, "transformers": time_transformers}[system](work, int(in_flight))
        turn = {"system": system, "in_flight": int(in_flight), "tokens_a_cpu_second": times}
        Path(output).write_text(json.dumps(turn))
        return
    if not (work / CASE.data).exists():
        from benchmarks.step_materials import make_materials

        make_materials(work, CASE, None)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    (work / "decode").mkdir(exist_ok=True)
    started = time.monotonic()
    for number in range(options.turns):
        for in_flight in options.in_flight:
            for system in SYSTEMS:
                output = work / "decode" / f"{system}-{in_flight}-{number}.json"
                if output.exists() or time.monotonic() - started > options.seconds:
                    continue
                command = [sys.executable, "-m", "benchmarks.decode", "--work", str(work)]
                command += ["--turn", system, str(in_flight), str(output)]
                subprocess.run(command, env=environment, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    found = report(work)
    print(json.dumps(found, indent=1))
    if options.output:
        machine = {"cpus": os.cpu_count(), "threads": 1, "load_average": round(os.getloadavg()[0], 1)}
        options.output.write_text(json.dumps({"machine": machine, "tokens_a_cpu_second": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
