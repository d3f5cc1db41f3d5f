"""The command line of `r1v2 serve`.

Serve a Megatron checkpoint by OpenAI's chat completions API, images as base64 data URLs, without an export: for
evaluating and trying a model. Requests are batched by the engine that makes the rollouts. To serve in production,
export the model (python -m checkpoint_tools.megatron_to_hf --layout transformers) and run vLLM on the export.

CHECKPOINT is one of
  a folder of a run, or one of its checkpoints   the settings are those of the run, the base is its model.hf_path
  a folder of a whole model in HF's layout       the settings are the defaults
and section.key=value changes a setting (--help WORD ... shows those that contain a word).

settings that matter here
  generation.max_response_tokens   the longest response, and the default of max_tokens: 65536 for long reasoning
  data.max_prompt_tokens           the longest prompt; data.max_tiles: tiles of its images
  generation.kv_cache_gib          memory for keys and values, held as long as the server runs
  generation.max_requests          responses under way at once; --max-queue more may wait, then clients are told 503
  generation.temperature           for requests that do not say
  parallel.tensor, .pipeline       the layout, which need not be that of the training

examples
  python -m megatron_r1v2 serve runs/grpo generation.kv_cache_gib=2
  torchrun --nproc-per-node 8 -m megatron_r1v2 serve models/R1V2-38B parallel.tensor=8 \\
      generation.max_response_tokens=65536 generation.kv_cache_gib=40
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{"messages": [{"role": "user", "content": "What is 3 + 5?"}]}'

requests
  The fields of chat completions for text and images are understood, role developer is system, and an assistant's
  content may be null. Fields that change nothing are ignored: user, metadata, store, service_tier and the like. What
  would change the answer and is not done is refused with 400: tools, role tool, response_format, penalties,
  reasoning_effort other than "medium", chat_template_kwargs other than enable_thinking=true; unknown fields too, and
  texts with a control token of the model (<|im_end|>, <img>).
  A body has 60 seconds to arrive, and 16 are read at once. Against clients that connect and send slowly or nothing, put
  a proxy in front (nginx, say, which passes on whole requests): past a limit of connections all clients are told 503.

GET /health says whether requests are taken, GET /metrics counts for Prometheus. SIGTERM ends the server: it takes no
more requests and gives those under way --grace-seconds.
"""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megatron_r1v2.config.command_line import command_parser, describe_settings, quiet_libraries, tell_bad_input
from megatron_r1v2.config.load import Check, load_recipe_as
from megatron_r1v2.config.recipes import Recipe, ServeRecipe
from megatron_r1v2.config.validate import download_hint
from megatron_r1v2.serve.options import ChatOptions, bind, parse_options, read_api_key
from megatron_r1v2.stages.model_fit import all_mistakes


def main(argv: Sequence[str]) -> None:
    """Serve until the process is asked to end; exit 2 on bad input."""
    parser = command_parser(
        "serve", (__doc__ or "").partition("\n\n")[2], settings=partial(describe_settings, ServeRecipe)
    )
    parser.usage = "[torchrun ... -m | python -m] megatron_r1v2 serve CHECKPOINT [section.key=value ...] [options]"
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="see above")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="changes a setting")
    arguments, options = parse_options(ChatOptions, parser, argv)
    quiet_libraries()
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    with tell_bad_input():
        recipe = serving_recipe(arguments.checkpoint, arguments.settings, check=all_mistakes)
        check_one_replica(recipe, world_size)
        key = read_api_key(options.api_key_variable, options.api_key_file)
        # Only rank 0 listens; an address in use is found before the model is loaded.
        listener = bind(options.host, options.port) if rank == 0 else None
    if listener and not key and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
        print(f"warning: anyone who reaches {options.host} may use this server; set --api-key-file", file=sys.stderr)
    # Imported after the settings are checked: a typo should not take the seconds that megatron-core needs.
    from megatron_r1v2.serve.run import serve

    named = options.model_copy(update={"name": options.name or Path(arguments.checkpoint).resolve().name})
    with tell_bad_input():
        serve(recipe, named, key, listener)


def serving_recipe(checkpoint: str, settings: Sequence[str], *, check: Check | None = None) -> ServeRecipe:
    """Return the settings of the model to be served.

    Args:
        checkpoint: an HF folder, a run, or a checkpoint of one.
        settings: `section.key=value`.
        check: its mistakes are told with those of the settings.

    Raises:
        ValueError: the folder is of another kind, or a setting is wrong.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise ValueError(
            f"CHECKPOINT={checkpoint!r} is not a folder; give a run, one of its checkpoints or an HF model"
            f"{download_hint(checkpoint)}"
        )
    if (folder / "config.json").is_file():
        return load_recipe_as(ServeRecipe, None, [*settings, f"model.hf_path={folder}"], check=check)
    from megatron_r1v2.checkpoint.megatron.run_folder import RECIPE_FILE, resolve_checkpoint

    found = resolve_checkpoint(folder)
    if not (found / RECIPE_FILE).is_file():
        raise ValueError(f"{found} has no {RECIPE_FILE}, which names its base; serve the run's own checkpoints folder")
    overrides = [*settings, f"model.checkpoint={found}"]
    return load_recipe_as(ServeRecipe, found / RECIPE_FILE, overrides, saved=True, check=check)


def check_one_replica(recipe: Recipe, world_size: int) -> None:
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
