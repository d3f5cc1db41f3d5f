"""Claims of responses about their images, checked against facts: the hallucination rate and its coverage.

Standard library only, because the verifier workers import this.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Claim = tuple[str, str]


@dataclass(frozen=True)
class HallucinationCounts:
    """Counts to be added over ranks and steps before the two rates are taken."""

    claims: int
    """Claims with a name that the facts have: only these can be true or false."""
    contradicted: int
    """Those of them that contradict the facts."""
    unknown: int
    """Claims with a name that the facts do not have; in neither rate."""
    responses: int
    """Responses to prompts that have facts."""
    responses_with_claims: int
    """Those of them with at least one claim that can be judged."""

    @property
    def rate(self) -> float | None:
        """Return contradicted claims over claims; None without claims, which is not the same as none contradicted."""
        return self.contradicted / self.claims if self.claims else None

    @property
    def coverage(self) -> float | None:
        """Return responses with claims over responses; None when no prompt has facts."""
        return self.responses_with_claims / self.responses if self.responses else None


def compile_claim_pattern(pattern: str) -> re.Pattern[str] | None:
    """Check and compile `reward.claim_pattern`; return None for "".

    Args:
        pattern: a regular expression with the named groups `name` and `value`; "" looks for no claims.

    Raises:
        ValueError: not a regular expression, or one of the groups is missing.
    """
    if not pattern:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"reward.claim_pattern={pattern!r} is not a regular expression ({error}); "
            r"write one like '(?P<name>left|right) (?P<value>\d)', or '' to look for no claims"
        ) from error
    missing = [group for group in ("name", "value") if group not in compiled.groupindex]
    if missing:
        raise ValueError(
            f"reward.claim_pattern={pattern!r} lacks the named group(s) {', '.join(missing)}; it needs both "
            r"`name` and `value`, as in '(?P<name>left|right) (?P<value>\d)'"
        )
    return compiled


def find_claims(text: str, pattern: str) -> tuple[Claim, ...]:
    """Return the claims (name, value) of a response in their order.

    A careless pattern can take exponential time on hostile text: `score_rollouts` calls this in a verifier worker.

    Args:
        pattern: `reward.claim_pattern`; "" finds nothing.

    Raises:
        ValueError: see `compile_claim_pattern`.
    """
    compiled = compile_claim_pattern(pattern)
    if compiled is None:
        return ()
    # A group in a branch of the pattern that did not match is None: such a match is no claim.
    return tuple(
        (match["name"], match["value"])
        for match in compiled.finditer(text)
        if match["name"] is not None and match["value"] is not None
    )


def judge_claims(claims: Iterable[Claim], facts: Mapping[str, str]) -> tuple[bool | None, ...]:
    """Compare claims with the facts; outer spaces and upper or lower case do not matter.

    Returns:
        For each claim True (agrees), False (contradicts: a hallucination) or None (the facts lack its name).
    """
    known = {_normal(name): _normal(value) for name, value in facts.items()}
    return tuple(known[_normal(name)] == _normal(value) if _normal(name) in known else None for name, value in claims)


def consistency_score(claims: Iterable[Claim], facts: Mapping[str, str]) -> float:
    """Return 1 when a response makes a claim that can be judged and none that the facts contradict, else 0.

    Args:
        facts: the true value of each name, of at least one.
    """
    # Silence gets 0 as a contradiction does, so a policy gains nothing by it; and true claims do not make up for a
    # false one, so it gains nothing by adding obvious ones either.
    verdicts = [verdict for verdict in judge_claims(claims, facts) if verdict is not None]
    return float(bool(verdicts) and all(verdicts))


def hallucination_counts(claims: Sequence[Iterable[Claim]], facts: Sequence[Mapping[str, str]]) -> HallucinationCounts:
    """Count the claims of many responses; a response to a prompt without facts counts nowhere but in `unknown`.

    Args:
        facts: the facts of each response's prompt, in the same order.
    """
    judged = [(judge_claims(of_response, known), bool(known)) for of_response, known in zip(claims, facts, strict=True)]
    verdicts = [verdict for of_response, _ in judged for verdict in of_response]
    return HallucinationCounts(
        claims=sum(verdict is not None for verdict in verdicts),
        contradicted=sum(verdict is False for verdict in verdicts),
        unknown=sum(verdict is None for verdict in verdicts),
        responses=sum(has_facts for _, has_facts in judged),
        responses_with_claims=sum(any(verdict is not None for verdict in of_response) for of_response, _ in judged),
    )


def _normal(text: str) -> str:
    return text.strip().casefold()
