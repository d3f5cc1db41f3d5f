"""How a run is interrupted and loses little: who asks it to stop, what of a step is kept, whether the warning is early
enough."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Any

from megatron_r1v2.config.checkpoint import CheckpointConfig
from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.parallel.watch import RankWatch
from megatron_r1v2.training.kept_rollouts import KeptRollouts
from megatron_r1v2.training.recorder import Recorder
from megatron_r1v2.training.stop_request import StopRequest

_ENGINE_STEPS_BETWEEN_LOOKS = 8
"""Ranks of a replica agree on whether to stop by a collective, which is small but not free."""


class Interruptions:
    """What a session asks between its phases and in them."""

    def __init__(
        self,
        stop_request: StopRequest,
        kept: KeptRollouts,
        *,
        settings: CheckpointConfig,
        recorder: Recorder,
        watch: RankWatch,
        context: ParallelContext,
    ) -> None:
        """Put the parts together.

        Args:
            stop_request: entered.
            kept: rollouts of unfinished steps.
            settings: lead and grace time.
            recorder: where the run says what it does.
            watch: told that generation goes on.
            context: process groups.
        """
        self.watch = watch
        self.stop_request = stop_request
        self.kept = kept
        self.settings = settings
        self.recorder = recorder
        self.context = context
        self._engine_steps = 0
        self._longest_need = 0.0

    def must_stop(self, step: int) -> bool:
        """Return whether the run was asked to save and end after this step.

        Args:
            step: steps done.
        """
        number = self.stop_request.is_made()
        if number is None:
            return False
        self.recorder.say(f"asked to stop by {number.name}: saving after step {step}; start again to go on")
        return True

    def between_phases(self) -> None:
        """Give the step up when SIGTERM has come; called together by all ranks."""
        self.stop_request.abandon_if_told()

    def between_engine_steps(self, responses: int, tokens: int) -> None:
        """Give the step up now and then when SIGTERM has come; called together by the ranks of a replica.

        Args:
            responses: finished so far.
            tokens: in them.
        """
        self.watch.tick()
        self._engine_steps += 1
        if self._engine_steps % _ENGINE_STEPS_BETWEEN_LOOKS == 0:
            self.stop_request.abandon_if_told(self.context.groups.mp)

    def say_abandoned(self, step: int) -> None:
        """Say what the next start finds.

        Args:
            step: steps done.
        """
        kept = "; finished rollouts are kept" if self.kept.enabled else ""
        self.recorder.say(
            f"step {step + 1} is abandoned, as asked by {signal.SIGTERM.name}{kept}; start again to go on"
        )

    def say_taken_up(self, step: int, found: int, total: int) -> None:
        """Say how much of a step an interrupted run has left.

        Args:
            step: steps done.
            found: prompts whose rollouts are there.
            total: prompts.
        """
        if found:
            self.recorder.say(f"step {step + 1}: rollouts of {found} of {total} prompts are there from before")

    def check_lead(self) -> None:
        """Note how much of `checkpoint.lead_seconds` a step and a save leave, and warn when they need more."""
        lead = self.settings.lead_seconds
        need = self.recorder.step_seconds() + self.recorder.values.get("timing_s/save", 0.0)
        if not lead:
            return
        self.recorder.note({"timing_s/lead_margin": lead - need})
        if need > max(lead, self._longest_need):
            self._longest_need = need
            self.recorder.say(
                f"warning: a step and a save have taken {need:.0f} s, but SIGUSR1 comes checkpoint.lead_seconds="
                f"{lead:g} before the end: the step would be lost; raise --signal=B:USR1@{need * 1.5:.0f} of sbatch "
                "and this setting together"
            )


def made_by(seed: int, version: int, generation: Any, weights: Mapping[str, int]) -> dict[str, Any]:
    """Return all that decides which tokens are drawn for a prompt.

    Args:
        seed: of the run.
        version: of the policy.
        generation: settings of the sampling.
        weights: checksums by part.
    """
    return {
        "seed": seed,
        "version": version,
        "responses_per_prompt": generation.responses_per_prompt,
        "max_response_tokens": generation.max_response_tokens,
        "temperature": generation.temperature,
        "stop_tokens": list(generation.stop_tokens),
        "weights": dict(weights),
    }
