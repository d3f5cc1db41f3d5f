"""The calibrator of a running stage: state and metrics around the pure rule of `rl/calibration.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from megatron_r1v2.config.schema import HallucinationConfig
from megatron_r1v2.monitoring.recorder import Recorder
from megatron_r1v2.rl.calibration import Calibration, CalibrationSettings, calibrate, interpolate
from megatron_r1v2.types import Prompt

MIN_COVERAGE = 0.5
"""Fewer responses with claims than this are as bad as a rate above the target: silence is no cure."""
_SLACK = 0.2
"""The brake is released only while the rate is below (1 - slack) x target: at the target itself it would swing."""
_PATIENCE = 2
"""Measurements in a row below that, before the brake is released."""
_TIGHTEN = 0.5
"""Each violation pulls the brake by this part of its remaining way."""
_RELAX = 0.05
"""Each measurement after the patience releases it by this part of the whole way."""


class Calibrator:
    """A value that moves between the recipe's and a bound, by measured hallucination rates."""

    def __init__(
        self,
        settings: HallucinationConfig,
        recorder: Recorder,
        *,
        name: str,
        configured: float,
        bound: float,
        restored: Mapping[str, Any],
    ) -> None:
        """Go on from a checkpoint, where the stage was resumed.

        Args:
            name: of the value in the metrics: `hallucination/NAME`.
            configured: the value in the recipe.
            bound: the value at which the brake is pulled all the way.
            restored: a checkpoint's state, with the `state_dict` of this in it; empty for a run that starts.
        """
        self.settings = settings
        self.recorder = recorder
        self.name = name
        self.configured = configured
        self.bound = bound
        self.state = Calibration(**restored.get("calibration", {}))

    @property
    def value(self) -> float:
        """Return the current value."""
        return interpolate(self.configured, self.bound, self.state.brake)

    @property
    def is_on(self) -> bool:
        """Return whether a target rate is set."""
        return self.settings.target_rate > 0

    def check(self, prompts: Sequence[Prompt], folder: str) -> None:
        """Refuse validation prompts that no rate can be measured on.

        Raises:
            ValueError: none has facts.
        """
        if self.is_on and not any(prompt.facts for prompt in prompts):
            raise ValueError(
                f"hallucination.target_rate={self.settings.target_rate} but none of the {len(prompts)} prompts read "
                f"from data.validation={folder!r} has facts, so no claim can be judged; "
                "add facts to the data set, or set hallucination.target_rate=0"
            )

    def observe(self, rate: float | None, coverage: float | None) -> None:
        """Move the value by a measurement, and note the decision.

        Args:
            rate: contradicted claims over claims; None: no claim was made.
            coverage: responses with claims over responses; None: no prompt has facts.
        """
        settings = self.settings
        if not self.is_on:
            return
        limits = CalibrationSettings(
            target=settings.target_rate,
            min_coverage=MIN_COVERAGE,
            slack=_SLACK,
            tighten=_TIGHTEN,
            relax=_RELAX,
            patience=_PATIENCE,
        )
        self.state, decision = calibrate(self.state, limits, rate=rate, coverage=coverage)
        self.recorder.note({"hallucination/decision": int(decision)})

    def note(self) -> None:
        """Note the value that this step works with."""
        if self.is_on:
            self.recorder.note({f"hallucination/{self.name}": self.value, "hallucination/brake": self.state.brake})

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"calibration": asdict(self.state)}
