"""megatron-core's parallel linears, which leave out what serves a backward pass where there is none.

Each of the autograd functions around a product costs the host as much as a small product, and a step that decodes one
request is bound by the host.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from typing_extensions import override


class ColumnLinear(ColumnParallelLinear):
    """A linear whose ranks hold rows of the weight each."""

    @override
    def forward(
        self, input_: torch.Tensor, weight: torch.Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Collective over the tensor-parallel ranks: multiply; see the base class."""
        if torch.is_grad_enabled() or self.sequence_parallel or self.gather_output or runtime_gather_output:
            output: tuple[torch.Tensor, torch.Tensor | None] = super().forward(input_, weight, runtime_gather_output)
            return output
        if input_.dim() == 3 and input_.size(1) == 1 and input_.stride(0) != input_.stride(1):
            # The embeddings of one sequence are a transposed view, of which matmul would multiply each token by the
            # weight anew (bmm): slow, and so large at true width that torch gives up oneDNN for the whole process.
            input_ = input_.squeeze(1).unsqueeze(1)
        product = torch.matmul(input_, (self.weight if weight is None else weight).t())
        if self.skip_bias_add:
            return product, self.bias
        return product if self.bias is None else product + self.bias, None


class RowLinear(RowParallelLinear):
    """A linear whose ranks hold columns of the weight each."""

    @override
    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Collective over the tensor-parallel ranks: multiply and sum; see the base class."""
        if torch.is_grad_enabled() or self.sequence_parallel or not self.input_is_parallel:
            output: tuple[torch.Tensor, torch.Tensor | None] = super().forward(input_)
            return output
        total = torch.matmul(input_, self.weight.t())
        if self.input_size_per_partition < self.input_size:
            total = reduce_from_tensor_model_parallel_region(total, group=self.tp_group)
        if self.skip_bias_add:
            return total, self.bias
        return total if self.bias is None else total + self.bias, None
