"""lm-eval against a served model, where it is installed: pip install 'lm-eval[api,ifeval]' pillow, LM_EVAL_PYTHON.

IFEval by the harness's own rules, but on made prompts: its published data needs the network.
"""

import json

import pytest

from examples.digits.verify_endpoint import lm_eval_python, run_lm_eval
from tests.evaluation.responder import serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(lm_eval_python() is None, reason="no lm-eval: set LM_EVAL_PYTHON to a Python that has it"),
]

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


def test_ifeval_rules_by_lm_eval_on_an_endpoint(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "ifeval_made.yaml").write_text(TASK.format(data=data))
    (tmp_path / "task" / "rules.py").write_text(RULES)
    answers = {
        "Name a color. No commas.": "red",
        "Two colors. No commas.": "red, blue",
        "Say it in JSON.": '{"said": 1}',
        "Shout.": "not loud",
    }
    with serving(lambda body: answers[body["messages"][-1]["content"]]) as (url, responder):
        results, rows = run_lm_eval(
            lm_eval_python(), "ifeval_made", tmp_path / "out", url=url, model="served", tasks=tmp_path / "task"
        )
    assert len(responder.bodies) == len(rows) == 4
    assert results["prompt_level_strict_acc,none"] == 0.5
    assert results["inst_level_strict_acc,none"] == 0.5
