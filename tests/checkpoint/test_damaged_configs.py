"""Damaged config.json files: every tool ends in a sentence, or does its work; never in a traceback.

The tools run as they do on a command line, in this process; a conversion stops where it would write weights.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoint_tools import hf_to_hf, hf_to_megatron, inspect, reassemble, verify
from megatron_r1v2.checkpoint import destinations, splicing
from megatron_r1v2.planning import command as plan
from tests.checkpoint.published_folders import write_tiny_published
from tests.tiny_hf import tiny_hf_language, tiny_hf_model, tiny_hf_vision

NUMBERS = (0, -1, 1, 3, 2**31, 2**63, 10**30, 0.5, -1.5, 1e308, float("nan"), float("inf"))
OTHERS = (None, True, False, "", "abc", "7", "float32", "x" * 9999, [], [1], [[]], {}, {"a": {"b": []}}, {"factor": 0})
SHORT = ("data.max_prompt_tokens=100", "generation.max_response_tokens=100")
TEXTS = ("", "{", "[]", "null", '{"a": 1', "\ufeff{}", "[" * 20000, '{"a":' * 20000, "9" * 5000, '{"x": 1e99999}')
PATIENCE_SECONDS = 20
"""A call takes a tenth of a second; one that allocates what a number says takes minutes."""


def places(value: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List the paths to the values of a configuration."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if len(before) > 5:
        return []
    return [path for key, item in inside for path in ((*before, key), *places(item, (*before, key)))]


def damage(config: dict[str, Any], draw: random.Random) -> str:
    """Return the text of a configuration after up to three changes."""
    if draw.random() < 0.03:
        return draw.choice(TEXTS)
    config = copy.deepcopy(config)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        if not (path := draw.choice(places(config) or [()])):
            break
        place: Any = config
        for key in path[:-1]:
            place = place[key]
        old = json.loads(json.dumps(place[path[-1]]))
        depth = draw.choice((20, 400, 800))
        kind = draw.choice(("drop", "number", "other", "type", "nest", "deep", "scale", "move"))
        if kind == "drop":
            del place[path[-1]]
        elif kind == "move":
            config[draw.choice(("llm_config", "text_config", "vision_config", "rope_scaling", "hidden_size"))] = old
        else:
            place[path[-1]] = {
                "number": draw.choice(NUMBERS),
                "other": json.loads(json.dumps(draw.choice(OTHERS))),
                "type": str(old) if not isinstance(old, str) else len(old),
                "nest": draw.choice(([old], {"value": old}, [old] * 3)),
                "deep": json.loads("[" * depth + "]" * depth),
                "scale": old * draw.choice((-1, 3, 1000, 10**7)) if isinstance(old, int) else old,
            }[kind]
    return json.dumps(config)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write models in both layouts and components, one of each kind."""
    root = tmp_path_factory.mktemp("whole")
    tiny_hf_model(root / "transformers", "6b")
    write_tiny_published(root / "internvl3", "internvl")
    write_tiny_published(root / "skywork", "skywork")
    tiny_hf_vision(root / "vision")
    tiny_hf_language(root / "language")
    return root


def calls(root: Path, kind: str, output: Path) -> list[tuple[Callable[..., None], list[Path | str]]]:
    """Return the tools that read a folder, with their arguments."""
    folder = root / kind
    out: list[Path | str] = ["--output", output, "--quiet"]
    vision, language = root / "vision", root / "language"
    if kind == "vision":
        return [(reassemble.main, ["--vision", folder, "--language", language, *out])]
    if kind == "language":
        return [(reassemble.main, ["--vision", vision, "--language", folder, *out])]
    return [
        (verify.main, [folder]),
        (inspect.main, [folder]),
        (hf_to_hf.main, ["--hf", folder, "--layout", "transformers", *out]),
        (hf_to_hf.main, ["--hf", folder, "--layout", "chat", *out]),
        (hf_to_megatron.main, ["--hf", folder, *out]),
        (reassemble.main, ["--vision", folder, "--language", language, *out]),
        (reassemble.main, ["--vision", vision, "--adapter", folder, "--language", language, *out]),
        (plan.main, ["--gpus", "1", *SHORT, "--hf-config", folder]),
    ]


def stop_before_the_weights(conversion: Any, output: Path, options: Any, companions: Any) -> None:
    """Do what a conversion does before it writes weights, config.json, tokenizer and processor included."""
    files = conversion.output_files()
    output.mkdir()
    try:
        companions.prepare(output, {info.dtype for file in files for _, info in file.tensors})
    finally:
        shutil.rmtree(output)


def tracebacks(root: Path, output: Path, seeds: range) -> tuple[list[str], dict[str, int]]:
    """Call a tool on a damaged folder for each seed.

    Returns:
        What ended in a traceback or took too long, and how many calls were refused or did their work.
    """
    failures, counts = [], {"refused": 0, "done": 0}
    kinds = ("transformers", "internvl3", "skywork", "transformers", "internvl3", "skywork", "vision", "language")
    for seed in seeds:
        draw = random.Random(seed)
        kind = draw.choice(kinds)
        path = root / kind / "config.json"
        whole = path.read_text()
        text = damage(json.loads(whole), draw)
        path.write_text(text, encoding="utf-8")
        main, arguments = draw.choice(calls(root, kind, output))
        started = time.process_time()
        try:
            main([str(argument) for argument in arguments])
            counts["done"] += 1
        except SystemExit as end:
            counts["refused" if end.code else "done"] += 1
        except BaseException as error:  # whatever it is, a person would see it
            last = traceback.extract_tb(error.__traceback__)[-1]
            failures.append(f"seed {seed}: {main.__module__} {kind}: {type(error).__name__}: {error!s:.200} ({last})")
        finally:
            path.write_text(whole)
        if (seconds := time.process_time() - started) > PATIENCE_SECONDS:
            failures.append(f"seed {seed}: {main.__module__} {kind} took {seconds:.0f} s")
    return failures, counts


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (destinations, splicing):
        monkeypatch.setattr(module, "convert", stop_before_the_weights)


def test_damaged_configurations_are_refused_in_words(folders: Path, tmp_path: Path) -> None:
    failures, counts = tracebacks(folders, tmp_path / "out", range(300))
    assert not failures, "\n".join(failures)
    assert min(counts.values()) >= 50, counts


@pytest.mark.slow
@pytest.mark.parametrize("piece", range(10))
def test_ten_thousand_damaged_configurations_are_refused_in_words(folders: Path, tmp_path: Path, piece: int) -> None:
    failures, counts = tracebacks(folders, tmp_path / "out", range(1000 + 1000 * piece, 2000 + 1000 * piece))
    assert not failures, "\n".join(failures)
    assert min(counts.values()) >= 100, counts


def test_the_undamaged_folders_do_their_work(folders: Path, tmp_path: Path) -> None:
    """Nothing above shows anything where a tool refuses every folder."""
    for kind in ("transformers", "internvl3", "skywork", "vision", "language"):
        for main, arguments in calls(folders, kind, tmp_path / "out"):
            main([str(argument) for argument in arguments])
