"""The command line of `r1v2 serve`."""

from __future__ import annotations

import argparse
import ipaddress
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_r1v2.config.command_line import command_parser, quiet_libraries, tell_bad_input
from megatron_r1v2.config.load import load_recipe
from megatron_r1v2.config.schema import RunRecipe
from megatron_r1v2.config.validate import check_stage
from megatron_r1v2.serve.access import bind, read_api_key

_DESCRIPTION = """\
Serve a model by OpenAI's chat completions API, images as base64 data URLs; requests are batched by the engine that
makes the rollouts.

CHECKPOINT is one of
  a folder of a run, or one of its checkpoints   the settings are those of the run, the base is its model.hf_path
  a folder of a whole model in HF's layout       the settings are the defaults
and section.key=value changes a setting (python -m megatron_r1v2 evaluate --help lists them all)."""

_EPILOG = """\
settings that matter here
  generation.max_response_tokens   the longest response, and the default of max_tokens: 65536 for long reasoning
  data.max_prompt_tokens           the longest prompt; data.max_tiles: tiles of its images
  generation.kv_cache_gib          memory for keys and values, held as long as the server runs
  generation.max_requests          responses under way at once; --max-queue more may wait, then clients are told 503
  generation.temperature, top_p    for requests that do not say
  parallel.tensor, .pipeline       the layout, which need not be that of the training

examples
  python -m megatron_r1v2 serve runs/grpo generation.kv_cache_gib=2
  torchrun --nproc-per-node 8 -m megatron_r1v2 serve models/R1V2-38B parallel.tensor=8 \\
      generation.max_response_tokens=65536 generation.kv_cache_gib=40
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{"messages": [{"role": "user", "content": "What is 3 + 5?"}], "max_tokens": 2000}'

requests
  The fields of chat completions for text and images are understood, role developer is system, and an assistant's
  content may be null. Fields that change nothing are ignored: user, metadata, store, service_tier and the like. What
  would change the answer and is not done is refused with 400: tools, role tool, response_format, penalties,
  reasoning_effort other than "medium", chat_template_kwargs other than enable_thinking=true; unknown fields too, and
  texts with a control token of the model (<|im_end|>, <img>).
  A connection has 10 seconds for the headers of a request and 60 for its body. Bodies that are held at once may be 16
  times --max-body-mib together, then clients are told 503.

GET /health says whether requests are taken, GET /metrics counts for Prometheus. SIGTERM ends the server: it takes no
more requests and gives those under way --grace-seconds."""


def main(argv: Sequence[str]) -> None:
    """Serve until the process is asked to end; exit 2 on bad input."""
    arguments = _parser().parse_intermixed_args(argv)
    quiet_libraries()
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    with tell_bad_input():
        recipe = serving_recipe(arguments.checkpoint, arguments.settings)
        check_stage(recipe, "serve")
        check_one_replica(recipe, world_size)
        key = read_api_key(arguments.api_key_variable, arguments.api_key_file)
        # Only rank 0 listens; an address in use is found before the model is loaded.
        listener = bind(arguments.host, arguments.port) if rank == 0 else None
        if listener and not key and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
            print(
                f"warning: anyone who reaches {arguments.host} may use this server; set --api-key-file", file=sys.stderr
            )
    # Imported after the settings are checked: a typo should not take the seconds that megatron-core needs.
    from megatron_r1v2.serve.requests import Limits
    from megatron_r1v2.serve.run import ServeOptions, serve

    options = ServeOptions(
        name=arguments.name or Path(arguments.checkpoint).resolve().name,
        limits=Limits(
            body_bytes=int(arguments.max_body_mib * 2**20),
            images=arguments.max_images,
            image_pixels=int(arguments.max_image_megapixels * 1e6),
        ),
        max_queue=arguments.max_queue,
        request_seconds=arguments.request_seconds,
        grace_seconds=arguments.grace_seconds,
        api_key=key,
        reasoning_ends=arguments.reasoning_ends,
    )
    with tell_bad_input():
        serve(recipe, options, listener)


def serving_recipe(checkpoint: str, settings: Sequence[str]) -> RunRecipe:
    """Return the settings of what is to be served.

    Args:
        checkpoint: an HF folder, a run, or a checkpoint of one.
        settings: `section.key=value`.

    Raises:
        ValueError: it is none of these, or a setting is wrong.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise ValueError(
            f"CHECKPOINT={checkpoint!r} is not a folder; give a run, one of its checkpoints or an HF model"
        )
    if (folder / "config.json").is_file():
        recipe = load_recipe(None, settings)
        return replace(recipe, model=replace(recipe.model, hf_path=str(folder)))
    from megatron_r1v2.training.store import RECIPE_FILE, resolve_checkpoint

    found = resolve_checkpoint(folder)
    if not (found / RECIPE_FILE).is_file():
        raise ValueError(f"{found} has no {RECIPE_FILE}, which names its base; serve the run's own checkpoints folder")
    recipe = load_recipe(found / RECIPE_FILE, settings)
    return replace(recipe, model=replace(recipe.model, checkpoint=str(found)))


def check_one_replica(recipe: RunRecipe, world_size: int) -> None:
    """Refuse processes that the layout has no work for.

    Raises:
        ValueError: there are fewer or more than parallel.tensor x parallel.pipeline.
    """
    needed = recipe.parallel.tensor * recipe.parallel.pipeline
    if world_size != needed:
        raise ValueError(
            f"parallel.tensor={recipe.parallel.tensor} x parallel.pipeline={recipe.parallel.pipeline} needs {needed} "
            f"processes and there are {world_size}; start torchrun --nproc-per-node {needed} -m megatron_r1v2 serve, "
            "or change the layout; for more replicas start one server for each"
        )


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("serve", _DESCRIPTION, epilog=_EPILOG)
    parser.usage = "[torchrun ... -m | python -m] megatron_r1v2 serve CHECKPOINT [section.key=value ...] [options]"
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="see above")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="changes a setting")
    parser.add_argument("--name", default="", help="of the model, for clients (default: the folder's name)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)"
    )
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free (default: 8000)")
    parser.add_argument("--api-key-variable", default="", help="environment variable with the key clients must send")
    parser.add_argument("--api-key-file", default="", help="file with the key clients must send")
    parser.add_argument(
        "--reasoning-ends",
        default="",
        metavar="TEXT",
        help="such as '</think>': what stands before it is told as reasoning_content, and content is the answer alone",
    )
    parser.add_argument("--max-queue", type=_count, default=256, help="responses that may wait (default: 256)")
    parser.add_argument("--max-body-mib", type=_positive, default=64.0, help="largest request (default: 64)")
    parser.add_argument("--max-images", type=_count, default=16, help="images in a request (default: 16)")
    parser.add_argument("--max-image-megapixels", type=_positive, default=40.0, help="of one image (default: 40)")
    parser.add_argument(
        "--request-seconds", type=_positive, default=3600.0, help="a request that takes longer is ended (default: 3600)"
    )
    parser.add_argument(
        "--grace-seconds", type=_count, default=20, help="for what is under way at SIGTERM (default: 20)"
    )
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}; accepted: a whole number, 0 or more")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}; accepted: a number above 0")
    return value
