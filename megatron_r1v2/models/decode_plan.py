"""Decode attention that reads the blocks of a paged cache in place, planned once a step for all layers.

Requests with the same prompt share its blocks. They attend to these together, so that each key is read once, and each
to its own blocks. The parts are merged by their log-sum-exp:
out = sum_i exp(lse_i) out_i / sum_i exp(lse_i).
A call of the kernel costs as much as reading a few blocks. So runs of own blocks are read with small gaps between them,
and short shared prompts are copied into one batch.

Lengths: R requests, N query heads, K key heads, G = N / K, D the size of a head, P parts (request, keys) of a step, M
the most parts of a request.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

_COPIED_TOKENS = 192
"""Of a shared prompt. Up to here copies of 2 to 48 prompts were faster than a call for each (heads of 24 and 64)."""
_GAP_PART = 4
"""A gap is read where it has at most this part of the blocks of the run before it."""


@dataclass(frozen=True)
class Run:
    """Consecutive tokens of the cache that requests attend to together."""

    rows: torch.Tensor
    """int64: the requests."""
    start: int
    """Position of the first token in the cache, counted over all blocks."""
    num_tokens: int

    def of(self, cache_TKD: torch.Tensor) -> torch.Tensor:
        """Return the run in the keys or values of a layer as [1, K, tokens, D]."""
        return cache_TKD[self.start : self.start + self.num_tokens].transpose(0, 1).unsqueeze(0)


@dataclass(frozen=True)
class CopiedRuns:
    """Short runs of equal length, each shared by some requests."""

    rows_UR: torch.Tensor
    """int64 [runs, most requests of a run]: the requests, then -1."""
    blocks_UB: torch.Tensor
    """int64 [runs, blocks of a run], all of them full."""


@dataclass(frozen=True)
class OwnBlocks:
    """Consecutive blocks of at most one owner each."""

    rows: torch.Tensor
    """int64: the owner of each block; -1: none, its part is dropped."""
    first: int
    """The first block."""
    mask: torch.Tensor | None
    """[blocks, 1, 1, block size]: added to the scores, 0 at filled places and -inf at others; None: all are filled."""


@dataclass(frozen=True)
class DecodePlan:
    """The parts of the cache that the decoding requests of a step attend to."""

    num_requests: int
    runs: tuple[Run, ...]
    copied: tuple[CopiedRuns, ...]
    blocks: tuple[OwnBlocks, ...]
    parts_RM: torch.Tensor
    """int64 [R, M]: which parts are those of a request, counted over all runs, copied runs, then blocks."""
    is_padding_RM: torch.Tensor
    """bool [R, M]: places past the last part of a request."""

    @property
    def is_one_run(self) -> bool:
        """Return whether all is one request that reads one run: nothing has to be merged."""
        return self.num_requests == len(self.runs) == 1 and not self.copied and not self.blocks


def plan_decode(
    tables: Sequence[Sequence[int]], lengths: Sequence[int], block_size: int, dtype: torch.dtype
) -> DecodePlan:
    """Plan a step.

    Args:
        tables: the blocks of each request, at least as many as it needs.
        lengths: the tokens of each request in the cache, at least one.
        dtype: of the cache.
    """
    tables = [table[: -(-length // block_size)] for table, length in zip(tables, lengths, strict=True)]
    groups: dict[int, list[int]] = defaultdict(list)
    for row, table in enumerate(tables):
        groups[table[0]].append(row)
    runs: list[Run] = []
    short: dict[int, list[tuple[Sequence[int], Sequence[int]]]] = defaultdict(list)
    owners: dict[int, tuple[int, int]] = {}
    for rows in groups.values():
        # A lone request has its blocks to itself, and one run of them is one part less to merge than blocks are.
        alone = len(tables) == 1
        num_shared = len(tables[0]) if alone else _count_shared([tables[row] for row in rows]) if len(rows) > 1 else 0
        num_tokens = min(num_shared * block_size, lengths[rows[0]])
        shared = tables[rows[0]][:num_shared]
        if shared and not alone and num_tokens == num_shared * block_size <= _COPIED_TOKENS:
            short[num_shared].append((rows, shared))
        else:
            runs += _find_runs(rows, shared, num_tokens, block_size)
        for row in rows:
            for place, block in enumerate(tables[row][num_shared:], start=num_shared):
                owners[block] = row, min(lengths[row] - place * block_size, block_size)
    copied: list[CopiedRuns] = []
    for num_shared, groups_of_length in short.items():
        if len(groups_of_length) > 1:
            copied.append(_copy_runs(groups_of_length))
        else:
            ((members, prompt),) = groups_of_length
            runs += _find_runs(members, prompt, num_shared * block_size, block_size)
    blocks = list(_find_own_blocks(owners, block_size, dtype))
    rows_of_parts = [run.rows for run in runs]
    rows_of_parts += [each.rows_UR.flatten() for each in copied] + [each.rows for each in blocks]
    parts: list[list[int]] = [[] for _ in tables]
    for number, row in enumerate(torch.cat(rows_of_parts).tolist()):
        if row >= 0:
            parts[row].append(number)
    most = max(map(len, parts))
    parts_RM = torch.tensor([numbers + [0] * (most - len(numbers)) for numbers in parts])
    is_padding_RM = torch.arange(most) >= torch.tensor([[len(numbers)] for numbers in parts])
    return DecodePlan(len(tables), tuple(runs), tuple(copied), tuple(blocks), parts_RM, is_padding_RM)


def attend_in_place(
    query_RND: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: DecodePlan, scale: float | None
) -> torch.Tensor:
    """Attend with one query for each request of a plan.

    Args:
        query_RND: on the CPU.
        k: [blocks, block size, K, D]: the cache of a layer; as is `v`.
        scale: of the scores; None: 1 / sqrt(D).

    Returns:
        [R, N, D].
    """
    requests, heads, size = query_RND.shape
    # The query heads that share a key head become queries of that head, so no key has to be repeated.
    query_RKGD = query_RND.reshape(requests, k.shape[2], -1, size)
    keys_TKD, values_TKD = k.flatten(0, 1), v.flatten(0, 1)
    if plan.is_one_run:
        (run,) = plan.runs
        key, value = run.of(keys_TKD), run.of(values_TKD)
        return _attend(query_RKGD, key, value, None, scale)[0].reshape(1, heads, size)
    parts = []
    for run in plan.runs:
        key, value = run.of(keys_TKD), run.of(values_TKD)
        parts.append(_attend_together(query_RKGD[run.rows].unsqueeze(0), key, value, scale))
    for copied in plan.copied:
        blocks_UB = copied.blocks_UB
        key, value = (
            each.flatten(1).index_select(0, blocks_UB.flatten()).view(len(blocks_UB), -1, *each.shape[2:])
            for each in (k, v)
        )
        # Missing requests stand for the first one: nobody reads their part.
        query_UMKGD = query_RKGD[copied.rows_UR.clamp(min=0)]
        parts.append(_attend_together(query_UMKGD, key.transpose(1, 2), value.transpose(1, 2), scale))
    for blocks in plan.blocks:
        ids = slice(blocks.first, blocks.first + len(blocks.rows))
        key, value = (each[ids].transpose(1, 2) for each in (k, v))
        parts.append(_attend(query_RKGD[blocks.rows.clamp(min=0)], key, value, blocks.mask, scale))
    out_PKGD, lse_PKG = (torch.cat(each) for each in zip(*parts, strict=True))
    lse_RMKG = lse_PKG[plan.parts_RM].masked_fill(plan.is_padding_RM[:, :, None, None], -torch.inf)
    weight_RMKG1 = lse_RMKG.softmax(dim=1).unsqueeze(-1)
    out_RKGD = (out_PKGD[plan.parts_RM] * weight_RMKG1).sum(dim=1)
    return out_RKGD.reshape(requests, heads, size).to(query_RND.dtype)


def _attend_together(
    query_UMKGD: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend with M requests to each of U runs, [U, K, tokens, D]; return their parts, U times M."""
    runs, requests, kv_heads, _, size = query_UMKGD.shape
    # As queries of one sequence, so that each key is read once for all of them.
    out, lse = _attend(query_UMKGD.transpose(1, 2).flatten(2, 3), key, value, None, scale)
    shape = runs, kv_heads, requests, -1
    return (
        out.reshape(*shape, size).transpose(1, 2).flatten(0, 1),
        lse.reshape(shape).transpose(1, 2).flatten(0, 1),
    )


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output, and the log-sum-exp of the scores in float32."""
    out: torch.Tensor
    lse: torch.Tensor
    # torch's own flash kernel, which the public function calls too, but without returning the log-sum-exp.
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # noqa: SLF001
        query, key, value, 0.0, False, attn_mask=mask, scale=scale
    )
    return out, lse


def _count_shared(tables: Sequence[Sequence[int]]) -> int:
    """Return how many blocks all tables begin with."""
    return sum(1 for _ in itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*tables, strict=False)))


def _find_runs(rows: Sequence[int], table: Sequence[int], num_tokens: int, block_size: int) -> Iterator[Run]:
    """Yield the runs of consecutive blocks in a table."""
    begin = 0
    for end in range(1, len(table) + 1):
        if end == len(table) or table[end] != table[end - 1] + 1:
            count = min(end * block_size, num_tokens) - begin * block_size
            yield Run(torch.tensor(rows), table[begin] * block_size, count)
            begin = end


def _copy_runs(groups: Sequence[tuple[Sequence[int], Sequence[int]]]) -> CopiedRuns:
    """Return runs as one batch.

    Args:
        groups: requests, and the blocks that they share, as many in each.
    """
    most = max(len(rows) for rows, _ in groups)
    rows_UR = torch.tensor([[*rows, *[-1] * (most - len(rows))] for rows, _ in groups])
    return CopiedRuns(rows_UR, torch.tensor([blocks for _, blocks in groups]))


def _find_own_blocks(owners: dict[int, tuple[int, int]], block_size: int, dtype: torch.dtype) -> Iterator[OwnBlocks]:
    """Yield runs of consecutive blocks.

    Args:
        owners: the owner of each block, and how many of its places are filled.
    """
    spans: list[tuple[int, int]] = []
    for block in sorted(owners):
        first, end = spans[-1] if spans else (block, block)
        if (block - end) * _GAP_PART <= end - first and spans:
            spans[-1] = first, block + 1
        else:
            spans.append((block, block + 1))
    for first, end in spans:
        rows, filled = zip(*(owners.get(block, (-1, block_size)) for block in range(first, end)), strict=True)
        mask = None
        if min(filled) < block_size:
            is_empty = torch.arange(block_size) >= torch.tensor(filled).unsqueeze(1)
            mask = torch.zeros(is_empty.shape, dtype=dtype).masked_fill(is_empty, -torch.inf)[:, None, None, :]
        yield OwnBlocks(torch.tensor(rows), first, mask)
