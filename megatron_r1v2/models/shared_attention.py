"""Attention in shared rows: a prompt once, and behind it its responses, none of which sees another.

A response attends to all of its prompt, and causally to itself. Each of the two is a flash attention, and the
log-sum-exp of the scores merges them exactly, as in ring attention (arXiv 2310.01889). The backward pass is that of
flash attention for each part, called with the merged output and log-sum-exp. There is no mask matrix: memory is linear
in the tokens.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch.autograd.function import FunctionCtx, once_differentiable
from typing_extensions import override

from megatron_r1v2.models.sdpa import attend, repeat_heads

# The memory-efficient kernel of CUDA pads the log-sum-exp to a multiple of this.
_LSE_MULTIPLE = 32


@dataclass(frozen=True)
class SharedGroup:
    """A prompt and its responses, neighbours in a row."""

    start: int
    """The first token of the prompt part, which may be empty."""
    prompt_end: int
    """The first token of the first response."""
    response_ends: tuple[int, ...] = ()
    """The token after each response; empty: a sequence by itself."""

    def sequences(self) -> Iterator[slice]:
        """Return the prompt and each response, those without tokens left out."""
        for start, end in itertools.pairwise((self.start, self.prompt_end, *self.response_ends)):
            if start < end:
                yield slice(start, end)

    def responses_to_prompt(self) -> tuple[slice, slice] | None:
        """Return all responses together, and the prompt that they attend to; None where one of the two is empty."""
        end = self.response_ends[-1] if self.response_ends else self.prompt_end
        # The CPU kernel crashes on an empty set of keys, which a prompt of one token leaves.
        if self.start == self.prompt_end or self.prompt_end == end:
            return None
        return slice(self.prompt_end, end), slice(self.start, self.prompt_end)


@dataclass
class RowParams(PackedSeqParams):
    """The sequences in a row, on their way through megatron-core to the attention.

    With `qkv_format="sbhd"` megatron-core treats the row as one sequence, and never reads bounds on the host.
    """

    positions_S: torch.Tensor | None = None
    """int64 [S]: of each token in its own sequence, prompt included; megatron-core has no place for them."""


@dataclass
class PackedRowParams(RowParams):
    """The sequences of a packed row, none of which sees another; TransformerEngine reads their bounds on the device."""

    bounds: tuple[int, ...] = ()
    """On the host: the first token of each sequence, and the token after the last one."""


@dataclass
class SharedRowParams(RowParams):
    """The groups of a shared row."""

    groups: tuple[SharedGroup, ...] = ()
    """They cover the row."""
    responses: torch.Tensor | None = None
    """int64 [R]: the tokens of the row that predict a response token; only they get logits or scores."""


class SharedRowAttention(torch.nn.Module):
    """The part of a core attention that shared rows go through; the class that it is mixed into does the rest.

    Packed rows get there in the format of packed kernels, "thd".
    """

    @override
    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: object,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        """Attend; see the class that this is mixed into for other rows.

        Args:
            query: [S, 1, heads, D] of a shared or packed row; key and value may have fewer heads.

        Returns:
            [S, 1, heads * D] of a shared or packed row.
        """
        if isinstance(packed_seq_params, PackedRowParams):
            heads = (tensor.squeeze(1) for tensor in (query, key, value))
            thd = copy.copy(packed_seq_params)
            thd.qkv_format = "thd"
            packed: torch.Tensor = super().forward(*heads, attention_mask, *args, packed_seq_params=thd, **kwargs)
            return packed.reshape(len(packed), 1, -1)
        if not isinstance(packed_seq_params, SharedRowParams):
            output: torch.Tensor = super().forward(
                query, key, value, attention_mask, *args, packed_seq_params=packed_seq_params, **kwargs
            )
            return output
        q_1NSD, k_1NSD, v_1NSD = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        scale = self.config.softmax_scale  # type: ignore[union-attr]  # of megatron-core's class, which has no types
        out_1NSD = shared_attention(q_1NSD, k_1NSD, v_1NSD, packed_seq_params.groups, scale=scale)  # type: ignore[arg-type]
        return out_1NSD.permute(2, 0, 1, 3).flatten(2)


def shared_attention(
    query_BNSD: torch.Tensor,
    key_BNSD: torch.Tensor,
    value_BNSD: torch.Tensor,
    groups: Sequence[SharedGroup],
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Attend causally within each prompt, and from each response to its prompt and causally to itself.

    Args:
        query_BNSD: key and value may have fewer heads, a divisor of the query's.
        groups: they cover S.
        scale: of the scores; None: 1 / sqrt(D).

    Returns:
        [B, N, S, D], differentiable once.
    """
    output: torch.Tensor = _SharedAttention.apply(  # type: ignore[no-untyped-call]  # torch has no types for it
        query_BNSD, key_BNSD, value_BNSD, tuple(groups), scale
    )
    return output


def check_shared_attention(
    *, heads: int, kv_heads: int, head_size: int, device: torch.device, dtype: torch.dtype
) -> None:
    """Compare a shared row with separate rows on this device, gradients included.

    Raises:
        RuntimeError: they differ by more than rounding.
    """
    generator = torch.Generator().manual_seed(0)
    prompt, responses = 37, (23, 1, 40)
    ends = tuple(itertools.accumulate(responses, initial=prompt))[1:]
    query, key, value, grad = (
        torch.randn(1, count, ends[-1], head_size, generator=generator).to(device, dtype)
        for count in (heads, kv_heads, kv_heads, heads)
    )
    groups = (SharedGroup(0, prompt, ends),)
    shared = _with_gradients(query, key, value, grad, groups)
    separate = [torch.zeros_like(tensor) for tensor in shared]
    for index, (start, end) in enumerate(itertools.pairwise((prompt, *ends))):
        row = torch.cat([torch.arange(prompt), torch.arange(start, end)]).to(device)
        alone = grad[:, :, row].clone()
        # The prompt's own outputs count once.
        alone[:, :, :prompt] *= index == 0
        parts = _with_gradients(query[:, :, row], key[:, :, row], value[:, :, row], alone, None)
        separate[0][:, :, row] = parts[0]
        for total, part in zip(separate[1:], parts[1:], strict=True):
            total[:, :, row] += part
    bound = 1e-4 if dtype is torch.float32 else 4e-2
    for name, ours, theirs in zip(("output", "query", "key", "value"), shared, separate, strict=True):
        difference = float((ours - theirs).abs().max() / theirs.abs().max())
        if not difference <= bound:
            raise RuntimeError(
                f"attention in shared rows differs from separate rows on {device} in {dtype}: {name} by "
                f"{difference:.1e} relative, accepted up to {bound:.0e}; set train.packing=first_fit_decreasing, and "
                f"report it with the versions of torch ({torch.__version__}) and of the driver"
            )


def _with_gradients(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grad: torch.Tensor,
    groups: Sequence[SharedGroup] | None,
) -> tuple[torch.Tensor, ...]:
    query, key, value = (tensor.detach().requires_grad_() for tensor in (query, key, value))
    if groups is not None:
        output = shared_attention(query, key, value, groups)
    else:
        output = attend(query, key, value, scale=None, is_causal=True)
    return output.detach(), *torch.autograd.grad(output, (query, key, value), grad)


class _SharedAttention(torch.autograd.Function):
    """`shared_attention`, with the backward pass of its parts."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        groups: tuple[SharedGroup, ...],
        scale: float | None,
    ) -> torch.Tensor:
        output = torch.empty_like(query)
        lse_BNS = torch.empty(
            query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32), device=query.device
        )
        for group in groups:
            for own in group.sequences():
                output[:, :, own], lse_BNS[:, :, own] = _attend(
                    query[:, :, own], key[:, :, own], value[:, :, own], causal=True, scale=scale
                )
            if (crossing := group.responses_to_prompt()) is None:
                continue
            rows, prompt = crossing
            of_prompt, of_prompt_lse = _attend(
                query[:, :, rows], key[:, :, prompt], value[:, :, prompt], causal=False, scale=scale
            )
            own_lse = lse_BNS[:, :, rows]
            merged_lse = torch.logaddexp(own_lse, of_prompt_lse)
            # The weights are float32, so that 16-bit outputs are rounded once more only, not twice.
            merged = output[:, :, rows] * (own_lse - merged_lse).exp().unsqueeze(-1)
            output[:, :, rows] = merged + of_prompt * (of_prompt_lse - merged_lse).exp().unsqueeze(-1)
            lse_BNS[:, :, rows] = merged_lse
        ctx.save_for_backward(query, key, value, output, lse_BNS)
        ctx.groups, ctx.scale = groups, scale  # type: ignore[attr-defined]  # torch's way to keep what is no tensor
        return output

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]  # torch has no types for it
    def backward(ctx: FunctionCtx, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, output, lse_BNS = ctx.saved_tensors  # type: ignore[attr-defined]  # set by torch
        grads = tuple(torch.zeros_like(tensor) for tensor in (query, key, value))
        grad_output = grad_output.contiguous()

        def add(rows: slice, keys: slice, *, causal: bool) -> None:
            parts = _attend_backward(
                grad_output[:, :, rows],
                (query[:, :, rows], key[:, :, keys], value[:, :, keys]),
                output[:, :, rows],
                lse_BNS[:, :, rows],
                causal=causal,
                scale=ctx.scale,  # type: ignore[attr-defined]  # set by forward
            )
            for total, part, where in zip(grads, parts, (rows, keys, keys), strict=True):
                total[:, :, where] += part

        for group in ctx.groups:  # type: ignore[attr-defined]  # set by forward
            for own in group.sequences():
                add(own, own, causal=True)
            if (crossing := group.responses_to_prompt()) is not None:
                add(*crossing, causal=False)
        return *grads, None, None


# torch gives the log-sum-exp through private kernels only.
_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001
_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward  # noqa: SLF001
_CUDA = torch.ops.aten._scaled_dot_product_flash_attention  # noqa: SLF001
_CUDA_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward  # noqa: SLF001
_CUDA_FP32 = torch.ops.aten._scaled_dot_product_efficient_attention  # noqa: SLF001
_CUDA_FP32_BACKWARD = torch.ops.aten._scaled_dot_product_efficient_attention_backward  # noqa: SLF001


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, causal: bool, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output [B, N, S, D] and log-sum-exp [B, N, S] by the flash kernel of the device."""
    if query.device.type == "cpu":
        output, lse = _CPU(query, key, value, 0.0, causal, scale=scale)
    elif query.dtype is not torch.float32:
        output, lse, *_ = _CUDA(query, key, value, 0.0, causal, scale=scale)
    else:
        # The flash kernel of CUDA has no float32; this one has, but it knows no groups of heads.
        key, value = (repeat_heads(tensor, query.shape[1]) for tensor in (key, value))
        output, lse, *_ = _CUDA_FP32(query, key, value, None, True, 0.0, causal, scale=scale)
        lse = lse[:, :, : query.shape[2]]
    return output, lse


def _attend_backward(
    grad: torch.Tensor,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    output: torch.Tensor,
    lse_BNS: torch.Tensor,
    *,
    causal: bool,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value; output and log-sum-exp are those over all keys, others included."""
    query, key, value = inputs
    if query.device.type == "cpu":
        return _CPU_BACKWARD(  # type: ignore[no-any-return]  # no types
            grad, query, key, value, output, lse_BNS, 0.0, causal, scale=scale
        )
    # The state of a random generator, which a dropout of 0 does not read.
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    if query.dtype is not torch.float32:
        return _CUDA_BACKWARD(  # type: ignore[no-any-return]  # no types
            *(grad, query, key, value, output, lse_BNS.contiguous(), None, None, query.shape[2], key.shape[2]),
            *(0.0, causal, state, state[:0]),
            scale=scale,
        )
    lse = F.pad(lse_BNS, (0, -query.shape[2] % _LSE_MULTIPLE), value=torch.inf)
    repeated = tuple(repeat_heads(tensor, query.shape[1]) for tensor in (key, value))
    offset = torch.zeros((), dtype=torch.int64, device=query.device)
    dq, dk, dv, _ = _CUDA_FP32_BACKWARD(
        *(grad, query, *repeated, None, output, lse, offset, offset, 0.0, [True, True, True, False], causal),
        scale=scale,
    )
    shape = (key.shape[0], key.shape[1], -1, *key.shape[2:])
    return dq, dk.reshape(shape).sum(2), dv.reshape(shape).sum(2)
