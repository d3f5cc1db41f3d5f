"""bfcl-eval with a row for a served model: its command line, run by the Python of its own environment.

    OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none BFCL_PROJECT_ROOT=runs/bfcl \\
        bfcl_env/bin/python megatron_r1v2/evaluation/bfcl.py generate --model r1v2 --temperature 0

Imports nothing of this package. Functions are described in the prompt and calls read from the text, since the server
knows no tools; what comes before `</think>` is reasoning, and no call.
"""

from __future__ import annotations

from bfcl_eval.__main__ import cli
from bfcl_eval.constants.model_config import MODEL_CONFIG_MAPPING, ModelConfig
from bfcl_eval.model_handler.api_inference.openai_completion import OpenAICompletionsHandler

MODEL = "r1v2"
"""As `python -m megatron_r1v2 serve --name` calls it."""
_REASONING_ENDS = "</think>"


class ServedHandler(OpenAICompletionsHandler):
    """A handler that asks the server in OPENAI_BASE_URL and separates reasoning from answer."""

    def _parse_query_response_prompting(self, api_response: object) -> dict[str, object]:
        parsed: dict[str, object] = super()._parse_query_response_prompting(api_response)
        reasoning, _, answer = str(parsed["model_responses"] or "").rpartition(_REASONING_ENDS)
        return parsed | {
            "model_responses": answer.strip(),
            "model_responses_message_for_chat_history": {"role": "assistant", "content": answer.strip()},
            "reasoning_content": reasoning,
        }


if __name__ == "__main__":
    MODEL_CONFIG_MAPPING[MODEL] = ModelConfig(
        model_name=MODEL,
        display_name="R1V2 (Prompt)",
        url="https://arxiv.org/abs/2504.16656",
        org="",
        license="",
        model_handler=ServedHandler,
        is_fc_model=False,
    )
    cli()
