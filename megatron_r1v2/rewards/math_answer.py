"""Are two LaTeX expressions equal?

The one module that imports math-verify (half a second); loaded when first needed.
"""

from __future__ import annotations

from math_verify import parse, verify


def expressions_agree(given: str, reference: str) -> bool:
    r"""Return whether math-verify finds two expressions equal.

    Its own time limits are off: they use SIGALRM, which works in a main thread only and cannot stop a computation
    inside C. `VerifierPool` holds the limit from outside.

    Args:
        given: the content of the response's box, LaTeX or plain.
        reference: the reference answer, LaTeX or plain.
    """
    parsed_reference = parse(rf"\boxed{{{reference}}}", parsing_timeout=None)
    parsed_given = parse(rf"\boxed{{{given}}}", parsing_timeout=None)
    return bool(verify(parsed_reference, parsed_given, timeout_seconds=None))
