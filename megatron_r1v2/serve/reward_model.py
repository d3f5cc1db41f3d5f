"""The command line of `r1v2 serve-reward-model`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_r1v2.config.command_line import command_parser
from megatron_r1v2.serve.access import read_api_key

_DESCRIPTION = """\
Serve the scores of Skywork-VL-Reward to reward_model.url of a GRPO run, as vLLM's /pooling and /classify do.

example:
  python -m megatron_r1v2 serve-reward-model FOLDER --port 8001"""


def main(argv: Sequence[str]) -> None:
    """Load the model and serve it until the process is asked to end."""
    arguments = _parser().parse_args(argv)
    # Imported after the arguments are checked: torch and transformers take seconds.
    import torch
    import uvicorn

    from megatron_r1v2.serve.connections import web_config
    from megatron_r1v2.serve.requests import Limits
    from megatron_r1v2.serve.reward_app import MOST_REQUESTS, reward_app
    from megatron_r1v2.serve.skywork_reward import SkyworkReward

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[arguments.precision]
    try:
        key = read_api_key(arguments.api_key_variable)
        device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
        scorer = SkyworkReward(arguments.folder, device=device, dtype=dtype)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    app = reward_app(scorer, limits=Limits(body_bytes=int(arguments.max_body_mib * 2**20)), api_key=key)
    config = web_config(app, connections=2 * MOST_REQUESTS, host=arguments.host, port=arguments.port)
    uvicorn.Server(config).run()


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("serve-reward-model", _DESCRIPTION)
    parser.add_argument("folder", help="Skywork-VL-Reward: Qwen2.5-VL in safetensors, and value_head.safetensors")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; the default is this machine alone")
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--device", default="", help="cpu, cuda, cuda:1, ...; default: cuda where there is one")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--api-key-variable", default="", help="environment variable with the key clients must send")
    parser.add_argument("--max-body-mib", type=float, default=64.0, help="largest request")
    return parser
