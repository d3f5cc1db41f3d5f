"""The row for bfcl-eval, with a stand-in for that package: `test_outside_harness.py` runs the real one."""

import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import megatron_r1v2

SCRIPT = Path(megatron_r1v2.__file__).parent / "evaluation" / "bfcl.py"


@dataclass
class ModelConfig:
    model_name: str
    display_name: str
    url: str
    org: str
    license: str
    model_handler: Any
    is_fc_model: bool


class Handler:
    """As bfcl-eval's: takes the text out of an answer."""

    def _parse_query_response_prompting(self, api_response):
        return {"model_responses": api_response, "input_token": 7}


@pytest.fixture
def harness(monkeypatch):
    """Return the table of models, and how often the command line was run."""
    table, runs = {}, []
    for name, members in {
        "bfcl_eval": {},
        "bfcl_eval.__main__": {"cli": lambda: runs.append(1)},
        "bfcl_eval.constants": {},
        "bfcl_eval.constants.model_config": {"MODEL_CONFIG_MAPPING": table, "ModelConfig": ModelConfig},
        "bfcl_eval.model_handler": {},
        "bfcl_eval.model_handler.api_inference": {},
        "bfcl_eval.model_handler.api_inference.openai_completion": {"OpenAICompletionsHandler": Handler},
    }.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return table, runs


def test_the_command_line_knows_the_served_model_and_runs(harness):
    table, runs = harness
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert table.keys() == {"r1v2"}
    assert (table["r1v2"].model_name, table["r1v2"].is_fc_model, runs) == ("r1v2", False, [1])


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("Perhaps [f(1)]?</think>\n\n[f(2)] ", "Perhaps [f(1)]?", "[f(2)]"),
        ("[f(2)]", "", "[f(2)]"),
        ("a</think>b</think>c", "a</think>b", "c"),
        ("never ends", "", "never ends"),
        (None, "", ""),
    ],
)
def test_calls_are_read_behind_the_reasoning(harness, text, reasoning, answer):
    handler = runpy.run_path(str(SCRIPT))["ServedHandler"]()
    assert handler._parse_query_response_prompting(text) == {
        "model_responses": answer,
        "model_responses_message_for_chat_history": {"role": "assistant", "content": answer},
        "reasoning_content": reasoning,
        "input_token": 7,
    }
