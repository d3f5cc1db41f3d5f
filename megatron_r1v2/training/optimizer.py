"""megatron-core's DDP, distributed optimizer and learning-rate schedule, from the settings."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedBase,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_r1v2.config.schema import TrainConfig
from megatron_r1v2.models.r1v2 import R1V2Model
from megatron_r1v2.parallel.groups import ParallelContext

OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}
"""Of the state in a checkpoint: canonical shapes, the only format of 0.16.1 that loads at another TP, PP and DP."""
_ADAM_BETA1 = 0.9
_STATE = ("param", "exp_avg", "exp_avg_sq")


def wrap_with_ddp(model: R1V2Model, context: ParallelContext) -> DistributedDataParallel:
    """Wrap a model so that the parameters that train get gradient buffers; call after freezing."""
    # Overlap would need every bucket's gradient in every microbatch, which a text-only one does not give
    # (an assertion in megatron-core's param_and_grad_buffer), so gradients are reduced after the last microbatch.
    config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        overlap_param_gather=False,
        average_in_collective=False,
    )
    ddp = DistributedDataParallel(model.config, config, model, pg_collection=context.groups)
    model.config.finalize_model_grads_func = _finalizer(context)
    return ddp


def build_optimizer(
    ddp: DistributedDataParallel, settings: TrainConfig
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Build the distributed Adam and its schedule: linear warm-up, then cosine to the minimum.

    Returns:
        The optimizer and the scheduler; `step(increment=1)` after each optimizer step.
    """
    model = ddp.module
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=settings.learning_rate,
            min_lr=settings.min_learning_rate,
            weight_decay=settings.weight_decay,
            adam_beta1=_ADAM_BETA1,
            adam_beta2=settings.adam_beta2,
            clip_grad=settings.clip_grad,
            bf16=model.config.bf16,
            params_dtype=model.config.params_dtype,
            use_distributed_optimizer=True,
        ),
        [ddp],
        # Checkpoints gather optimizer state over gloo groups, which megatron-core finds only by itself.
        use_gloo_process_groups=True,
    )
    _allocate_state(optimizer)
    model.config.grad_scale_func = optimizer.scale_loss
    updates = max(1, settings.steps * settings.updates_per_step)
    warmup = min(settings.warmup_steps * settings.updates_per_step, updates - 1)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.learning_rate,
        min_lr=settings.min_learning_rate,
        lr_warmup_steps=warmup,
        lr_decay_steps=updates,
        lr_decay_style="cosine",
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        # A resumed run may have more steps; every other setting of the schedule was compared before.
        override_opt_param_scheduler=True,
        use_checkpoint_opt_param_scheduler=False,
    )
    # megatron-core sets the rate of step n after step n - 1, so without this the first one has rate init_lr.
    scheduler.step(increment=0 if warmup == 0 else 1)
    return optimizer, scheduler


def release_grad_hooks(model: R1V2Model) -> None:
    """Take the optimizer and the process groups out of the model's configuration, at the end of a stage.

    The cycle through them runs over gradient hooks, which Python's collector does not see: a process that runs several
    stages (a test) would keep every model, and the threads of every gloo group, which never cease to poll.
    """
    model.config.grad_scale_func = None
    model.config.finalize_model_grads_func = None


def current_learning_rate(optimizer: MegatronOptimizer) -> float:
    """Return the learning rate of the next step (0 on a pipeline stage that trains nothing)."""
    return max((float(group["lr"]) for group in optimizer.param_groups), default=0.0)


def trains_here(optimizer: MegatronOptimizer) -> bool:
    """Return whether this pipeline stage has trained parameters; the same for all its data-parallel ranks.

    Where it has none, megatron-core still builds an optimizer, of empty groups, as other stages have some. It has no
    state to describe or load (without TransformerEngine or apex, an assertion about its step count fails).
    """
    return any(part.buffers for part in optimizer.chained_optimizers if not part.is_stub_optimizer)


def sharded_optimizer_state(optimizer: MegatronOptimizer, model_state: ShardedStateDict) -> ShardedStateDict:
    """Collective over the data-parallel group: describe the optimizer's state to `dist_checkpointing.save`.

    megatron-core's function for this format gathers the state of all parameters in the host memory of every rank, 12
    bytes a parameter. Here each parameter's goes to one replica, which holds and writes it.

    Args:
        optimizer: from `build_optimizer`, with one distributed optimizer in it.
        model_state: of the parts that train, at least.
    """
    (part,) = optimizer.chained_optimizers
    group = part.data_parallel_group
    described = {tensor.data: tensor for tensor in nested_values(extract_sharded_tensors_and_factories(model_state)[0])}
    held = [0] * group.size()
    states: dict[int, ShardedStateDict] = {}
    number = -1
    for buffer, range_maps in zip(part.buffers, part.gbuf_ranges, strict=True):
        (buckets,) = range_maps.values()
        ranges = {parameter: found for bucket in buckets for parameter, found in bucket["param_map"].items()}
        for parameter in buffer.param_index_map:
            number += 1
            owner = held.index(min(held))
            held[owner] += parameter.numel()
            shard = part._get_main_param_and_optimizer_states(parameter) if parameter in ranges else {}  # noqa: SLF001
            own: ShardedStateDict = {}
            for name in _STATE:
                # As integers: the sum with the zeros of other ranks keeps every bit, that of -0.0 too.
                bits = torch.zeros(parameter.numel(), dtype=torch.int32, device=parameter.device)
                if shard:
                    place = ranges[parameter]["param"]
                    bits[place.start : place.end] = shard[name].detach().view(torch.int32)
                dist.reduce(bits, dist.get_global_rank(group, owner), group=group)
                if group.rank() == owner:
                    values = bits.view(torch.float32).reshape(parameter.shape).cpu()
                    own[name] = _describe(values, name, described[parameter])
            if own:
                states[number] = own
    return {
        **part.state_dict(),
        "param_state": states,
        "param_state_sharding_type": OPTIMIZER_FORMAT["distrib_optim_sharding_type"],
    }


def _describe(values: torch.Tensor, name: str, parameter: ShardedTensor | ShardedTensorFactory) -> ShardedBase:
    """Return the description of a state of a parameter, which the main replica alone holds."""
    changes: dict[str, object] = {
        "key": f"optimizer.state.{name}.{parameter.key}",
        "data": values,
        # The last number is the data-parallel rank; 0 is the one that writes.
        "replica_id": (*parameter.replica_id[:-1], 0),
    }
    if isinstance(parameter, ShardedTensor):
        changes["dtype"] = values.dtype
    return replace(parameter, **changes)


def load_optimizer_state(optimizer: MegatronOptimizer, loaded: Mapping[str, object]) -> None:
    """Load a sharded state that `dist_checkpointing` has read into the optimizer.

    megatron-core 0.16.1 cannot load the `fully_reshardable` format into torch's Adam: it looks for every entry of
    Adam's state, the step count included, among tensors that do not hold it (KeyError: 'step'); and it makes one tensor
    the step count of all parameters, which each of them then increments. So the two halves are loaded one by one, and
    every parameter gets a step count of its own.

    Args:
        optimizer: from `build_optimizer`, with one distributed optimizer in it.
    """
    (part,) = optimizer.chained_optimizers
    rest = dict(loaded)
    tensors = rest.pop("param_state")
    part.load_state_dict(rest)
    states = part.optimizer.state.values()
    steps = [state.pop("step", None) for state in states]
    part.load_parameter_state_from_fully_reshardable(tensors)
    for state, step in zip(states, steps, strict=True):
        if step is not None:
            state["step"] = step.clone()


def _allocate_state(optimizer: MegatronOptimizer) -> None:
    """Make the state that Adam would make in its first step.

    A checkpoint may be saved or loaded before it, and megatron-core then finds no moments (KeyError: 'exp_avg'). And
    what lives as long as the run should not be allocated between the short-lived tensors of a step.
    """
    for part in optimizer.chained_optimizers:
        if part.is_stub_optimizer:
            continue
        part.init_state_fn(part.optimizer, part.config)
        if isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW):
            # Without TransformerEngine or apex, megatron-core reads the step count out of this state too.
            for state in part.optimizer.state.values():
                state["step"] = torch.tensor(0.0)


def _finalizer(context: ParallelContext) -> Callable[..., None]:
    """Bind our groups: megatron-core's schedules pass theirs only when they were given some."""

    @functools.wraps(finalize_model_grads)
    def finalize(model: list[torch.nn.Module], num_tokens: torch.Tensor | None = None, **kwargs: object) -> None:
        kwargs["pg_collection"] = context.groups
        finalize_model_grads(model, num_tokens, **kwargs)

    return finalize
