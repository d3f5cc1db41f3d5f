"""A reward function of a user's own file, loaded and called in a verifier worker; standard library only."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import math
import numbers
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

INPUTS = ("response", "prompt", "answer", "metadata", "images")
"""The arguments of a function, which it takes by name."""


@functools.cache  # a worker imports a file once
def load_file(path: str) -> ModuleType | str:
    """Import a Python file, with its folder behind the paths that modules are looked for in.

    Returns:
        The module, or why it cannot be imported.
    """
    file = Path(path).absolute()
    spec = importlib.util.spec_from_file_location(f"reward_function_{file.stem}", file)
    if spec is None or spec.loader is None:
        return "it is no Python file; its name ends in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    sys.path.append(str(file.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file raises is for the user to read
        return f"it cannot be imported: {_describe(error, path)}"
    return module


def check_function(path: str, name: str) -> str:
    """Return why a function cannot score responses; "" where it can."""
    module = load_file(path)
    if isinstance(module, str):
        return module
    function = getattr(module, name, None)
    if not callable(function):
        functions = inspect.getmembers(module, inspect.isfunction)
        defined = [key for key, value in functions if value.__module__ == module.__name__]
        return f"it has no function {name!r}, only {', '.join(defined) or 'none at all'}"
    if inspect.iscoroutinefunction(function):
        return f"{name} is asynchronous; write def, not async def"
    signature = inspect.signature(function)
    try:
        signature.bind(**dict.fromkeys(INPUTS))
    except TypeError as error:
        return f"{name}{signature} is called with {', '.join(INPUTS)} by name: {error}; add **others for the rest"
    return ""


def score_response(path: str, name: str, inputs: Mapping[str, object]) -> tuple[dict[str, float], str]:
    """Call a function.

    Returns:
        Its parts by name ("" for a single number), and why there are none; one of the two is empty.
    """
    module = load_file(path)
    if isinstance(module, str):
        return {}, module
    function: Callable[..., object] = getattr(module, name)
    try:
        result = function(**inputs)
    except Exception as error:  # whatever a user's function raises is for the user to read
        return {}, _describe(error, path)
    parts = result if isinstance(result, dict) else {"": result}
    scores = {str(part): _score(value) for part, value in parts.items()}
    found = {part: score for part, score in scores.items() if score is not None}
    if not found or len(found) < len(parts):
        return {}, f"it returned {result!r:.200}, not a number from 0 to 1, or a dict of such numbers by name"
    return found, ""


def _score(value: object) -> float | None:
    # NumPy's numbers are real ones too.
    number = float(value) if isinstance(value, numbers.Real) else math.nan
    return number if 0 <= number <= 1 else None


def _describe(error: Exception, path: str) -> str:
    """Return an error with the line of the file that it came from."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename) == Path(path).absolute()
    ]
    if isinstance(error, SyntaxError) and error.lineno is not None:
        lines.append(error.lineno)
    place = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {error}{place}"
