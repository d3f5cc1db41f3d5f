"""The Selective Sample Buffer of a running stage: an index that all ranks share, and the samples that each holds."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_r1v2.config.schema import BufferConfig, RewardConfig
from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.rewards.functions import describe_functions
from megatron_r1v2.rl.sample_buffer import SampleBuffer
from megatron_r1v2.stages.grpo.selection import Selection
from megatron_r1v2.stages.resume import Restored
from megatron_r1v2.training.replay import ReplayStore, send_to_trainers
from megatron_r1v2.types import Prompt, Sample

logger = logging.getLogger(__name__)


class ReplayBuffer:
    """The effective responses of earlier steps; empty with `buffer.capacity=0`, where samples only change ranks."""

    def __init__(
        self,
        settings: BufferConfig,
        context: ParallelContext,
        *,
        reward: RewardConfig,
        model_weight: float,
        restored: Restored,
    ) -> None:
        """Make the buffer, filled from a checkpoint where the stage was resumed.

        It begins empty where own reward functions, or their files, have changed: the old advantages rest on them.

        Args:
            reward: for its functions.
            model_weight: of the reward model in the rewards to come.
            restored: the checkpoint; empty for a run that starts.
        """
        self.functions = describe_functions(reward.functions)
        self.context = context
        self.samples = ReplayStore()
        self.index: SampleBuffer | None = None
        self.model_weight = restored.state.get("buffer_weight", model_weight)
        if not settings.capacity:
            return
        self.index = SampleBuffer(
            settings.capacity, settings.max_age, settings.priority_exponent, balance_modalities=True
        )
        if "buffer" not in restored.state:
            return
        if restored.state.get("buffer_functions", []) != self.functions:
            logger.warning("reward.functions have changed since the checkpoint: the buffer begins empty")
        else:
            self.index.load_state_dict(restored.state["buffer"])
            self.samples.load_state_dicts(restored.replay, data_rank=context.data_rank, data_size=context.data_size)

    def invalidate(self, model_weight: float) -> None:
        """Empty the buffer when the reward model's weight has fallen: the advantages in it rest on more."""
        if self.index is not None and model_weight < self.model_weight:
            self.samples.drop(self.index.clear())
        self.model_weight = model_weight

    def exchange_samples(
        self, selection: Selection, fresh: Mapping[str, Sample], prompts: Sequence[Prompt]
    ) -> tuple[dict[str, Sample], dict[str, Prompt]]:
        """Collective over the data-parallel ranks: send samples from where they are to where they are trained.

        Args:
            fresh: this rank's fresh samples by id.

        Returns:
            The samples that this rank trains, and their prompts.
        """
        # Replayed samples are held by the rank that trained them first, fresh ones by the rank that generated them.
        return send_to_trainers(
            self.samples.samples | dict(fresh),
            self.samples.prompts | {prompt.key: prompt for prompt in prompts},
            selection.trainer,
            group=self.context.groups.dp,
            device=self.context.device,
        )

    def add(
        self, selection: Selection, samples: Mapping[str, Sample], prompts: Mapping[str, Prompt], *, step: int
    ) -> None:
        """Keep a step's effective samples; each stays on the rank that trained it.

        Args:
            samples: those that this rank trained, with their old log-probs.
            step: steps done before it.
        """
        if self.index is None:
            return
        # The index decides alike on every rank; each then drops those of the samples that it holds.
        dropped = self.index.add(selection.fresh_entries, step)
        fresh = set(selection.plan.fresh)
        self.samples.add({name: sample for name, sample in samples.items() if name in fresh}, prompts)
        self.samples.drop(dropped)

    def state_dict(self) -> dict[str, Any]:
        """Return the index, the same on every rank; what a rank holds is `samples.state_dict()`."""
        if self.index is None:
            return {}
        return {
            "buffer": self.index.state_dict(),
            "buffer_weight": self.model_weight,
            "buffer_functions": self.functions,
        }
