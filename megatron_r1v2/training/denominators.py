"""The one place where the factors between a local loss and a global mean are derived."""

from __future__ import annotations


def loss_scale(*, num_microbatches: int, data_size: int) -> float:
    """Compute the factor of a microbatch's loss on its way to megatron-core's schedule.

    Every loss in rl/ is a sum over its own rows, already divided by the global denominator N (sequences, tokens or
    pairs over all ranks and microbatches, rows of zero advantage and ranks with none included), so that

        L = sum over ranks r, microbatches m of loss_rm

    is the global mean. On the way to the optimizer megatron-core divides twice: the schedule by this rank's number of
    microbatches (`forward_step_calc_loss`), and DDP by the number of data-parallel ranks (its gradient scaling factor
    when `calculate_per_token_loss` is off). Multiplying by both makes the gradient that of L whatever the number of
    microbatches on each rank, and also when a rank has nothing and runs one microbatch of zero weight.
    """
    return float(num_microbatches * data_size)
