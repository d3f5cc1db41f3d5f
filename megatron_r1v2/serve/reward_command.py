"""The command line of `r1v2 serve-reward-model`.

Serve the scores of Skywork-VL-Reward to reward_model.url of a GRPO run, as vLLM's /pooling and /classify do. Put a
proxy in front against clients that connect and send slowly or nothing.

example:
  python -m megatron_r1v2 serve-reward-model FOLDER --port 8001
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_r1v2.config.command_line import command_parser, tell_bad_input
from megatron_r1v2.serve.options import RewardOptions, bind, parse_options, read_api_key

_CONNECTIONS = 512


def main(argv: Sequence[str]) -> None:
    """Load the model and serve it until the process is asked to end; exit 2 on bad input."""
    parser = command_parser("serve-reward-model", (__doc__ or "").partition("\n\n")[2])
    parser.add_argument("folder", help="Skywork-VL-Reward: Qwen2.5-VL in safetensors, and value_head.safetensors")
    arguments, options = parse_options(RewardOptions, parser, argv)
    with tell_bad_input():
        key = read_api_key(options.api_key_variable, options.api_key_file)
        listener = bind(options.host, options.port)
    # Imported after the arguments are checked: torch and transformers take seconds.
    import torch
    import uvicorn

    from megatron_r1v2.serve.reward_server import SkyworkReward, reward_app
    from megatron_r1v2.serve.web import uvicorn_config

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.precision]
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with tell_bad_input():
        scorer = SkyworkReward(arguments.folder, device=device, dtype=dtype)
    app = reward_app(scorer, max_body_mib=options.max_body_mib, api_key=key)
    uvicorn.Server(uvicorn_config(app, connections=_CONNECTIONS)).run(sockets=[listener])
