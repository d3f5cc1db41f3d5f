"""The Selective Sample Buffer: effective responses of earlier steps that are trained on again.

This is the index, which decides on the entries that are held, drawn and dropped. It is pure, and identical on every
rank as long as every rank gives it the same entries, in any order. The tokens and log-probs of the entries are stored
in training/, which drops those that `add`, `expire` and `clear` return.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron_r1v2.types import Modality

MODALITIES: tuple[Modality, ...] = ("image", "text")


@dataclass(frozen=True)
class BufferEntry:
    """The index entry of one response, fresh or held.

    Example: sample_id "digits-000017/12/3" (prompt, step, sample), priority 1.32, modality "image", step 12,
    response_length 41, effective True, prompt_length 530.
    """

    sample_id: str
    """Unique over the whole run."""
    prompt_key: str
    priority: float
    """|advantage|; a response with 0 has no gradient."""
    modality: Modality
    step: int
    """The step in which it was generated."""
    response_length: int
    """Tokens of the response."""
    effective: bool = True
    """Whether something could be learned from its group (`buffer.effective_by`)."""
    prompt_length: int = 0
    """Tokens of the prompt; 0 in an entry of a checkpoint from before it was kept."""


class SampleBuffer:
    """Effective entries under an age and a capacity bound, to be drawn by |advantage|.

    Args:
        capacity: entries held at most; 0 holds none.
        max_age: entries generated more than this many steps ago are dropped.
        priority_exponent: alpha in p ~ |advantage|^alpha; 0 draws uniformly.
        balance_modalities: draw modalities in the proportion in which fresh responses were generated.

    Raises:
        ValueError: On a negative setting.
    """

    def __init__(self, capacity: int, max_age: int, priority_exponent: float, balance_modalities: bool) -> None:
        for name, value in (("capacity", capacity), ("max_age", max_age), ("priority_exponent", priority_exponent)):
            if not value >= 0:
                raise ValueError(f"buffer.{name} must not be negative, got {value}")
        self.capacity = capacity
        self.max_age = max_age
        self.priority_exponent = priority_exponent
        self.balance_modalities = balance_modalities
        self._entries: dict[str, BufferEntry] = {}
        # Beside the entries, which are frozen: it changes with every draw.
        self._reuse: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, sample_id: object) -> bool:
        return sample_id in self._entries

    @property
    def entries(self) -> tuple[BufferEntry, ...]:
        """Return the entries held, in the order of their sample ids."""
        return tuple(self._entries[sample_id] for sample_id in sorted(self._entries))

    def entry(self, sample_id: str) -> BufferEntry:
        """Return the entry of an id that is held."""
        return self._entries[sample_id]

    def reuse(self, sample_id: str) -> int:
        """Return how often an entry was drawn since it was added."""
        return self._reuse[sample_id]

    def add(self, entries: Iterable[BufferEntry], step: int) -> tuple[str, ...]:
        """Add effective entries with non-zero advantage, then drop the expired ones and those above the capacity.

        Args:
            entries: new entries in any order; ineffective and zero-advantage ones are not added.

        Returns:
            The ids that are not held after the call, sorted: not added, expired or evicted.

        Raises:
            ValueError: On an id that is held already, or a priority that is negative or not finite.
        """
        dropped = []
        for entry in entries:
            if entry.sample_id in self._entries:
                raise ValueError(f"sample {entry.sample_id!r} is in the buffer already: ids must be unique over a run")
            if not 0.0 <= entry.priority < math.inf:
                raise ValueError(f"the priority of sample {entry.sample_id!r} must be finite, >= 0: {entry.priority}")
            # Drawn with p ~ |advantage|^alpha, a zero would never come out, and its logarithm does not exist.
            if not entry.effective or entry.priority == 0.0:
                dropped.append(entry.sample_id)
                continue
            self._entries[entry.sample_id] = entry
            self._reuse[entry.sample_id] = 0
        dropped += self.expire(step)
        # The oldest go first, since their ratios have drifted most. The id breaks ties: every rank must drop the same.
        by_value = sorted(self._entries.values(), key=lambda entry: (-entry.step, -entry.priority, entry.sample_id))
        dropped += self._drop(entry.sample_id for entry in by_value[self.capacity :])
        return tuple(sorted(dropped))

    def expire(self, step: int) -> tuple[str, ...]:
        """Drop entries that were generated more than `max_age` steps before `step`; return their ids, sorted."""
        return self._drop(entry.sample_id for entry in self.entries if step - entry.step > self.max_age)

    def clear(self) -> tuple[str, ...]:
        """Drop every entry; return their ids, sorted."""
        return self._drop(list(self._entries))

    def draw(
        self, step: int, count: int, seed: int, fresh_modality_counts: Mapping[Modality, int] | None = None
    ) -> list[str]:
        """Draw entries of earlier steps without replacement, with p ~ |advantage|^alpha.

        Each entry gets E / |advantage|^alpha with E exponentially distributed, and the smallest are drawn (Efraimidis
        and Spirakis, "Weighted random sampling with a reservoir", 2006). E comes from a hash of (seed, step, id):
        neither the order of the entries nor the number of ranks matters. Each drawn entry counts one more reuse.

        Args:
            step: the current step; entries generated in it, or more than `max_age` steps before it, are not drawn.
            count: entries to draw; all when there are fewer.
            fresh_modality_counts: fresh responses of each modality, for the balance; None: no balance. Where one
                modality has too few entries, the other fills in.

        Returns:
            Ids in the order in which they were drawn.
        """
        candidates = [entry for entry in self.entries if 0 < step - entry.step <= self.max_age]
        keys = {entry.sample_id: self._draw_key(entry, step, seed) for entry in candidates}
        candidates.sort(key=lambda entry: (keys[entry.sample_id], entry.sample_id))
        chosen: list[BufferEntry] = []
        if self.balance_modalities and fresh_modality_counts and any(fresh_modality_counts.values()):
            for modality, quota in _proportional_quotas(fresh_modality_counts, count).items():
                chosen += [entry for entry in candidates if entry.modality == modality][:quota]
        taken = {entry.sample_id for entry in chosen}
        rest = [entry for entry in candidates if entry.sample_id not in taken]
        chosen += rest[: max(count - len(chosen), 0)]
        # Back into the order of the keys: the quotas took image entries before text entries.
        drawn = sorted((entry.sample_id for entry in chosen), key=lambda sample_id: (keys[sample_id], sample_id))
        for sample_id in drawn:
            self._reuse[sample_id] += 1
        return drawn

    def statistics(self, step: int, sample_ids: Sequence[str] | None = None) -> dict[str, float]:
        """Describe the held entries of these ids; None: all that are held.

        Returns:
            "size", "distinct_prompts", "priority_mean"; and the mean and largest "age" (steps since generation) and
            "reuse" (times drawn) as "age_mean", "age_max", "reuse_mean", "reuse_max". Only the first two when there
            is no entry.
        """
        ids = sorted(self._entries) if sample_ids is None else list(sample_ids)
        entries = [self._entries[sample_id] for sample_id in ids]
        result: dict[str, float] = {"size": len(ids), "distinct_prompts": len({entry.prompt_key for entry in entries})}
        if ids:
            ages = [step - entry.step for entry in entries]
            reuse = [self._reuse[sample_id] for sample_id in ids]
            # fsum does not depend on the order, in which ranks may differ.
            result["priority_mean"] = math.fsum(entry.priority for entry in entries) / len(ids)
            result |= {"age_mean": sum(ages) / len(ids), "age_max": max(ages)}
            result |= {"reuse_mean": sum(reuse) / len(ids), "reuse_max": max(reuse)}
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return the contents as JSON values, in an order that does not depend on the order of the additions."""
        return {"entries": [asdict(entry) | {"reuse": self._reuse[entry.sample_id]} for entry in self.entries]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the contents by those of `state_dict`; this buffer's own bounds apply from the next `add` on.

        Raises:
            ValueError: When an entry does not have the fields of this version.
        """
        names = {field.name for field in fields(BufferEntry)}
        entries, reuse = {}, {}
        for saved in state["entries"]:
            values = {"prompt_length": 0, **saved}
            count = values.pop("reuse", None)
            if count is None or set(values) != names:
                raise ValueError(
                    f"a saved buffer entry has the fields {sorted(saved)}, expected {sorted([*names, 'reuse'])}: "
                    "the checkpoint is of another version; continue without it by setting buffer.capacity=0"
                )
            entry = BufferEntry(**values)
            entries[entry.sample_id], reuse[entry.sample_id] = entry, int(count)
        self._entries, self._reuse = entries, reuse

    def _drop(self, sample_ids: Iterable[str]) -> tuple[str, ...]:
        dropped = tuple(sorted(sample_ids))
        for sample_id in dropped:
            del self._entries[sample_id], self._reuse[sample_id]
        return dropped

    def _draw_key(self, entry: BufferEntry, step: int, seed: int) -> float:
        # The logarithm of E / priority^alpha, because the quotient itself under- or overflows for small advantages.
        exponential = -math.log(_uniform(seed, step, entry.sample_id))
        return math.log(exponential) - self.priority_exponent * math.log(entry.priority)


def _uniform(seed: int, step: int, sample_id: str) -> float:
    """Return a number in (0, 1) that depends on the three arguments only."""
    # Not Python's hash(), which differs between processes.
    digest = hashlib.blake2b(f"{seed}|{step}|{sample_id}".encode(), digest_size=8).digest()
    # 52 bits plus a half: with 53 bits the largest would round to 1, whose logarithm is 0.
    return ((int.from_bytes(digest, "big") >> 12) + 0.5) * 2.0**-52


def _proportional_quotas(counts: Mapping[Modality, int], total: int) -> dict[Modality, int]:
    """Split `total` in proportion to the counts, rounding by largest remainder (ties: the order of MODALITIES)."""
    whole = sum(counts.values())
    quotas = {modality: total * counts.get(modality, 0) // whole for modality in MODALITIES}
    by_remainder = sorted(MODALITIES, key=lambda modality: -(total * counts.get(modality, 0) % whole))
    for modality in by_remainder[: total - sum(quotas.values())]:
        quotas[modality] += 1
    return quotas


@dataclass(frozen=True)
class BatchPlan:
    """The samples of one update. Every sample of the batch is in exactly one of the first three lists.

    Ids are sorted, so that the plan does not depend on which rank generated what.
    """

    fresh: tuple[str, ...]
    """Fresh samples that need a forward and backward pass."""
    fresh_zero_advantage: tuple[str, ...]
    """Fresh samples of the batch with an advantage of exactly zero. Their policy gradient is zero too, so they need no
    compute (unless a KL term is on), but they count in `num_sequences` and `num_tokens`."""
    replayed: tuple[str, ...]
    """Samples from the buffer."""
    replaced: tuple[str, ...]
    """Fresh ineffective samples that made room for replayed ones; they are not in the batch."""
    num_sequences: int
    """Denominator of the sequence aggregation: all samples of the batch."""
    num_tokens: int
    """Denominator of the token aggregation: their response tokens."""
    target_effective: int
    """The target fraction of the batch size, rounded up."""
    fresh_effective_fraction: float
    """Effective samples over all generated samples."""
    trained_effective_fraction: float
    """Effective samples over the batch; below the target when the buffer was short."""
    metrics: Mapping[str, float]
    """Values to log by the name of the metric."""

    @property
    def compute(self) -> tuple[str, ...]:
        """Return the samples that need a forward and backward pass, fresh ones first."""
        return self.fresh + self.replayed


def compose_batch(
    generated: Sequence[BufferEntry],
    buffer: SampleBuffer | None,
    *,
    step: int,
    seed: int,
    batch_size: int,
    target_effective_fraction: float,
) -> BatchPlan:
    """Top the fresh effective samples up from the buffer to a fraction of the batch.

    All fresh effective samples stay. When they are fewer than ceil(target x batch_size), the difference is drawn from
    the buffer. Drawn samples first fill the room that missing fresh samples left, then replace fresh ineffective ones:
    those with zero advantage first, then by rising |advantage|. When the buffer has too few, the batch stays below the
    target.

    Args:
        generated: all samples of this step over all ranks, in any order.
        buffer: to draw from, which counts reuses; the fresh samples are not added to it. None: no replay.
        batch_size: prompts_per_step x responses_per_prompt; samples in the batch at most.
        target_effective_fraction: in [0, 1].

    Returns:
        The plan, the same on every rank.

    Raises:
        ValueError: When there are more samples than the batch holds, two have one id, or the target is outside [0, 1].
    """
    if not 0.0 <= target_effective_fraction <= 1.0:
        raise ValueError(f"buffer.target_effective_fraction must be in [0, 1], got {target_effective_fraction}")
    if len(generated) > batch_size or len({entry.sample_id for entry in generated}) != len(generated):
        raise ValueError(f"expected at most {batch_size} samples with distinct ids, got {len(generated)}")
    # The small number undoes products such as 0.55 * 100 = 55.00000000000001, which would ask for one more.
    target = math.ceil(target_effective_fraction * batch_size - 1e-9)
    num_effective = sum(entry.effective for entry in generated)
    # The order in which they give way: first those that teach least. The id makes it the same on every rank.
    ineffective = sorted((e for e in generated if not e.effective), key=lambda e: (e.priority, e.sample_id))
    missing = max(target - num_effective, 0)
    replayed: list[str] = []
    if buffer is not None:
        modality_counts = {name: sum(entry.modality == name for entry in generated) for name in MODALITIES}
        replayed = buffer.draw(step, missing, seed, modality_counts)
    num_replaced = max(len(generated) + len(replayed) - batch_size, 0)
    replaced = {entry.sample_id for entry in ineffective[:num_replaced]}
    kept = [entry for entry in generated if entry.sample_id not in replaced]
    replayed_entries = [] if buffer is None else [buffer.entry(sample_id) for sample_id in replayed]
    num_sequences = len(kept) + len(replayed)
    trained_fraction = (num_effective + len(replayed)) / max(num_sequences, 1)
    fresh_fraction = num_effective / max(len(generated), 1)
    metrics = _batch_metrics(kept, replayed_entries, buffer, step)
    metrics |= {"ssb/fresh_effective_fraction": fresh_fraction, "ssb/trained_effective_fraction": trained_fraction}
    return BatchPlan(
        fresh=tuple(sorted(entry.sample_id for entry in kept if entry.priority != 0.0)),
        fresh_zero_advantage=tuple(sorted(entry.sample_id for entry in kept if entry.priority == 0.0)),
        replayed=tuple(sorted(replayed)),
        replaced=tuple(sorted(replaced)),
        num_sequences=num_sequences,
        num_tokens=sum(entry.response_length for entry in (*kept, *replayed_entries)),
        target_effective=target,
        fresh_effective_fraction=fresh_fraction,
        trained_effective_fraction=trained_fraction,
        metrics=metrics,
    )


def _batch_metrics(
    kept: Sequence[BufferEntry], replayed: Sequence[BufferEntry], buffer: SampleBuffer | None, step: int
) -> dict[str, float]:
    """Describe the samples with non-zero advantage; age and reuse are those of the replayed (absent without any)."""
    trained = [entry for entry in (*kept, *replayed) if entry.priority != 0.0]
    metrics: dict[str, float] = {
        "ssb/replayed": len(replayed),
        "ssb/distinct_samples": len({entry.sample_id for entry in trained}),
        "ssb/distinct_prompts": len({entry.prompt_key for entry in trained}),
        "ssb/size": 0 if buffer is None else len(buffer),
    }
    names = ("age_mean", "age_max", "reuse_mean")
    described = {} if buffer is None else buffer.statistics(step, [entry.sample_id for entry in replayed])
    return metrics | {f"ssb/{name}": described[name] for name in names if name in described}
