"""Preemption with little loss: signals, checkpoints and rollouts of a running stage, and whether the lead suffices."""

from __future__ import annotations

import torch.distributed as dist

from megatron_r1v2.monitoring.recorder import Recorder
from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.resilience.rank_commands import RankCommands
from megatron_r1v2.resilience.rank_watch import RankWatch
from megatron_r1v2.resilience.rollout_cache import RolloutCache
from megatron_r1v2.resilience.signals import StepAbandoned, StopSignals
from megatron_r1v2.training.store import CheckpointStore

_ENGINE_STEPS_BETWEEN_LOOKS = 8
"""Ranks of a replica agree on what to do by a collective, which is small but not free."""
_ABANDON, _PUBLISH, _GO_ON = "abandon the step", "publish the checkpoint", "go on"


class PreemptionHandler:
    """The poll for signals between and within the phases of a step, and the publication of written checkpoints.

    Args:
        stop_signals: already listening.
        lead_seconds: how long before the end SIGUSR1 comes; 0: unknown.
        watch: must hear that generation goes on.
    """

    def __init__(
        self,
        stop_signals: StopSignals,
        rollouts: RolloutCache,
        checkpoints: CheckpointStore,
        *,
        lead_seconds: float,
        recorder: Recorder,
        watch: RankWatch,
        context: ParallelContext,
    ) -> None:
        self.watch = watch
        self.stop_signals = stop_signals
        self.rollouts = rollouts
        self.checkpoints = checkpoints
        self.lead_seconds = lead_seconds
        self.recorder = recorder
        self.context = context
        self._commands = RankCommands(context)
        self._engine_steps = 0
        self._longest_need = 0.0

    def sync_stop_signal(self, step: int) -> bool:
        """Collective over the world: agree on whether the run was asked to save and end after this step.

        Args:
            step: steps done.
        """
        number = self.stop_signals.sync_stop_signal()
        if number is None:
            return False
        self.recorder.log(f"asked to stop by {number.name}: saving after step {step}; start again to go on")
        return True

    def publish(self, *, blocking: bool) -> None:
        """Collective over the world: publish written checkpoints, and drop the rollouts of the steps that they hold."""
        self.checkpoints.finish_pending(blocking=blocking)
        # Only now: until a checkpoint holds their step, its rollouts are what a restart goes on with.
        if self.context.is_main:
            self.rollouts.drop_before(self.checkpoints.newest_step())

    def poll_between_phases(self) -> None:
        """Collective over the world: publish what has been written, and give the step up when that was asked for."""
        self.publish(blocking=False)
        self.stop_signals.abandon_step_if_asked()

    def poll_between_engine_steps(self, responses: int, tokens: int) -> None:  # noqa: ARG002
        """Collective over the replica: do the same now and then while it generates."""
        self.watch.tick()
        self._engine_steps += 1
        if self._engine_steps % _ENGINE_STEPS_BETWEEN_LOOKS == 0:
            self._follow_commands(self.context.groups.mp)

    def wait_for_all(self, name: str) -> None:
        """Collective over the world: wait for replicas that still generate, as `poll_between_engine_steps` does.

        Args:
            name: of the place, never used before.
        """
        self.watch.wait_for_all(name, leave=lambda all_here: self._follow_commands(None, all_here=all_here))

    def _follow_commands(self, group: dist.ProcessGroup | None, *, all_here: bool = False) -> bool:
        """Collective over the group: report, decide on the first rank, obey; return whether all go on together.

        Publishing is a collective. The first rank orders it when every rank has written its files, and each obeys at
        its next look, so that a rank waits for nothing but a few engine steps of the others.
        """
        written = self.checkpoints.written()
        if written is not None:
            self._commands.report(f"written {written}")
        if self.stop_signals.is_abandon_asked:
            self._commands.report(_ABANDON)
        if self.context.is_main:
            if self._commands.count_reports(_ABANDON):
                self._commands.send(_ABANDON)
            elif written is not None and self._commands.count_reports(f"written {written}") == dist.get_world_size():
                self._commands.send(_PUBLISH)
            elif all_here:
                self._commands.send(_GO_ON)
        command = self._commands.receive(group)
        if command == _ABANDON:
            raise StepAbandoned(self.stop_signals.reason)
        if command == _PUBLISH:
            self.publish(blocking=False)
        return command == _GO_ON

    def log_step_abandoned(self, step: int, reason: str) -> None:
        """Log that a step is given up, and what is kept of it.

        Args:
            reason: the signal that asked for it.
        """
        kept = "; finished rollouts are kept" if self.rollouts.enabled else ""
        self.recorder.log(f"step {step + 1} is abandoned, as asked by {reason}{kept}; start again to go on")

    def log_resumed_rollouts(self, step: int, found: int, total: int) -> None:
        """Log how many rollouts of a step an interrupted run has left.

        Args:
            found: prompts whose rollouts were kept.
        """
        if found:
            self.recorder.log(f"step {step + 1}: rollouts of {found} of {total} prompts are there from before")

    def check_lead(self) -> None:
        """Note the part of `checkpoint.lead_seconds` that a step and a save leave, and warn when they need more."""
        lead = self.lead_seconds
        need = self.recorder.step_seconds() + self.recorder.values.get("timing_s/save", 0.0)
        if not lead:
            return
        self.recorder.note({"preemption/lead_margin_s": lead - need})
        # Once for each new longest step: a warning in every line would not be read.
        if need > max(lead, self._longest_need):
            self._longest_need = need
            self.recorder.log(
                f"warning: a step and a save have taken {need:.0f} s, but SIGUSR1 comes checkpoint.lead_seconds="
                f"{lead:g} before the end: the step would be lost; raise --signal=B:USR1@{need * 1.5:.0f} of sbatch "
                "and this setting together"
            )
