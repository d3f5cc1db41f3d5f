"""Tests of the GPU run what the CPU tests run, where the code finds a CUDA device by itself.

Without one they are skipped. `pytest tests/gpu --gpu-tests-on-cpu` runs their bodies on the CPU all the same, to find
mistakes in the tests themselves before a GPU is at hand.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.steps import Material, make_material
from tests.tiny_hf import tiny_hf_model, tiny_text_config, tiny_vision_config


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-tests-on-cpu", action="store_true", help="run the bodies of the GPU tests on the CPU")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session", autouse=True)
def a_device(request: pytest.FixtureRequest) -> None:
    """Skip all where there is no CUDA device, and say so."""
    if not torch.cuda.is_available() and not request.config.getoption("--gpu-tests-on-cpu", default=False):
        pytest.skip("no CUDA device (--gpu-tests-on-cpu runs the bodies on the CPU)")


@pytest.fixture(scope="session")
def needs_cuda(a_device: None) -> None:
    """Skip what no CPU can do even in part."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device, and nothing of this runs on a CPU")


@pytest.fixture(scope="session")
def inputs(a_device: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Material]:
    """A 6B-family model with 5 vision heads, and what transformers' autograd on the CPU gives for a step in fp32.

    Heads of 32 channels and four layers: what flash-attn takes, and what FP8 can be on in between.
    """
    folder = tmp_path_factory.mktemp("gpu") / "model"
    text = tiny_text_config(vocab_size=301, hidden=128, heads=4, layers=4)
    model = tiny_hf_model(folder, "6b", vision=tiny_vision_config("6b", heads=5), text=text)
    return str(folder), make_material(model)
