"""Rows of an evaluation, one a response: alike for a checkpoint and an endpoint, judged, and turned into a result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_r1v2.config.schema import EvaluationConfig, RewardConfig
from megatron_r1v2.evaluation.benchmarks.readers import whole_size
from megatron_r1v2.evaluation.chat_endpoint import JUDGE_MAX_TOKENS, ChatEndpoint
from megatron_r1v2.evaluation.judge import judge_rows, needs_judge
from megatron_r1v2.evaluation.pass_at_1 import (
    EVALUATION_SEED,
    Conditions,
    EvaluationResult,
    Outcome,
    check_name,
    evaluate_outcomes,
    evaluation_path,
    write_evaluation,
)
from megatron_r1v2.evaluation.response_log import ResponseLog, ResponseRow
from megatron_r1v2.evaluation.rollout_records import rollout_record, write_rollouts
from megatron_r1v2.monitoring.progress import progress_bar
from megatron_r1v2.resilience.fingerprint import Fingerprint
from megatron_r1v2.rewards.answer import last_boxed
from megatron_r1v2.rewards.functions import describe_functions
from megatron_r1v2.types import Prompt, ScoredRollout

JUDGE_CACHE = "judge.jsonl"
# Pass@1 and the format have figures of their own.
_SHOWN_OTHERWISE = ("answer", "format")


@dataclass(frozen=True)
class Evaluation:
    """The settings of one evaluation, its log while it is under way, and its result."""

    name: str
    folder: Path
    """Folder of the result, `evaluation-NAME.json`."""
    settings: EvaluationConfig
    reward: RewardConfig
    max_response_tokens: int
    model: str
    """The evaluated folder, or an endpoint's model."""
    step: int
    """Optimizer steps behind its weights."""
    available: int = 0
    """Prompts in the data set; 0: not known."""
    rows: str = ""
    """A digest of the rows of the data set; "": not known."""

    def open_log(self) -> ResponseLog:
        """Open the log, with the rows of an interrupted evaluation, which may have had other prompts and runs.

        Raises:
            ValueError: the interrupted evaluation, or a finished one of this name, had other settings.
        """
        settings, data = self.settings, self._data
        sampling = {"temperature": settings.temperature, "top_p": settings.top_p}
        check_name(self.folder, self.name, model=self.model, step=self.step, data=data, **sampling)
        # Left out where there are none: logs of earlier versions know nothing of them.
        functions = {"functions": describe_functions(own)} if (own := self.reward.functions) else {}
        fingerprint = Fingerprint.of(
            model=self.model,
            step=self.step,
            evaluation={
                "data": data,
                "endpoint_url": settings.endpoint_url,
                **({"rows": self.rows} if self.rows else {}),
                **sampling,
                "seed": EVALUATION_SEED,
            },
            generation={"max_response_tokens": self.max_response_tokens},
            reward={"claim_pattern": self.reward.claim_pattern, **functions},
        )
        return ResponseLog(evaluation_path(self.folder, self.name).with_suffix(".unfinished.jsonl"), fingerprint)

    def conclude(self, keys: Sequence[str], log: ResponseLog) -> EvaluationResult:
        """Have the judge decide what the rules could not, write the result and all rows, and delete the log.

        Args:
            keys: of the prompts, in order.
            log: holds every row.

        Raises:
            EndpointFailed: the judge gives no answer; responses and verdicts so far are kept.
        """
        order = {key: index for index, key in enumerate(keys)}
        # An interrupted evaluation may have had more prompts or runs than this one asks for.
        rows = [row for row in log.rows if row["prompt_key"] in order and row["sample_index"] < self.settings.runs]
        rows.sort(key=lambda row: (order[row["prompt_key"]], row["sample_index"]))
        if self.settings.judge_url:
            judge = ChatEndpoint.from_settings(self.settings, "judge")
            with progress_bar("judge", sum(needs_judge(row) for row in rows), shown=True) as show:
                rows = judge_rows(rows, judge, self.folder / JUDGE_CACHE, max_tokens=JUDGE_MAX_TOKENS, progress=show)
        result = evaluate_outcomes(
            self.name,
            keys,
            [outcome_of(row) for row in rows],
            Conditions(
                self.settings.temperature,
                self.settings.top_p,
                EVALUATION_SEED,
                self.step,
                self.model,
                self._data,
                whole_size({row["metadata"].get("benchmark", "") for row in rows}, self.available),
            ),
        )
        write_rollouts(evaluation_path(self.folder, self.name).with_suffix(".rollouts.jsonl"), rows)
        write_evaluation(self.folder, result)
        # Last: an evaluation that is killed before goes on from its log.
        log.discard()
        return result

    @property
    def _data(self) -> str:
        return str(Path(self.settings.data).absolute())


def evaluation_rows(
    prompts: Sequence[Prompt],
    scored: Sequence[ScoredRollout],
    *,
    step: int,
    pictures: bool = True,
) -> list[ResponseRow]:
    """Return the rows of scored responses.

    The picture of a prompt is in the row of its first response only.
    """
    by_key = {prompt.key: prompt for prompt in prompts}
    rows = []
    for response in scored:
        prompt, index = by_key[response.rollout.prompt_key], response.rollout.sample_index
        assert prompt.answer_type is not None, "the answer of an evaluation's prompt has a type"
        row: ResponseRow = {
            **rollout_record(step, prompt, response, advantage=0.0, picture=pictures and index == 0),
            "sample_index": index,
            "answer_type": prompt.answer_type,
            "alternatives": list(prompt.alternatives),
            "tolerances": list(prompt.tolerances),
            "facts": dict(prompt.facts),
            "metadata": dict(prompt.metadata),
            "rule_correct": response.rule_correct,
            "judge": None,
        }
        rows.append(row)
    return rows


def outcome_of(row: ResponseRow) -> Outcome:
    """Return a row as far as an evaluation counts it.

    Args:
        row: scored, and judged where a judge was asked.
    """
    judge = row["judge"]
    return Outcome(
        prompt_key=row["prompt_key"],
        sample_index=row["sample_index"],
        correct=row["correct"],
        answer=last_boxed(row["text"]),
        well_formed=row["rewards"]["format"],
        tokens=row["response_tokens"],
        claims=tuple((str(claim), str(value)) for claim, value, _ in row["claims"]),
        facts=row["facts"],
        judged=judge is not None,
        unclear=judge is not None and judge["verdict"] is None,
        rewards={part: value for part, value in row["rewards"].items() if part not in _SHOWN_OTHERWISE},
    )
