"""Chat servers in processes of their own, started by the real command line, and a model for them."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai

from megatron_r1v2.config.recipes import AlignRecipe
from megatron_r1v2.data.messages import openai_messages
from megatron_r1v2.generation.engine import Sampling
from megatron_r1v2.serve.command import main
from megatron_r1v2.stages.align import run_align
from megatron_r1v2.stages.loaded_model import open_model
from megatron_r1v2.types import Prompt
from tests.ranks import enter_rank, forked_context, free_port
from tests.stages.tiny_run import tiny_recipe

get, post = (partial(ask, timeout=60) for ask in (httpx.get, httpx.post))
"""With more patience than the five seconds of httpx, which pass on a busy machine."""

RESPONSE_TOKENS = 40
SETTINGS = (f"generation.max_response_tokens={RESPONSE_TOKENS}", "generation.max_requests=16")


@dataclass(frozen=True)
class Served:
    """A server that runs."""

    url: str
    processes: list[Any]
    log: Path

    def client(self, **arguments) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", **({"api_key": "none", "max_retries": 0} | arguments))

    def stop(self, number: int = signal.SIGTERM) -> list[int]:
        """Send all ranks a signal, as torchrun does, and return their exit codes."""
        for process in self.processes:
            os.kill(process.pid, number)
        for process in self.processes:
            process.join(240)
        return [process.exitcode for process in self.processes]


@contextmanager
def served(folder: Path | str, *arguments: str, ranks: int = 1, log: Path) -> Iterator[Served]:
    """Start a server and wait until it answers; whatever is left of it at the end is killed."""
    port, meeting = free_port(), free_port()
    argv = [str(folder), *SETTINGS, *arguments, "--port", str(port), "--name", "tiny"]
    context = forked_context()
    processes = [
        context.Process(target=_serve, args=(rank, ranks, meeting, argv, f"{log}.{rank}")) for rank in range(ranks)
    ]
    try:
        for process in processes:
            process.start()
        running = Served(f"http://127.0.0.1:{port}", processes, log)
        _wait_for(running)
        yield running
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def _serve(rank: int, world_size: int, meeting: int, argv: Sequence[str], log: str) -> None:
    enter_rank(rank, world_size, meeting)
    os.environ["SERVE_TEST_KEY"] = "secret"
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    main(argv)
    sys.stdout.flush()


def _wait_for(running: Served, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not all(process.is_alive() for process in running.processes):
            break
        try:
            if get(f"{running.url}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    told = "\n".join(Path(f"{running.log}.{rank}").read_text() for rank in range(len(running.processes)))
    raise AssertionError(f"the server does not answer:\n{told}")


def messages_of(prompt: Prompt) -> list[Any]:
    return openai_messages(prompt.messages, prompt.images)


def recipe_of(root: Path) -> AlignRecipe:
    recipe = tiny_recipe(root, parts=("adapter", "language"), steps=1, stage="align")
    return recipe.changed(generation=recipe.generation.changed(max_response_tokens=RESPONSE_TOKENS))


def train_and_generate(root: Path) -> tuple[list[Prompt], list[str], list[list[float]]]:
    """Make a run of one step and return prompts, and what its checkpoint answers greedily, in process."""
    recipe = recipe_of(root)
    run_align(recipe.changed(train=recipe.train.changed(learning_rate=2e-3)))
    recipe = recipe.changed(model=recipe.model.changed(checkpoint=recipe.run.output_dir))
    with open_model(recipe) as loaded:
        prompts = list(loaded.read_prompts(recipe.data.train))
        rollouts = loaded.engine().generate(
            prompts,
            Sampling(num_responses=1, policy_version=0, temperature=0.0, max_response_tokens=RESPONSE_TOKENS),
            features=loaded.feature_cache(),
        )
        texts = [
            loaded.tokenizer.decode(rollout.token_ids[: -1 if rollout.finish_reason == "stop" else None])
            for rollout in rollouts
        ]
        return prompts, texts, [list(rollout.rollout_log_probs) for rollout in rollouts]


QUESTION = [{"role": "user", "content": "abc?"}]


def ask(client, messages=QUESTION, **arguments):
    return client.chat.completions.create(model="tiny", messages=messages, **arguments)


def stream(client, messages=QUESTION, **arguments):
    """Return the texts by choice, the finish reasons, and all chunks."""
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    chunks = list(ask(client, messages, stream=True, **arguments))
    for chunk in chunks:
        for choice in chunk.choices:
            assert choice.index not in reasons
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    return texts, reasons, chunks


def metric(server: Served, name: str) -> float:
    """Return what /metrics tells; 0 for a counter that has not begun."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as answer:
        found = re.search(rf"^{re.escape(name)} (\S+)$", answer.read().decode(), re.MULTILINE)
    return float(found[1]) if found else 0.0


def until(condition: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
