"""lm-eval and bfcl-eval against scripted servers: `make harness-test`, with BFCL_PYTHON for the latter.

IFEval by the harness's own rules, but on made prompts: its published data needs the network. BFCL's is in its package.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

import megatron_r1v2
from examples.digits.verify_endpoint import LmEvalTask, lm_eval_python, run_lm_eval
from tests.evaluation.responder import serving

pytestmark = pytest.mark.slow

BFCL = Path(megatron_r1v2.__file__).parent / "evaluation" / "bfcl.py"
BFCL_PYTHON = os.environ.get("BFCL_PYTHON")

TASK = """\
task: ifeval_made
dataset_path: json
dataset_kwargs: {{data_files: {{train: {data}}}}}
output_type: generate_until
test_split: train
num_fewshot: 0
doc_to_text: prompt
doc_to_target: 0
generation_kwargs: {{until: [], do_sample: false, temperature: 0.0, max_gen_toks: 64}}
process_results: !function rules.process_results
metric_list:
  - metric: prompt_level_strict_acc
    aggregation: mean
    higher_is_better: true
  - metric: inst_level_strict_acc
    aggregation: !function rules.agg_inst_level_acc
    higher_is_better: true
  - metric: prompt_level_loose_acc
    aggregation: mean
    higher_is_better: true
  - metric: inst_level_loose_acc
    aggregation: !function rules.agg_inst_level_acc
    higher_is_better: true
"""
RULES = "from lm_eval.tasks.ifeval.utils import agg_inst_level_acc, process_results  # noqa: F401\n"
ROWS = [
    {"key": 1, "prompt": "Name a color. No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    {"key": 2, "prompt": "Two colors. No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    {
        "key": 3, "prompt": "Say it in JSON.", "instruction_id_list": ["detectable_format:json_format"], "kwargs": [{}],
    },
    {"key": 4, "prompt": "Shout.", "instruction_id_list": ["change_case:english_capital"], "kwargs": [{}]},
]  # fmt: skip


@pytest.mark.skipif(lm_eval_python() is None, reason="no lm-eval: run `make harness-test`")
def test_ifeval_rules_by_lm_eval_judge_what_is_behind_the_reasoning(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "ifeval_made.yaml").write_text(TASK.format(data=data))
    (tmp_path / "task" / "rules.py").write_text(RULES)
    answers = {
        "Name a color. No commas.": "Red, or green, or blue.</think>\n\nred",
        "Two colors. No commas.": "red, blue",
        "Say it in JSON.": '{"said": 1}',
        "Shout.": "not loud",
    }
    with serving(lambda body: answers[body["messages"][-1]["content"]]) as (url, responder):
        task = LmEvalTask("ifeval_made", folder=tmp_path / "task", model_args="think_end_token=</think>")
        results, rows = run_lm_eval(lm_eval_python(), task, tmp_path / "out", url=url, model="served")
    assert len(responder.bodies) == len(rows) == 4
    assert results["prompt_level_strict_acc,none"] == 0.5
    assert results["inst_level_strict_acc,none"] == 0.5


def run_bfcl(root: Path, url: str, *arguments: str) -> None:
    environment = os.environ | {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "none", "BFCL_PROJECT_ROOT": str(root)}
    command = [BFCL_PYTHON, BFCL, *arguments, "--model", "r1v2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.skipif(BFCL_PYTHON is None, reason="no bfcl-eval: run `make harness-test BFCL_PYTHON=...`")
def test_bfcl_reads_calls_behind_the_reasoning(tmp_path):
    """Two of its questions: one call that only the reasoning gets wrong, and one wrong call."""
    chosen = {"simple_python": ["simple_python_0", "simple_python_1"]}
    (tmp_path / "test_case_ids_to_generate.json").write_text(json.dumps(chosen))
    right, wrong = "[calculate_triangle_area(base=10, height=5)]", "[math.factorial(number=6)]"

    def answer(body):
        triangle = "triangle" in body["messages"][-1]["content"]
        return f"Perhaps [area(5)]?</think>\n\n{right}" if triangle else f"</think>{wrong}"

    with serving(answer) as (url, responder):
        run_bfcl(tmp_path, url, "generate", "--temperature", "0", "--run-ids")
        run_bfcl(tmp_path, url, "evaluate", "--test-category", "simple_python", "--partial-eval")
    assert [body["model"] for body in responder.bodies] == ["r1v2", "r1v2"]
    (scores,) = tmp_path.rglob("BFCL_v4_simple_python_score.json")
    total, *failed = [json.loads(line) for line in scores.read_text().splitlines()]
    assert (total["correct_count"], total["total_count"]) == (1, 2)
    assert [row["id"] for row in failed] == ["simple_python_1"]
