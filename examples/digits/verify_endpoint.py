"""A comparison of a model in process with the same model behind its endpoint, by greedy answers to the same questions.

Evaluates the newest checkpoint of a run in process, serves it, and evaluates what is served by our evaluator and by
lm-eval, which reads the shards, asks, takes the answers out and compares them by code of its own, in an environment of
its own (python -m venv, pip install 'lm-eval[api]' pillow). Succeeds when all responses and all verdicts are equal.

python -m examples.digits.verify_endpoint --run runs/digits/grpo --lm-eval lm_eval_env/bin/python
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import megatron_r1v2
from megatron_r1v2.config.load import load_recipe_as
from megatron_r1v2.config.recipes import EvaluateRecipe

TASKS = Path(megatron_r1v2.__file__).parent / "evaluation" / "lm_eval"
MODEL = "r1v2"

Verdicts = dict[str, tuple[str, bool]]
"""By prompt key: the response, and whether it is right."""


def evaluate(run: Path, name: str, output: Path, settings: Sequence[str]) -> Verdicts:
    """Evaluate by our evaluator, greedily, in a process of its own."""
    fixed = ("evaluation.temperature=0", "evaluation.top_p=1", "evaluation.runs=1", f"run.output_dir={output}")
    command = ["megatron_r1v2", "evaluate", str(run / "recipe.yaml"), "--name", name, *fixed, *settings]
    subprocess.run([sys.executable, "-m", *command], check=True, stdout=subprocess.DEVNULL)
    lines = (output / f"evaluation-{name}.rollouts.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["prompt_key"]: (row["text"], row["correct"]) for row in map(json.loads, lines)}


@contextmanager
def served(run: Path, settings: Sequence[str]) -> Iterator[str]:
    """Serve a run on a free port of this machine, and yield the address for clients."""
    command = [sys.executable, "-m", "megatron_r1v2", "serve", str(run), *settings, "--port", "0", "--name", MODEL]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            message = next((line for line in server.stdout if line.startswith("serving ")), None)
            if message is None:
                raise SystemExit("error: the server did not start; its message is above")
            yield message.split()[-1]
        finally:
            server.terminate()


@dataclass(frozen=True)
class LmEvalTask:
    """A task of lm-eval and the settings of its run."""

    name: str
    folder: Path = TASKS
    """Folder with the YAML file of the task."""
    max_tokens: int = 256
    """Tokens of a response at most."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Settings that the task reads."""
    model_args: str = ""
    """More settings of lm-eval's client, such as "think_end_token=</think>"."""


def run_lm_eval(
    python: str, task: LmEvalTask, output: Path, *, url: str, model: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run a task of lm-eval on an endpoint, without a network.

    Args:
        python: interpreter of an environment with lm-eval.
        task: the task.
        output: new folder for the files of lm-eval.
        url: address of the endpoint, ending in /v1.
        model: name of the model there.

    Returns:
        The task's results by metric, and its rows.

    Raises:
        RuntimeError: lm-eval failed; with the end of its output.
    """
    client = f"model={model},base_url={url}/chat/completions,num_concurrent=8,max_images=16"
    command = [
        python, "-m", "lm_eval", "run", "--model", "local-chat-completions", "--model_args",
        f"{client},{task.model_args}".rstrip(","), "--tasks", task.name,
        "--include_path", str(task.folder), "--apply_chat_template", "--gen_kwargs", f"max_gen_toks={task.max_tokens}",
        "--metadata", json.dumps(dict(task.metadata)), "--output_path", str(output), "--log_samples",
    ]  # fmt: skip
    # lm-eval would ask the Hub about a model of this name, and its client wants some key.
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(output / "hf"), "OPENAI_API_KEY": "none"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | offline)
    if done.returncode:
        raise RuntimeError(f"lm-eval failed; the end of what it said:\n{done.stderr[-3000:]}")
    (results,) = output.rglob("results*.json")
    (rows,) = output.rglob(f"samples_{task.name}*.jsonl")
    lines = rows.read_text(encoding="utf-8").splitlines()
    return json.loads(results.read_text(encoding="utf-8"))["results"][task.name], [json.loads(line) for line in lines]


def lm_eval_python() -> str | None:
    """Return the Python of an environment with lm-eval: LM_EVAL_PYTHON's, or this one; None without one."""
    this_python = sys.executable if importlib.util.find_spec("lm_eval") else None
    return os.environ.get("LM_EVAL_PYTHON") or this_python


def ask_by_lm_eval(python: str, url: str, output: Path, *, shards: str, max_tokens: int) -> Verdicts:
    """Evaluate the served model by lm-eval, greedily."""
    task = LmEvalTask("shards", max_tokens=max_tokens, metadata={"shards": shards})
    results, rows = run_lm_eval(python, task, output, url=url, model=MODEL)
    verdicts = {row["doc"]["key"]: (row["resps"][0][0], bool(row["exact_match"])) for row in rows}
    assert abs(results["exact_match,last_box"] - accuracy(verdicts)) < 1e-9
    return verdicts


def accuracy(verdicts: Verdicts) -> float:
    return sum(right for _, right in verdicts.values()) / len(verdicts)


def compare(verdicts_by_name: Mapping[str, Verdicts]) -> list[dict[str, Any]]:
    """Compare each evaluation with the first.

    Args:
        verdicts_by_name: of evaluations of the same prompts.

    Returns:
        For each: its name, accuracy, and the number of responses and verdicts that equal those of the first.
    """
    first = next(iter(verdicts_by_name.values()))
    return [
        {
            "evaluated": name,
            "prompts": len(verdicts),
            "accuracy": accuracy(verdicts),
            "responses_equal": sum(first[key][0] == text for key, (text, _) in verdicts.items()),
            "verdicts_equal": sum(first[key][1] == right for key, (_, right) in verdicts.items()),
        }
        for name, verdicts in verdicts_by_name.items()
    ]


def measure(run: Path, output: Path, python: str | None, settings: Sequence[str]) -> list[dict[str, Any]]:
    """Evaluate in process, through the endpoint, and by lm-eval."""
    own = (f"model.checkpoint={run}", f"evaluation.data={run.parent / 'shards' / 'heldout'}")
    served_settings, settings = settings, [*own, *settings]
    recipe = load_recipe_as(EvaluateRecipe, run / "recipe.yaml", settings)
    verdicts = {"in process": evaluate(run, "in-process", output, settings)}
    with served(run, [setting for setting in served_settings if not setting.startswith("evaluation.")]) as url:
        endpoint = (f"evaluation.endpoint_url={url}", f"evaluation.endpoint_model={MODEL}")
        verdicts["through the endpoint"] = evaluate(run, "endpoint", output, [*settings, *endpoint])
        if python:
            verdicts["through the endpoint, by lm-eval"] = ask_by_lm_eval(
                python,
                url,
                output / "lm-eval",
                shards=recipe.evaluation.data,
                max_tokens=recipe.generation.max_response_tokens,
            )
    return compare(verdicts)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.digits.verify_endpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of the GRPO run")
    parser.add_argument("--output", type=Path, help="new folder for the evaluations (default: RUN/endpoint)")
    parser.add_argument(
        "--lm-eval", default=lm_eval_python(), help="Python with lm-eval (default: $LM_EVAL_PYTHON, or this one)"
    )
    parser.add_argument("--figures", type=Path, help="JSON file for the figures")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="changes a setting of the run")
    options = parser.parse_intermixed_args()
    output = options.output or options.run / "endpoint"
    if output.exists():
        parser.error(f"--output {output} exists; remove it, or give another one")
    rows = measure(options.run, output, options.lm_eval, options.settings)
    for row in rows:
        print(
            f"{row['evaluated']}: {row['accuracy']:.2%} of {row['prompts']}; responses equal: "
            f"{row['responses_equal']}, verdicts equal: {row['verdicts_equal']}"
        )
    if not options.lm_eval:
        print("lm-eval was not asked: give the Python of an environment that has it with --lm-eval")
    if options.figures:
        options.figures.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    all_equal = all(row["responses_equal"] == row["verdicts_equal"] == row["prompts"] for row in rows)
    raise SystemExit(0 if all_equal else 1)


if __name__ == "__main__":
    main()
