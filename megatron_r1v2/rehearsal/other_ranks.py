"""The doings and answers of the other ranks in a stage, where the rule of `cluster.py` would be wrong.

The other replicas have the same responses to their prompts as this one has to its own. What only the leader of a
replica, the main rank or the last pipeline stage computes, this rank computes in their place where it is none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from dataclasses import replace as changed
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from megatron_r1v2.evaluation.evaluator import Evaluator
from megatron_r1v2.generation.controller import RolloutController
from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.rehearsal.collectives import Collective
from megatron_r1v2.rehearsal.fake_tensors import FakeTensors
from megatron_r1v2.rehearsal.stand_ins import Script, install_shares
from megatron_r1v2.rehearsal.watch import original, replace, unwatched
from megatron_r1v2.resilience.rank_commands import RankCommands
from megatron_r1v2.rewards import verifiers
from megatron_r1v2.rewards.replica import ReplicaScorer
from megatron_r1v2.rewards.verifiers import VerifierPool
from megatron_r1v2.stages import preemption, reference_log_probs
from megatron_r1v2.stages.grpo import replay_buffer, selection, updates
from megatron_r1v2.stages.grpo.segments import GroupsInFlight
from megatron_r1v2.stages.pairs import PairMaker
from megatron_r1v2.stages.session import Session
from megatron_r1v2.stages.supervised_data import SIDES, PairSource, sample_name
from megatron_r1v2.training import policy, weight_verification
from megatron_r1v2.training.forward import Forward
from megatron_r1v2.types import Prompt, Rollout, Sample, ScoredRollout, TrainingBatch

Finish = Callable[[torch.Tensor, TrainingBatch], tuple[torch.Tensor, tuple[Mapping[str, torch.Tensor], torch.Tensor]]]
"""Of a microbatch: the scaled loss, and its metrics with the log-probs."""
Result = TypeVar("Result")


@dataclass
class OtherRanks:
    """The rules, and what they are about to answer."""

    mode: FakeTensors
    script: Script
    drawn: torch.Tensor | None = None
    """Tokens that the drawing rank broadcasts next."""
    index: torch.Tensor | None = None
    """The number of the prompt that the leader of the replica broadcasts next."""
    shapes: dict[int, list[tuple[int, ...]]] = field(default_factory=dict)
    """Shapes of hidden states that each neighbour in the pipeline announces, in order."""
    prompts: Sequence[Prompt] = ()
    """The prompts of the round whose pairs are made, of all replicas."""
    losses: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """The metrics that the last stage has computed."""
    going_on: list[Prompt] = field(default_factory=list)
    """The prompts of other replicas whose responses go on in the next step."""
    order: dict[str, int] = field(default_factory=dict)
    """The number of each prompt of the run, by key."""
    _pool: VerifierPool | None = None
    _at_the_end: ExitStack = field(default_factory=ExitStack)

    def install(self) -> None:
        """Let the rules answer; in a process of its own, where nothing is put back."""
        self.mode.incoming = self._send
        self._install_generation()
        self._install_scores()
        self._install_segments()
        self._install_pairs()
        self._install_reference()
        self._install_training()

    def close(self) -> None:
        """End the processes that were started."""
        self._at_the_end.close()

    def _send(self, call: Collective, target: torch.Tensor) -> torch.Tensor | None:
        """Give what another rank sends into a tensor."""
        if call.kind == "recv_":
            announced = self.shapes.get(call.peer)
            is_shape = target.dtype is torch.int64 and target.numel() == 3  # megatron-core's for hidden states
            return _real(announced.pop(0)) if is_shape and announced else None
        for name in ("drawn", "index"):
            values: torch.Tensor | None = getattr(self, name)
            if values is not None and values.dtype == target.dtype and values.shape == target.shape:
                setattr(self, name, None)
                return values
        return None

    # -- generation -----------------------------------------------------------------------------------------------

    def _install_generation(self) -> None:
        """Draw on this rank what another one draws, and name the prompt that its leader takes."""
        sample = original(RolloutController, "_dynamic_step_sample_logits")
        wait_for_all = original(preemption.PreemptionHandler, "wait_for_all")

        def draw(controller: RolloutController, logits: torch.Tensor | None) -> None:
            if not controller._draws_here:
                self.mode.answer("the tokens that another rank draws: scripted ones")
                tokens: list[int] = controller.scripted  # type: ignore[attr-defined]  # of the script
                self.drawn = _real([tokens, [0] * len(tokens)], torch.float64)
            sample(controller, logits)

        def wait(handler: preemption.PreemptionHandler, name: str) -> None:
            if not handler.context.is_main:
                commands: RankCommands = handler._commands
                commands.send(preemption._GO_ON)
            wait_for_all(handler, name)

        def announce(number: int) -> None:
            self.index = _real([number])

        install_shares(announce)
        replace(RolloutController, "_dynamic_step_sample_logits", draw)
        replace(preemption.PreemptionHandler, "wait_for_all", wait)

    # -- scores ---------------------------------------------------------------------------------------------------

    def _install_scores(self) -> None:
        """Score on this rank what the leader of the replica scores, and complete what other replicas have."""
        score, respond = original(ReplicaScorer, "score"), original(Evaluator, "respond")
        run, gather = original(Evaluator, "run"), original(selection, "_gather_responses")
        send, compare = original(replay_buffer, "send_to_trainers"), original(updates, "compute_mismatch")

        def score_here(scorer: ReplicaScorer, prompts: Mapping[str, Prompt], rollouts: Sequence[Rollout]) -> object:
            if scorer.context.is_replica_leader:
                return score(scorer, prompts, rollouts)
            self.mode.answer("the scores of the replica's leader: computed here")
            return score(changed(scorer, context=_as_main(scorer.context), pool=self._verifiers()), prompts, rollouts)

        def run_here(evaluator: Evaluator, prompts: Sequence[Prompt], *, name: str, step: int) -> object:
            if evaluator.context.is_main:
                return run(evaluator, prompts, name=name, step=step)
            self.mode.answer("the evaluation of the first rank: computed here")
            here = changed(evaluator, context=_as_main(evaluator.context), pool=self._verifiers())
            return run(here, prompts, name=name, step=step)

        def respond_all(evaluator: Evaluator, prompts: Sequence[Prompt], **kwargs: object) -> list[ScoredRollout]:
            return _complete(prompts, respond(evaluator, prompts, **kwargs))

        def gather_all(prompts: Sequence[Prompt], scored: Sequence[ScoredRollout], context: ParallelContext) -> object:
            if len(scored) < len(prompts):
                self.mode.answer("the responses of the other replicas: the same as here, to their prompts")
            return gather(prompts, _complete(prompts, scored), context)

        def send_all(
            held: Mapping[str, Sample], prompts: Mapping[str, Prompt], trainer: Mapping[str, int], **kwargs: object
        ) -> object:
            rank = cast(dist.ProcessGroup, kwargs["group"]).rank()
            return send(_with_received(held, trainer, rank), prompts, trainer, **kwargs)

        def compare_here(
            batches: Sequence[TrainingBatch], log_probs: Sequence[torch.Tensor], context: ParallelContext
        ) -> object:
            return compare(batches, log_probs, _as_main(context))

        replace(ReplicaScorer, "score", score_here)
        replace(Evaluator, "respond", respond_all)
        replace(Evaluator, "run", run_here)
        replace(selection, "_gather_responses", gather_all)
        replace(replay_buffer, "send_to_trainers", send_all)
        replace(updates, "compute_mismatch", compare_here)
        replace(weight_verification, "compute_mismatch", compare_here)

    def _verifiers(self) -> VerifierPool:
        if self._pool is None:
            pool = VerifierPool(verifiers.worker_count(), verifiers.TIMEOUT_SECONDS)
            self._pool = self._at_the_end.enter_context(pool)
        return self._pool

    def _install_segments(self) -> None:
        """Let groups of other replicas go on, and end, as those of this one do."""
        settle = original(GroupsInFlight, "settle")

        def settle_all(
            groups: GroupsInFlight, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]
        ) -> tuple[list[Prompt], list[Rollout]]:
            complete, mine = settle(groups, prompts, rollouts)
            own = {rollout.prompt_key for rollout in rollouts}
            others = [prompt for prompt in prompts if prompt.key not in own]
            ended = [*self.going_on, *(prompt for prompt in others if not self.script.goes_on(prompt.key))]
            self.going_on = [prompt for prompt in others if self.script.goes_on(prompt.key)]
            if others:
                self.mode.answer("the groups of other replicas that go on: those after which the script does so here")
            step = max((rollout.step for rollout in rollouts), default=0)
            groups.steps |= {prompt.key: step for prompt in self.going_on}
            for prompt in prompts:
                self.order.setdefault(prompt.key, len(self.order))
            return sorted([*complete, *ended], key=lambda prompt: self.order[prompt.key]), mine

        replace(GroupsInFlight, "settle", settle_all)

    def _install_pairs(self) -> None:
        """Complete the pairs and the beginnings of responses of other replicas: the same as here, to their prompts."""
        make, gather = original(PairMaker, "make_pairs"), original(PairMaker, "_gather")

        def make_pairs(maker: PairMaker, prompts: Sequence[Prompt], **kwargs: object) -> object:
            self.prompts = prompts
            return make(maker, prompts, **kwargs)

        def gather_all(maker: PairMaker, mine: Mapping[str, Result]) -> Mapping[str, Result]:
            found: Mapping[str, Result] = gather(maker, mine)
            if maker.loaded.context.data_size == 1:
                return found
            kinds = {prompt.key: prompt.modality for prompt in self.prompts}
            models = {kinds[key]: value for key, value in reversed(list(found.items()))}
            return {key: found.get(key, models[kind]) for key, kind in kinds.items() if kind in models}

        replace(PairMaker, "make_pairs", make_pairs)
        replace(PairMaker, "_gather", gather_all)

    def _install_reference(self) -> None:
        """Complete the reference log-probs with those of the pairs that other replicas compute: unknown numbers."""
        forward = original(reference_log_probs, "_forward")

        def forward_all(session: Session, source: PairSource, prompts: Sequence[Prompt]) -> dict[str, float]:
            mine: dict[str, float] = forward(session, source, prompts)
            names = (sample_name(prompt.key, side) for prompt in prompts for side in SIDES)
            return {name: mine[name] if name in mine else self._unknown() for name in names}

        replace(reference_log_probs, "_forward", forward_all)

    def _unknown(self) -> float:
        return float(self.mode.constant_for(torch.float32))

    # -- training -------------------------------------------------------------------------------------------------

    def _install_training(self) -> None:
        """Announce the shapes of other pipeline stages, and compute the metrics that the last one has."""
        run, combine = original(Forward, "run"), original(policy, "combine")

        def run_here(
            forward: Forward, batches: Sequence[TrainingBatch], finish: Finish, *, forward_only: bool
        ) -> list[Result]:
            self._announce(forward, batches)
            results: list[Result] = run(forward, batches, finish, forward_only=forward_only)
            if not forward_only and not results:
                self.losses = self._losses_of_last_stage(finish, batches)
            return results

        def combine_here(sums: Sequence[Mapping[str, torch.Tensor]], context: ParallelContext) -> object:
            if not sums:
                self.mode.answer("the losses of the last stage: computed here from zeros")
            return combine(sums or [self.losses], _as_main(context))

        replace(Forward, "run", run_here)
        replace(policy, "combine", combine_here)

    def _announce(self, forward: Forward, batches: Sequence[TrainingBatch]) -> None:
        context = forward.context
        if context.pipeline_size == 1:
            return
        ranks = dist.get_process_group_ranks(context.groups.pp)
        shapes = [self._hidden_shape(forward, batch) for batch in batches]
        # Forward from the stage before, backward from the stage behind, each for every microbatch in order.
        self.shapes = {ranks[(context.pipeline_rank + step) % len(ranks)]: list(shapes) for step in (-1, 1)}

    def _hidden_shape(self, forward: Forward, batch: TrainingBatch) -> tuple[int, ...]:
        rows, tokens = forward._lay_out(batch).token_ids_1S.shape
        config = forward.model.config
        return tokens // (forward.context.tensor_size if config.sequence_parallel else 1), rows, config.hidden_size

    def _losses_of_last_stage(self, finish: Finish, batches: Sequence[TrainingBatch]) -> Mapping[str, torch.Tensor]:
        with torch.no_grad():
            parts = []
            for batch in batches:
                parts.append(finish(torch.zeros_like(batch.response_mask_BS), batch)[1][0])
        return policy.add_pairs(parts)


def _real(numbers: Sequence[object], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Return a tensor with memory, as another rank has one."""
    with unwatched():
        return torch.tensor(numbers, dtype=dtype)


def _as_main(context: ParallelContext) -> ParallelContext:
    """Return the context as the first rank has it, for what this rank computes in its place; the groups stay."""
    return changed(context, tensor_rank=0, pipeline_rank=0, data_rank=0)


def _complete(prompts: Sequence[Prompt], scored: Iterable[ScoredRollout]) -> list[ScoredRollout]:
    """Add responses to the prompts that other replicas took: the same as to a prompt of this one of the same kind."""
    mine: dict[str, list[ScoredRollout]] = {}
    for response in scored:
        mine.setdefault(response.rollout.prompt_key, []).append(response)
    kinds = {prompt.key: prompt.modality for prompt in prompts}
    models = {kinds[key]: responses for key, responses in reversed(mine.items())}
    completed = []
    for prompt in prompts:
        responses = mine.get(prompt.key) or models.get(prompt.modality) or next(iter(mine.values()), [])
        completed += [changed(each, rollout=changed(each.rollout, prompt_key=prompt.key)) for each in responses]
    return completed


def _with_received(held: Mapping[str, Sample], trainer: Mapping[str, int], rank: int) -> dict[str, Sample]:
    """Add the samples that other replicas hold and send to this one: as long as one that it holds itself."""
    complete = dict(held)
    model = next(iter(held.values()), None)
    for name, owner in trainer.items():
        if owner == rank and name not in complete and model is not None:
            key, _, index = name.rsplit("/", 2)
            complete[name] = changed(model, prompt_key=key, sample_index=int(index))
    return complete
