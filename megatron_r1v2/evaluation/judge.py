"""An LLM judge for answers that rules cannot decide: asked once about each, its words kept on disk and in the rows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_r1v2.evaluation.chat_endpoint import ChatEndpoint, Completion
from megatron_r1v2.evaluation.response_log import JudgeVerdict, ResponseRow
from megatron_r1v2.resilience.fingerprint import Fingerprint
from megatron_r1v2.resilience.json_lines import append_json_lines, recover_json_lines
from megatron_r1v2.rewards.answer import last_boxed

JUDGE_PROMPT = """\
You compare a student's final answer with the reference answer of an exam.

Question:
{question}

Reference answer: {reference}{tolerance}
Student's final answer: {answer}

Decide whether the student's final answer means the same as the reference answer. Do not solve the question yourself: \
the reference is right. Accept another form of the same value (a fraction for a decimal, an equivalent expression, a \
unit that is written out or left out, another wording of the same thing, the text of an option for its letter). Reject \
anything else: another value, a value rounded too coarsely for the reference, only a part of what is asked, or several \
answers of which one is right.
Explain in one or two sentences. Then end with a line that is exactly "Verdict: CORRECT" or "Verdict: INCORRECT"."""

_TOLERANCE = "\nA number of the reference may be missed by at most {} (absolute)."
_VERDICT = re.compile(r"Verdict:[\s*_\"'`\u2018-\u201f]*(CORRECT|INCORRECT)\b", re.IGNORECASE)
_LETTER = re.compile(r"\(?([A-Za-z])\)?[.:]?")


def needs_judge(row: ResponseRow) -> bool:
    """Return whether the judge may be asked: there is an answer, and the rules did not find it right.

    A wrong option letter is wrong beyond doubt.
    """
    answer = last_boxed(row["text"])
    if row["rule_correct"] or answer is None or not answer.strip():
        return False
    return not (row["answer_type"] == "choice" and _LETTER.fullmatch(answer.strip().strip("$")))


def judge_rows(
    rows: Sequence[ResponseRow],
    judge: ChatEndpoint,
    cache: Path,
    *,
    max_tokens: int,
    progress: Callable[[int], None] | None = None,
) -> list[ResponseRow]:
    """Have the judge decide where it may.

    Verdicts are appended to the cache as they come in, by a hash of the judge's name and its question: a second
    evaluation, or one that goes on after the judge was down, asks only what is new, and what had no verdict.

    Args:
        cache: JSON lines; made when it is not there.
        max_tokens: of the judge's answer, its reasoning included.
        progress: called with the number of verdicts so far.

    Returns:
        The rows; those that were judged have a new `correct` and `judge`: {"verdict": true, false or null, "text",
        "model"}; null: the judge came to no verdict, and the response counts as wrong.

    Raises:
        EndpointFailed: the judge gives no answer.
        ValueError: the cache is damaged.
    """
    prompts = {index: judge_prompt(row) for index, row in enumerate(rows) if needs_judge(row)}
    hashes = {index: Fingerprint.of(model=judge.model, prompt=prompt).digest for index, prompt in prompts.items()}
    questions = {key: rows[index]["prompt_key"] for index, key in hashes.items()}
    known = _read_cache(cache)
    # Equal questions are asked once: answers repeat over the runs of a prompt.
    asked = {hashes[index]: prompt for index, prompt in prompts.items() if hashes[index] not in known}
    done = len(set(hashes.values())) - len(asked)
    requests = {key: _request(prompt, max_tokens) for key, prompt in asked.items()}
    for key, completion in judge.ask_all(list(asked), requests.__getitem__, about=questions.__getitem__):
        known[key] = {"verdict": read_verdict(completion), "text": completion.text, "model": judge.model}
        # No verdict is not kept: the judge may give one when it is asked again.
        if known[key]["verdict"] is not None:
            append_json_lines(cache, [{"hash": key, **known[key]}])
        done += 1
        if progress is not None:
            progress(done)
    return [
        {**row, "judge": known[hashes[index]], "correct": known[hashes[index]]["verdict"] is True}
        if index in hashes
        else row
        for index, row in enumerate(rows)
    ]


def judge_prompt(row: ResponseRow) -> str:
    """Return the question to the judge about a response: never its reasoning, which could persuade the judge."""
    reference = " or ".join([row["answer"], *row["alternatives"]])
    tolerance = " or ".join(f"{number:g}" for number in row["tolerances"])
    return JUDGE_PROMPT.format(
        question=row["question"],
        reference=reference,
        tolerance=_TOLERANCE.format(tolerance) if tolerance else "",
        answer=last_boxed(row["text"]),
    )


def read_verdict(completion: Completion) -> bool | None:
    """Return the last verdict behind the judge's reasoning; None without one, or where the judge was cut off."""
    found = _VERDICT.findall(completion.answer) if completion.finish_reason == "stop" else []
    return found[-1].upper() == "CORRECT" if found else None


def _request(prompt: str, max_tokens: int) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": prompt}], "temperature": 0.0, "max_tokens": max_tokens}


def _read_cache(path: Path) -> dict[str, JudgeVerdict]:
    """Return the verdicts by hash."""
    known = {}
    for number, line in recover_json_lines(path):
        try:
            entry = json.loads(line)
            if entry["verdict"] is not None:
                known[entry.pop("hash")] = entry
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is damaged ({error!r}); delete the line") from error
    return known
