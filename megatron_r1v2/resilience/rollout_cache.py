"""Finished rollouts on disk, until a checkpoint holds their step: an interrupted step does not generate them again.

A file for each prompt with all its responses, `unfinished/step-00000012/HASH.pt` below the run's folder: a CRC-32 in
four bytes, then the output of torch.save. It holds a fingerprint; rollouts of other weights or settings are not loaded.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_r1v2.config.choices import OnResume
from megatron_r1v2.config.schema import GenerationConfig, ModelConfig
from megatron_r1v2.parallel import objects
from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.resilience.files import write_file
from megatron_r1v2.resilience.fingerprint import Fingerprint
from megatron_r1v2.types import Prompt, Rollout

logger = logging.getLogger(__name__)

FOLDER = "unfinished"
_STEP_FOLDER = re.compile(r"step-(\d{8})$")
_CHECKSUM_BYTES = 4


def rollout_fingerprint(
    seed: int,
    version: int,
    generation: GenerationConfig,
    stop_ids: Sequence[int],
    weights: Mapping[str, int],
    model: ModelConfig,
) -> Fingerprint:
    """Return the fingerprint of everything that decides which tokens are drawn for a prompt.

    Args:
        generation: settings of the sampling; those of memory and speed decide nothing.
        stop_ids: of the settings and of the model's folder.
        weights: checksums by part.
        model: the way to compute with them; those of its settings that a resumed run may change decide nothing.
    """
    computed = {
        name: value
        for name, value in model.model_dump(mode="json").items()
        if model.resume_rule(name) is not OnResume.free
    }
    return Fingerprint.of(
        model={"version": version, "weights": dict(weights), **computed},
        run={"seed": seed},
        generation={
            "responses_per_prompt": generation.responses_per_prompt,
            "max_response_tokens": generation.max_response_tokens,
            "segment_tokens": generation.segment_tokens,
            "temperature": generation.temperature,
            "stop_ids": sorted(stop_ids),
        },
    )


class RolloutCache:
    """The rollouts of steps that no checkpoint holds, on a disk that all ranks see.

    Args:
        context: the leader of each replica writes.
        enabled: False: nothing is saved, nothing loaded.
    """

    def __init__(self, run_dir: Path, context: ParallelContext, *, enabled: bool) -> None:
        self.folder = run_dir / FOLDER
        self.context = context
        self.enabled = enabled
        self._step_folder = self.folder
        self._fingerprint = ""

    def begin_step(self, step: int, fingerprint: Fingerprint) -> None:
        """Collective over all ranks: begin a step, whose rollouts `save` and `load` are about.

        Args:
            step: steps done before it.
        """
        self._step_folder = self.folder / f"step-{step:08d}"
        self._fingerprint = fingerprint.digest
        if self.enabled and self.context.is_main:
            self._step_folder.mkdir(parents=True, exist_ok=True)
        if self.enabled:
            dist.barrier()  # the others write into the folder that the first rank makes

    @contextmanager
    def saving(self) -> Iterator[Callable[[Prompt, Sequence[Rollout]], None]]:
        """Give a `save` that returns at once; when the block ends, also by an error, the files are on the disk.

        Raises:
            OSError: a file could not be written; raised at the next call, or at the end of the block.
        """
        pending: deque[Future[None]] = deque()

        def save(prompt: Prompt, rollouts: Sequence[Rollout]) -> None:
            while pending and pending[0].done():
                pending.popleft().result()
            pending.append(pool.submit(self.save, prompt, tuple(rollouts)))

        # A disk takes milliseconds to confirm a file, in which the engine draws tokens.
        with ThreadPoolExecutor(1, thread_name_prefix="rollout-cache") as pool:
            yield save
        for write in pending:
            write.result()

    def save(self, prompt: Prompt, rollouts: Sequence[Rollout]) -> None:
        """Write all responses to a prompt of this step, in the order of `sample_index`."""
        if not self.enabled or not self.context.is_replica_leader:
            return
        path = self._path(prompt)
        # Into memory first: the checksum stands before the content.
        body = io.BytesIO()
        content = {
            "fingerprint": self._fingerprint,
            "prompt": _digest(prompt),
            "rollouts": [vars(each) for each in rollouts],
        }
        torch.save(content, body)
        write_file(path, _checksum(body.getvalue()) + body.getvalue())

    def load(self, prompts: Sequence[Prompt]) -> tuple[dict[str, list[Rollout]], list[Prompt]]:
        """Collective over all ranks: read what an interrupted run has kept of this step.

        Args:
            prompts: of the step, the same on all ranks.

        Returns:
            Rollouts by prompt key for this replica to go on with (the prompts found are dealt out to the replicas), and
            the prompts that are still to be generated from, the same on all ranks.
        """
        if not self.enabled:
            return {}, list(prompts)
        readable = [prompt.key for prompt in prompts if self._read(prompt)] if self.context.is_main else []
        # The first rank decides for all: a disk may show a file to one node later than to another.
        found = objects.all_gather(readable)[0]
        mine = set(found[self.context.data_rank :: self.context.data_size])
        cached: dict[str, list[Rollout]] = {}
        missing = []
        for prompt in prompts:
            if prompt.key not in found:
                missing.append(prompt)
            elif prompt.key in mine:
                rollouts = self._read(prompt)
                if rollouts is None:
                    raise RuntimeError(f"{self._path(prompt)} can be read by the first rank only; is the disk shared?")
                cached[prompt.key] = rollouts
        return cached, missing

    def load_begun(self, prompts: Sequence[Prompt], begun: Mapping[str, Sequence[Rollout]]) -> dict[str, list[Rollout]]:
        """Collective over the replica: read what an interrupted run has kept of groups that go on in this step.

        Args:
            prompts: of the groups that this replica holds.
            begun: their responses so far, by prompt key; what is kept must begin with the same tokens.

        Returns:
            The rollouts by prompt key; groups that are not here go on from `begun`.
        """
        found: dict[str, list[Rollout]] = {}
        if self.enabled and self.context.is_replica_leader:
            for prompt in prompts:
                rollouts = self._read(prompt)
                if rollouts is not None and _continue(begun[prompt.key], rollouts):
                    found[prompt.key] = rollouts
        return objects.all_gather(found, self.context.groups.mp)[0]

    def drop_before(self, step: int) -> None:
        """Delete the rollouts of all steps before `step`, that of the newest finished checkpoint."""
        if not self.context.is_main or not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            found = _STEP_FOLDER.match(path.name)
            if found and int(found[1]) < step:
                shutil.rmtree(path)

    def _path(self, prompt: Prompt) -> Path:
        # A key may hold what a file name cannot, and be longer.
        return self._step_folder / f"{hashlib.sha256(prompt.key.encode()).hexdigest()[:32]}.pt"

    def _read(self, prompt: Prompt) -> list[Rollout] | None:
        path = self._path(prompt)
        if not path.is_file():
            return None
        content = path.read_bytes()
        checksum, body = content[:_CHECKSUM_BYTES], content[_CHECKSUM_BYTES:]
        if checksum != _checksum(body):  # torch.load would not notice a flipped bit
            logger.warning("%s is damaged: its rollouts are generated again", path)
            return None
        kept = torch.load(io.BytesIO(body), weights_only=True)
        # Files of earlier versions have no fingerprint.
        if kept.get("fingerprint") != self._fingerprint or kept["prompt"] != _digest(prompt):
            return None
        return [Rollout(**fields) for fields in kept["rollouts"]]


def _continue(begun: Sequence[Rollout], rollouts: Sequence[Rollout]) -> bool:
    """Return whether rollouts begin with the tokens of others."""
    return len(begun) == len(rollouts) and all(
        later.token_ids[: len(earlier.token_ids)] == earlier.token_ids and later.step == earlier.step
        for earlier, later in zip(begun, rollouts, strict=True)
    )


def _digest(prompt: Prompt) -> str:
    """Return a digest of what the model sees of a prompt: another template, tiling or image is another prompt."""
    digest = hashlib.sha256(json.dumps(prompt.token_ids).encode())
    digest.update(prompt.tiles_TCHW.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _checksum(body: bytes) -> bytes:
    return zlib.crc32(body).to_bytes(_CHECKSUM_BYTES, "big")
