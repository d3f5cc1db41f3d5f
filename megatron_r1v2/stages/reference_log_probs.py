"""Reference log-probs: those of chosen and rejected responses under the model that the stage starts from.

The data is fixed, so they are computed once, before the first step, and kept in a file named by the fingerprint of the
data set, the model and the settings that change numbers. A change of these gives another name, so that nothing stale is
ever read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from megatron_r1v2.checkpoint.megatron.run_folder import TENSORS, resolve_checkpoint
from megatron_r1v2.config.choices import TooLong
from megatron_r1v2.data.mixture import num_train_samples, source_names
from megatron_r1v2.data.shards import check_shards
from megatron_r1v2.parallel import objects
from megatron_r1v2.resilience.files import write_file
from megatron_r1v2.resilience.fingerprint import Fingerprint
from megatron_r1v2.resilience.json_lines import append_json_lines, recover_json_lines
from megatron_r1v2.rl.mpo import response_log_probs
from megatron_r1v2.stages.session import Session
from megatron_r1v2.stages.step_prompts import in_groups
from megatron_r1v2.stages.supervised_data import SIDES, PairSource, pair_samples, sample_name, shard_samples
from megatron_r1v2.types import Prompt

_VERSION = 1
Value = TypeVar("Value")


def compute_reference_fingerprint(session: Session) -> Fingerprint:
    """Collective over the world: fingerprint data set, model and settings, on which the log-probs depend.

    Args:
        session: the running stage; its ranks share the reading.
    """
    recipe = session.recipe
    model = Path(recipe.model.hf_path)
    files: dict[Path, str] = {}
    for source, name in zip(recipe.data.sources, source_names(recipe.data.sources), strict=True):
        # One data set without its name: it may be moved.
        folder = f"data/{name}" if len(recipe.data.sources) > 1 else "data"
        files |= {Path(source.path) / shard: f"{folder}/{shard}" for shard in check_shards(source.path)}
    files |= {path: f"model/{path.name}" for path in model.iterdir() if path.is_file()}
    if recipe.model.checkpoint:
        tensors = resolve_checkpoint(recipe.model.checkpoint) / TENSORS
        files |= {path: f"model/{TENSORS}/{path.name}" for path in tensors.iterdir() if path.is_file()}
    digests = _compute_digests(files)
    settings = {
        "version": _VERSION,
        "layers": recipe.model.layers.value,
        "precision": recipe.model.precision.value,
        "fp8": [recipe.model.fp8.value, recipe.model.fp8_weights],
        "transformer_config": recipe.model.transformer_config,
        "temperature": 1.0,  # of earlier versions, which tempered these too
        "end": session.response_encoder.end,
        "max_tiles": recipe.data.max_tiles,
        "text_only": session.trains_text,
    }
    if recipe.data.too_long is not TooLong.error:  # it decides which prompts there are, and which tiles they have
        settings |= {"too_long": recipe.data.too_long.value, "max_prompt_tokens": recipe.data.max_prompt_tokens}
    if session.survey.second_think:  # what is taken off was in the log-probs of earlier versions
        settings["second_think"] = "taken off"
    return Fingerprint.of(
        data=_digest([line for line in digests if line.startswith("data/")]),
        model=_digest([line for line in digests if line.startswith("model/")]),
        settings=settings,
    )


def keep_for_fewer_pairs(session: Session, saved: Fingerprint, fingerprint: Fingerprint, *, folder: Path) -> None:
    """Collective over the world: keep the log-probs of a data set for what is left of it.

    Args:
        saved: of the data set before pairs were taken out.
        fingerprint: of the data set now.
    """
    old, new = (_path_of(one, folder) for one in (saved, fingerprint))
    if session.context.is_main and old.is_file() and not new.exists():
        _write_finished(new, fingerprint, _read_finished(old) or {})
    dist.barrier()


def load_or_compute_log_probs(
    session: Session, source: PairSource, fingerprint: Fingerprint, *, folder: Path
) -> dict[str, float] | None:
    """Collective over the world: read the reference log-probs from disk, or compute them; it can be interrupted.

    Args:
        session: the running stage, before its first step if there is something to compute.

    Returns:
        The summed log-prob of each response of the data set by sample id; None when the run was asked to stop. The
        file is then unfinished, and the next start goes on from it.

    Raises:
        ValueError: the file is damaged, or it is gone and the weights are no longer those to compute it with.
    """
    path = _path_of(fingerprint, folder)
    unfinished = path.with_suffix(".unfinished")
    finished = _broadcast_from_main(_read_finished(path) if session.context.is_main else None)
    if finished is not None:
        session.recorder.log(f"reference log-probs of {len(finished) // 2} pairs are in {path}")
        return finished
    # The weights have moved since: they cannot give the reference any more.
    if session.step:
        raise ValueError(
            f"{path} is gone, the reference log-probs that this run has trained against for {session.step} steps; put "
            "it back, or start anew with run.output_dir set to a new folder"
        )
    sums = _broadcast_from_main(_read_lines(unfinished) if session.context.is_main else {})
    if not _compute(session, source, sums, unfinished):
        return None
    if session.context.is_main:
        _write_finished(path, fingerprint, sums)
        unfinished.unlink(missing_ok=True)
    return sums


def _compute(session: Session, source: PairSource, sums: dict[str, float], unfinished: Path) -> bool:
    """Collective over the world: add missing pairs to `sums` and the file; return False when asked to stop."""
    done, total = 0, num_train_samples(session.recipe.data)
    with session.recorder.progress("reference log-probs", total) as show:
        # The same chunks however often this is interrupted, so that the numbers are the same to the bit.
        for chunk in in_groups(session.loaded.read_train(), session.recipe.train.prompts_per_step):
            if session.preemption.sync_stop_signal(session.step):
                return False
            pairs = [prompt for prompt in chunk if session.trains(prompt)]
            if not all(sample_name(prompt.key, side) in sums for prompt in pairs for side in SIDES):
                sums.update(_forward(session, source, pairs))
                if session.context.is_main:
                    append_json_lines(unfinished, _lines([pair.key for pair in pairs], sums))
            done += len(chunk)
            show(done)
    return True


def _forward(session: Session, source: PairSource, prompts: Sequence[Prompt]) -> dict[str, float]:
    """Collective over the world: compute the log-probs of some pairs, each on one data-parallel rank."""
    if session.policy.features is not None:
        session.policy.features.clear()
    samples, units = pair_samples(prompts, source, session.response_encoder)
    microbatches = shard_samples(samples, prompts, units, microbatcher=session.microbatcher, context=session.context)
    mine: dict[str, float] = {}
    log_probs = session.policy.compute_log_probs([part.batch for part in microbatches])
    for part, log_probs_BS in zip(microbatches, log_probs, strict=True):
        sums_B = response_log_probs(log_probs_BS, part.batch.response_mask_BS)
        mine.update(zip(part.names, sums_B.tolist(), strict=True))
    world = objects.all_gather(mine, session.context.groups.dp)
    return {name: value for part in world for name, value in part.items()}


def _lines(keys: Sequence[str], sums: Mapping[str, float]) -> Iterator[dict[str, str | float]]:
    for key in keys:
        yield {"key": key, **{side: sums[sample_name(key, side)] for side in SIDES}}


def _path_of(fingerprint: Fingerprint, folder: Path) -> Path:
    return folder / f"{fingerprint.digest[:16]}.jsonl"


def _write_finished(path: Path, fingerprint: Fingerprint, sums: Mapping[str, float]) -> None:
    pairs = sorted(key.removesuffix(f"/{SIDES[0]}") for key in sums if key.endswith(f"/{SIDES[0]}"))
    header = {"pairs": len(pairs), **fingerprint.values}
    write_file(path, "".join(json.dumps(line) + "\n" for line in (header, *_lines(pairs, sums))))


def _read_finished(path: Path) -> dict[str, float] | None:
    if not path.is_file():
        return None
    sums = _read_lines(path)
    with path.open() as file:
        expected = json.loads(file.readline() or "{}").get("pairs")
    if len(sums) != len(SIDES) * (expected or 0):
        raise ValueError(
            f"{path} is damaged: {len(sums) // len(SIDES)} of {expected} pairs can be read; delete it to have the "
            "reference log-probs computed again"
        )
    return sums


def _read_lines(path: Path) -> dict[str, float]:
    """Read the lines of a file, which may be missing."""
    sums: dict[str, float] = {}
    for _, text in recover_json_lines(path):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if "key" in line:
            sums.update({sample_name(line["key"], side): line[side] for side in SIDES})
    return sums


def _broadcast_from_main(value: Value) -> Value:
    """Collective over the world: return the main rank's value; the others may not see its files yet."""
    return objects.all_gather(value)[0]


def _compute_digests(files: Mapping[Path, str]) -> list[str]:
    """Collective over the world: return "name digest" of every file, each read by one rank."""
    ordered = sorted(files.items(), key=lambda item: item[1])
    mine = []
    for path, name in ordered[dist.get_rank() :: dist.get_world_size()]:
        with path.open("rb") as file:
            mine.append(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}")
    return sorted(line for part in objects.all_gather(mine) for line in part)


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
