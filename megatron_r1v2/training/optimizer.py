"""megatron-core's DDP, distributed optimizer and learning-rate schedule, from the settings."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_r1v2.config.schema import TrainConfig
from megatron_r1v2.models.r1v2 import R1V2Model
from megatron_r1v2.parallel.groups import ParallelContext

_ADAM_BETA1 = 0.9


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
    """Make the state that torch's Adam would make in its first step.

    Without TransformerEngine or apex, megatron-core reads the step count out of that state when it saves or loads, and
    fails when there is none: before the first step, which is when a checkpoint is loaded.
    """
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW):
            for group in part.optimizer.param_groups:
                for parameter in group["params"]:
                    part.optimizer.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }


def _finalizer(context: ParallelContext) -> Callable[..., None]:
    """Bind our groups: megatron-core's schedules pass theirs only when they were given some."""

    @functools.wraps(finalize_model_grads)
    def finalize(model: list[torch.nn.Module], num_tokens: torch.Tensor | None = None, **kwargs: object) -> None:
        kwargs["pg_collection"] = context.groups
        finalize_model_grads(model, num_tokens, **kwargs)

    return finalize
