"""The speed of a conversion of a checkpoint of real widths, each way, beside `cp` of the same bytes.

    python -m benchmarks.conversion --work /scratch/space --output benchmarks/results/conversion_cpu.json

The checkpoint has the shapes of InternViT-6B, the adapter and QwQ-32B but fewer layers, and random weights in bf16; no
weight of a real model is needed. Each measurement begins with the source out of the page cache (posix_fadvise) and ends
when everything is on disk (fsync), for `cp` as for us. `cp` and the conversion take turns, so that what else the
machine does hurts both; the ratio is that of the medians. Memory is what the processes of the conversion hold that no
file backs (Pss_Anon of all of them together), looked at up to ten times a second: pages of files that are read through
the page cache can be dropped at any time and are not counted. The peer, mbridge, loads the language model alone through
megatron-core and saves it with dist_checkpointing; it is measured when its folder is given (see conversion_peer.py).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from megatron_r1v2.checkpoint.hf.config import IMAGE_TOKEN
from megatron_r1v2.checkpoint.hf.folders import INDEX_NAME
from megatron_r1v2.checkpoint.hf.mapping import canonical_hf_name
from megatron_r1v2.checkpoint.hf.safetensors_files import write_safetensors_file
from megatron_r1v2.checkpoint.tensor_files import TensorInfo
from megatron_r1v2.resilience.files import write_json

GB = 1000**3
_SHARD_BYTES = 2 * GB


@dataclass(frozen=True)
class Size:
    """Sizes of the checkpoint."""

    vision_layers: int = 7
    language_layers: int = 5
    vocabulary: int = 152064
    tiny: bool = False
    """Widths of a few dozen, to try the benchmark itself."""


@dataclass
class Measured:
    """One command."""

    seconds: float
    cpu_seconds: float
    """Of all its processes; unlike the seconds, they hardly depend on what else the machine does."""
    peak_anonymous_bytes: int


def hf_config(size: Size) -> InternVLConfig:
    """Return the configuration: the widths of Skywork-R1V2-38B."""
    wide = not size.tiny
    vision = InternVLVisionConfig(
        hidden_size=3200 if wide else 64,
        num_attention_heads=25 if wide else 4,
        intermediate_size=12800 if wide else 128,
        num_hidden_layers=size.vision_layers,
        image_size=448 if wide else 32,
        patch_size=14 if wide else 4,
        attention_bias=False,
        use_qk_norm=True,
        norm_type="rms_norm",
    )
    text = Qwen2Config(
        hidden_size=5120 if wide else 64,
        num_attention_heads=40 if wide else 4,
        num_key_value_heads=8 if wide else 2,
        intermediate_size=27648 if wide else 128,
        num_hidden_layers=size.language_layers,
        vocab_size=size.vocabulary,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return InternVLConfig(
        vision_config=vision, text_config=text, image_token_id=1, downsample_ratio=0.5, tie_word_embeddings=False
    )


def make_checkpoint(folder: Path, size: Size) -> None:
    """Write a random checkpoint in the layout of transformers."""
    config = hf_config(size)
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(config)
    shapes = {canonical_hf_name(name): tuple(value.shape) for name, value in model.state_dict().items()}
    _write(folder, shapes)
    content = json.loads(config.to_json_string(use_diff=False))
    write_json(folder / "config.json", {**content, "architectures": ["InternVLForConditionalGeneration"]})
    # A conversion wants a whole model, tokenizer included.
    words = {word: number for number, word in enumerate(("<|im_start|>", "<|im_end|>", "<img>", "</img>", IMAGE_TOKEN))}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words)), eos_token="<|im_end|>", additional_special_tokens=list(words)
    )
    tokenizer.save_pretrained(folder)


def make_language_checkpoint(folder: Path, size: Size) -> None:
    """Write a random checkpoint of the language model alone, for the peer."""
    config = hf_config(size).text_config
    from transformers import Qwen2ForCausalLM

    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    _write(folder, {name: tuple(value.shape) for name, value in model.state_dict().items()})
    content = json.loads(config.to_json_string(use_diff=False))
    write_json(folder / "config.json", {**content, "architectures": ["Qwen2ForCausalLM"], "torch_dtype": "bfloat16"})


def _write(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    folder.mkdir(parents=True)
    pool = torch.randn(32 * 1000**2, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    groups: list[list[tuple[str, TensorInfo]]] = [[]]
    for name, shape in shapes.items():
        info = TensorInfo(torch.bfloat16, shape)
        if groups[-1] and sum(other.num_bytes for _, other in groups[-1]) + info.num_bytes > _SHARD_BYTES:
            groups.append([])
        groups[-1].append((name, info))

    def values(group: list[tuple[str, TensorInfo]]) -> Iterator[torch.Tensor]:
        for number, (_, info) in enumerate(group):
            count = torch.Size(info.shape).numel()
            shifted = pool.roll(7919 * number)  # no two tensors are equal
            yield shifted.repeat(-(-count // len(shifted)))[:count].view(info.shape)

    where = {}
    for number, group in enumerate(groups):
        name = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        write_safetensors_file(folder / name, group, ([tensor] for tensor in values(group)))
        where.update({tensor: name for tensor, _ in group})
    write_json(folder / INDEX_NAME, {"metadata": {}, "weight_map": where})


def measure(command: Sequence[str], source: Path, output: Path, *, path: str = "") -> Measured:
    """Run a command with its source out of the cache, until its output is on disk."""
    shutil.rmtree(output, ignore_errors=True)
    out_of_cache(source)
    environment = {**os.environ, **({"PYTHONPATH": path} if path else {})}
    start, cpu = time.perf_counter(), _cpu_seconds()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        begun = time.perf_counter()
        peak = max(peak, anonymous_bytes(process.pid))
        # The system walks all that a process has mapped: looking must not take more than a twentieth of a core.
        time.sleep(max(0.1, 20 * (time.perf_counter() - begun)))
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {process.returncode}")
    sync(output)
    found = Measured(time.perf_counter() - start, _cpu_seconds() - cpu, peak)
    print(f"{' '.join(command)}: {found}", file=sys.stderr, flush=True)
    return found


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def out_of_cache(folder: Path) -> None:
    """Drop the pages of a folder's files from the page cache."""
    for path in files_of(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sync(folder: Path) -> None:
    """Wait until a folder is on disk."""
    for path in files_of(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def files_of(folder: Path) -> list[Path]:
    """Return all files below a folder."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def anonymous_bytes(pid: int) -> int:
    """Return what a process and its descendants hold that no file backs; what they share is counted once."""
    total, todo = 0, [pid]
    while todo:
        current = todo.pop()
        try:
            rollup = Path(f"/proc/{current}/smaps_rollup").read_text()
            for task in Path(f"/proc/{current}/task").iterdir():
                todo += [int(child) for child in (task / "children").read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += sum(1024 * int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss_Anon"))
    return total


def both_ways(work: Path, *, repeats: int, workers: int) -> dict[str, Any]:
    """Convert there and back, in turns with cp."""
    hf, megatron = work / "hf", work / "megatron"
    tool = [sys.executable, "-m"]
    options = ["--quiet", "--overwrite", "--workers", str(workers)]
    ways = {
        "hf_to_megatron": (hf, megatron, [*tool, "checkpoint_tools.hf_to_megatron", "--hf", str(hf)]),
        "megatron_to_hf": (
            megatron,
            work / "back",
            [*tool, "checkpoint_tools.megatron_to_hf", "--checkpoint", str(megatron)],
        ),
    }
    found: dict[str, Any] = {}
    for name, (source, output, command) in ways.items():
        copies, conversions = [], []
        for _ in range(repeats):
            copies.append(measure(["cp", "-r", str(source), str(work / "copy")], source, work / "copy"))
            shutil.rmtree(work / "copy")
            conversions.append(measure([*command, "--output", str(output), *options], source, output))
        found[name] = summary(sum(path.stat().st_size for path in files_of(source)), copies, conversions)
    back = [(path.name, path.stat().st_size) for path in files_of(work / "back") if path.suffix == ".safetensors"]
    found["bytes_back"] = sum(size for _, size in back)
    return found


def summary(num_bytes: int, copies: list[Measured], conversions: list[Measured]) -> dict[str, Any]:
    """Return rates and their ratio."""
    copy, ours = (statistics.median(run.seconds for run in runs) for runs in (copies, conversions))
    return {
        "bytes": num_bytes,
        "cp_seconds": [round(run.seconds, 2) for run in copies],
        "seconds": [round(run.seconds, 2) for run in conversions],
        "cp_cpu_seconds": [round(run.cpu_seconds, 2) for run in copies],
        "cpu_seconds": [round(run.cpu_seconds, 2) for run in conversions],
        "cp_GB_per_s": round(num_bytes / copy / GB, 3),
        "GB_per_s": round(num_bytes / ours / GB, 3),
        "of_cp": round(copy / ours, 3),
        "cpu_seconds_per_GB": round(statistics.median(run.cpu_seconds for run in conversions) / num_bytes * GB, 2),
        "cp_cpu_seconds_per_GB": round(statistics.median(run.cpu_seconds for run in copies) / num_bytes * GB, 2),
        "peak_anonymous_GB": round(max(run.peak_anonymous_bytes for run in conversions) / GB, 3),
    }


def peer(work: Path, size: Size, folder: Path) -> dict[str, Any]:
    """Measure mbridge on the language model alone."""
    make_language_checkpoint(work / "language", size)
    num_bytes = sum(path.stat().st_size for path in files_of(work / "language"))
    found: dict[str, Any] = {"bytes": num_bytes}
    root = str(Path(__file__).parents[1])
    language, megatron, back = (str(work / name) for name in ("language", "peer-megatron", "peer-back"))
    ways = {"import": (language, megatron, []), "export": (megatron, back, [language])}
    for way, (source, output, more) in ways.items():
        command = [sys.executable, "-m", "benchmarks.conversion_peer", way, source, output, *more]
        run = measure(command, Path(source), Path(output), path=f"{folder}:{root}")
        found[way] = {
            "seconds": round(run.seconds, 2),
            "cpu_seconds": round(run.cpu_seconds, 2),
            "GB_per_s": round(num_bytes / run.seconds / GB, 3),
            "peak_anonymous_GB": round(run.peak_anonymous_bytes / GB, 3),
        }
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder on the disk to measure; four times the size")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the figures")
    parser.add_argument("--vision-layers", type=int, default=7)
    parser.add_argument("--language-layers", type=int, default=5)
    parser.add_argument("--vocabulary", type=int, default=152064)
    parser.add_argument("--tiny", action="store_true", help="widths of a few dozen, to try the benchmark")
    parser.add_argument("--repeats", type=int, default=3, help="turns of cp and conversion")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--peer", type=Path, help="folder with mbridge (pip install --no-deps --target FOLDER mbridge)")
    options = parser.parse_args(arguments)
    size = Size(options.vision_layers, options.language_layers, options.vocabulary, options.tiny)
    work = options.work / "conversion-benchmark"
    work.mkdir(parents=True)
    try:
        make_checkpoint(work / "hf", size)
        load = os.getloadavg()[0]
        found = both_ways(work, repeats=options.repeats, workers=options.workers)
        for name in ("megatron", "back"):
            shutil.rmtree(work / name)
        if options.peer:
            found["mbridge_language_model_only"] = peer(work, size, options.peer)
    finally:
        shutil.rmtree(work)
    largest = 2 * size.vocabulary * hf_config(size).text_config.hidden_size
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
    machine["load_average"] = [round(load, 1), round(os.getloadavg()[0], 1)]
    content = {"machine": machine, "size": asdict(size), "workers": options.workers, "largest_tensor_bytes": largest}
    write_json(options.output, content | found)


if __name__ == "__main__":
    main()
