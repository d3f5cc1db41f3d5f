"""Tests of the GPU run what the CPU tests run, where the code finds a CUDA device by itself.

Without one they are skipped. `pytest tests/gpu --gpu-tests-on-cpu` runs their bodies on the CPU all the same, to find
mistakes in the tests themselves before a GPU is at hand.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_r1v2.resilience.files import write_file
from tests.distributed.steps import Material, make_material
from tests.tiny_hf import tiny_hf_model, tiny_text_config, tiny_vision_config

FIRST = (
    "test_a_step_in_fp32_is_that_of_the_cpu[one rank]",
    "test_the_engine_agrees_with_the_training_forward[bf16]",
    "test_a_stage_runs_and_engine_and_training_agree[bf16-grpo]",
    "test_a_step_in_bf16_is_within_the_noise_of_bf16",
    "test_shared_rows_in_bf16_are_within_the_noise_of_bf16",
    "test_a_step_is_the_same_before_and_after_a_rollout[bf16]",
    "test_graphs_replay_what_the_eager_engine_does_also_after_an_update[bf16]",
    "test_generation_with_graphs_in_a_stage",
    "test_attention_in_shared_rows_is_that_of_separate_ones",
)
"""The tests that say most, in this order: a device may be lent for minutes."""


class Outcomes:
    """Writes the outcome of each test as soon as it is known."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.found: dict[str, dict[str, object]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        outcome = {"outcome": report.outcome, "seconds": round(report.duration, 1)}
        if report.failed:
            outcome["error"] = report.longreprtext[-1000:]
        self.found[report.nodeid.rpartition("/")[2]] = outcome
        write_file(self.file, json.dumps(self.found))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-tests-on-cpu", action="store_true", help="run the bodies of the GPU tests on the CPU")
    parser.addoption("--outcomes", type=Path, help="write the outcome of each test to this file as they come")


def pytest_configure(config: pytest.Config) -> None:
    if file := config.getoption("--outcomes", default=None):
        config.pluginmanager.register(Outcomes(file))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.timeout(900))
    items.sort(key=_place)


def _place(item: pytest.Item) -> int:
    """Return the place of a test among the first; all others keep their order behind them."""
    return next((place for place, name in enumerate(FIRST) if item.name.startswith(name)), len(FIRST))


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
