"""Weight verification: replicas, checkpoint and frozen parts by checksums, engine and training by log-probs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from megatron_r1v2.config.choices import Part
from megatron_r1v2.config.schema import AlgorithmConfig, GenerationConfig
from megatron_r1v2.generation.engine import RolloutEngine, Sampling
from megatron_r1v2.generation.features import FeatureCache
from megatron_r1v2.models.r1v2 import R1V2Model
from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.rl.mismatch import MEAN_ABSOLUTE_DIFFERENCE, check_mismatch
from megatron_r1v2.training.batches import response_sample
from megatron_r1v2.training.microbatches import Microbatcher
from megatron_r1v2.training.mismatch import compute_mismatch
from megatron_r1v2.training.policy import Policy
from megatron_r1v2.training.weight_checksums import check_loaded, check_replicas, check_unchanged, compute_checksums
from megatron_r1v2.types import Modality, Prompt, RLTargets, Rollout, Sample

FROZEN_EVERY = 8
"""Steps between two looks at the frozen parts: only a fault of the hardware changes them, and they are the most."""
GATE_REQUESTS = len(get_args(Modality))
"""Prompts that the gate generates from at once, which is what its cache must hold."""
GATE_TOKENS = 8
"""The engine generates so many tokens to one prompt of each modality, which the training forward is compared on."""


class WeightVerifier:
    """A check of weights by their checksums; frozen parts must keep those that they had at first."""

    def __init__(self, model: R1V2Model, trained: Iterable[Part], context: ParallelContext) -> None:
        """Note which parts are frozen."""
        self.model = model
        self.frozen = sorted(set(model.parts) - set(trained))
        self.context = context
        self._at_first: dict[str, int] = {}

    def compute_checksums(self) -> dict[str, int]:
        """Collective over the replica: compute the checksum of each part of the model."""
        return compute_checksums(self.model, self.model.parts, self.context)

    def exact_checksums(self, checksums: Mapping[str, int]) -> dict[str, int]:
        """Return those of the parts whose weights are the same on every device."""
        # The rounding of a language model to 8 bits is the GPU's own.
        return {name: value for name, value in checksums.items() if not (self._is_rounded and name == Part.language)}

    @property
    def _is_rounded(self) -> bool:
        return bool(self.model.config.fp8_param)

    def describe_weights(self, own: Iterable[Part]) -> dict[str, Any]:
        """Collective over the replica: describe the weights for a checkpoint.

        Args:
            own: parts that the checkpoint holds itself.

        Returns:
            `checksums` by part, and `base`, which identifies the Hugging Face model that the run started from: its
            architecture, the dtype that its weights were read in, and the checksums of the parts that are not `own`. A
            language model in 8 bits has none there: the rounding is the GPU's own.
        """
        checksums = self.compute_checksums()
        rounded = {Part.language} if self._is_rounded else set()
        taken = set(self.model.parts) - set(own) - rounded
        base = {
            "architecture": asdict(self.model.architecture),
            "dtype": str(self.model.config.params_dtype).removeprefix("torch."),
            "checksums": {name: value for name, value in checksums.items() if Part(name) in taken},
        }
        return {"checksums": checksums, "base": base}

    def verify_weights(
        self,
        saved: Mapping[str, int],
        source: Path | None,
        *,
        trained_only: bool = False,
        computed: Mapping[str, int] | None = None,
    ) -> dict[str, int]:
        """Collective over the world: compare replicas, what a checkpoint says, and frozen parts with what they were.

        Args:
            saved: by part; empty: nothing to compare with.
            trained_only: take the frozen parts for what they were at the last look, if there was one.
            computed: checksums of all parts, where the weights have not changed since they were computed.

        Returns:
            The checksums of all parts.

        Raises:
            RuntimeError: something differs.
        """
        known = dict(computed) if computed else self._at_first if trained_only else {}
        parts = [part for part in self.model.parts if part.value not in known]
        now = known | compute_checksums(self.model, parts, self.context)
        check_replicas(now, self.context)
        check_loaded(now, saved, source)
        # Again and again: a flipped bit in a frozen part would never be written over.
        frozen = {part.value: now[part.value] for part in self.frozen}
        check_unchanged(frozen, self._at_first or frozen)
        self._at_first = frozen
        return now


def check_engine(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    features: FeatureCache,
    *,
    policy: Policy,
    microbatcher: Microbatcher,
    generation: GenerationConfig,
    settings: AlgorithmConfig,
) -> dict[str, float]:
    """Collective over the world: compare engine and training forward on a few tokens before a generation phase.

    The comparison after the phase covers all tokens, but comes when the hours are gone; this one costs one short
    generation and one forward pass.

    Args:
        prompts: of the step; the first of each modality is used, by every replica.
        settings: `max_log_prob_difference`.

    Returns:
        `gate/log_prob_abs_diff`.

    Raises:
        ValueError: the mean difference is above `algorithm.max_log_prob_difference`.
    """
    # One prompt of each modality: images and text take different ways through the engine.
    chosen = list({prompt.modality: prompt for prompt in reversed(prompts)}.values())
    rollouts = engine.generate(
        chosen,
        Sampling(
            num_responses=1,
            policy_version=policy.version,
            step=policy.version,
            # The engine's own setting, not the policy's: a training forward with another one must be noticed.
            temperature=generation.temperature,
            max_response_tokens=min(GATE_TOKENS, generation.max_response_tokens),
        ),
        features=features,
    )
    samples = {prompt.key: _sample(prompt, rollout) for prompt, rollout in zip(chosen, rollouts, strict=True)}
    batches = [part.batch for part in microbatcher.split(samples, {prompt.key: prompt for prompt in chosen})]
    metrics = compute_mismatch(batches, policy.compute_log_probs(batches), policy.context)
    check_mismatch(metrics, settings.max_log_prob_difference)
    return {"gate/log_prob_abs_diff": metrics[MEAN_ABSOLUTE_DIFFERENCE]}


def _sample(prompt: Prompt, rollout: Rollout) -> Sample:
    # Advantage and reward play no part in a comparison of log-probs.
    rl = RLTargets(rollout.rollout_log_probs, 0.0, 0.0, rollout.policy_version, group_effective=False)
    return response_sample(prompt, rollout.token_ids, rl=rl)
