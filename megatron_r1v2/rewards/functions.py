"""Reward functions of a user's own (`reward.functions`), called in the verifier workers."""

from __future__ import annotations

import hashlib
import logging
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from megatron_r1v2.config.schema import RewardFunction
from megatron_r1v2.data.messages import image_format
from megatron_r1v2.rewards.verifiers import TIMEOUT_SECONDS, Call, VerifierPool
from megatron_r1v2.types import Prompt

logger = logging.getLogger(__name__)

_WORKER = "megatron_r1v2.rewards.function_file"
_ENDED = "it took too long, or ended its process"
_LOGGED_FAILURES = 3

Result = tuple[dict[str, float], str]
"""Of `function_file.score_response`."""


def check_functions(functions: Sequence[RewardFunction]) -> None:
    """Check that own reward functions can be imported and called, in a process of its own.

    Raises:
        ValueError: one cannot.
    """
    if not functions:
        return
    calls = [Call[str](_WORKER, "check_function", (each.path, each.name), imports=(each.path,)) for each in functions]
    with VerifierPool(1, TIMEOUT_SECONDS) as pool:
        problems = pool.run(calls, failed=_ENDED)
    mistakes = [f"{each.path}: {problem}" for each, problem in zip(functions, problems, strict=True) if problem]
    if mistakes:
        raise ValueError("reward.functions: " + "; ".join(mistakes))


def describe_functions(functions: Sequence[RewardFunction]) -> list[dict[str, object]]:
    """Return functions for a fingerprint: their settings, and the SHA-256 of their files."""
    return [{**dict(each), "sha256": _digest(each.path)} for each in functions]


def score_by_functions(
    functions: Sequence[RewardFunction], prompts: Sequence[Prompt], texts: Sequence[str], pool: VerifierPool
) -> tuple[list[dict[str, float]], list[bool]]:
    """Score responses by own functions; a call that fails gives 0, and is logged and counted.

    Args:
        prompts: of each response.
        texts: the responses.

    Returns:
        For each response the scores of the functions by name, and whether every call ended well. A function that
        returned a dict has the mean of its parts as its score, and each part as NAME/PART beside it.

    Raises:
        RuntimeError: a function failed for every response, or its file has changed since the pool was made.
    """
    rewards: list[dict[str, float]] = [{} for _ in texts]
    ended = [True] * len(texts)
    with TemporaryDirectory(prefix="reward-images-") as folder:
        inputs = _inputs(prompts, texts, Path(folder))
        for function in functions:
            for row, parts in enumerate(_call(function, prompts, inputs, pool)):
                ended[row] &= bool(parts)
                rewards[row][function.name] = statistics.fmean(parts.values()) if parts else 0.0
                rewards[row] |= {f"{function.name}/{part}": score for part, score in parts.items() if part}
    return rewards, ended


def _call(
    function: RewardFunction, prompts: Sequence[Prompt], inputs: Sequence[Mapping[str, object]], pool: VerifierPool
) -> list[dict[str, float]]:
    """Return the parts of each response; none where the function failed."""
    path, name = function.path, function.name
    pool.pin(path, _digest(path))
    calls = [Call[Result](_WORKER, "score_response", (path, name, each), imports=(path,)) for each in inputs]
    failed: Result = {}, _ENDED
    results = pool.run(calls, failed=failed)
    failures = [(prompt.key, error) for prompt, (_, error) in zip(prompts, results, strict=True) if error]
    for key, error in failures[:_LOGGED_FAILURES]:
        logger.warning("%s: %s failed for sample %r, which gets 0: %s", path, name, key, error)
    if len(failures) > _LOGGED_FAILURES:
        logger.warning("%s: %s failed for %d more responses", path, name, len(failures) - _LOGGED_FAILURES)
    pool.count_crashes(sum(error != _ENDED for _, error in failures))
    if failures and len(failures) == len(prompts):
        key, error = failures[0]
        raise RuntimeError(
            f"{path}: {name} failed for every response, the first to sample {key!r}: {error}; mend it, and start the "
            "run again, which goes on from its newest checkpoint"
        )
    return [parts for parts, _ in results]


def _inputs(prompts: Sequence[Prompt], texts: Sequence[str], folder: Path) -> list[dict[str, object]]:
    """Return the arguments of a function for each response, the images as files in a folder."""
    images: dict[str, list[str]] = {}
    for number, prompt in enumerate({prompt.key: prompt for prompt in prompts}.values()):
        paths = [folder / f"{number}-{place}.{image_format(image)}" for place, image in enumerate(prompt.images)]
        for path, image in zip(paths, prompt.images, strict=True):
            path.write_bytes(image)
        images[prompt.key] = [str(path) for path in paths]
    return [
        {
            "response": text,
            "prompt": "\n\n".join(message["content"] for message in prompt.messages),
            "answer": prompt.answer or None,
            "metadata": dict(prompt.metadata),
            "images": images[prompt.key],
        }
        for prompt, text in zip(prompts, texts, strict=True)
    ]


def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
