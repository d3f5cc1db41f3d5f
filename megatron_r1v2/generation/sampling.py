"""Sampling of tokens, so that a response depends only on the weights and its own name.

The uniform number of each token is a hash of (seed, step, prompt key, sample index, position). A response is therefore
the same in every batch, on every rank and after a restart.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

# splitmix64: Steele, Lea & Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014. The constants are
# signed because torch has no arithmetic for uint64; products and sums wrap to the same bits.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


@dataclass(frozen=True)
class Draw:
    """The parameters of sampling one response."""

    response_key: int
    """The name of the response, from `response_key`."""
    temperature: float
    """Divides the logits; 0 takes the most probable token."""
    top_p: float = 1.0
    """Draw among the most probable tokens that hold this mass; 1 among all."""
    num_alternatives: int = 0
    """The number of most probable tokens to return beside the drawn one."""


def response_key(seed: int, step: int, prompt_key: str, sample_index: int) -> int:
    """Return 64 bits (signed) that name one response.

    Args:
        step: the number of steps that are done. Not of updates: where a step has none, as no response of it teaches,
            its prompts would get the same responses again, and the run would never leave that state.
    """
    name = f"{seed}|{step}|{sample_index}|{prompt_key}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little", signed=True)


def uniforms(response_keys_R: torch.Tensor, positions_R: torch.Tensor) -> torch.Tensor:
    """Compute one number in [0, 1) for each response at its position.

    Args:
        response_keys_R: int64 [R], from `response_key`.
        positions_R: int64 [R]: the number of tokens before the drawn one, prompt included.

    Returns:
        float64 [R].
    """
    state = response_keys_R + (positions_R + 1) * _GAMMA
    state = (state ^ _shift_right(state, 30)) * _MIX_1
    state = (state ^ _shift_right(state, 27)) * _MIX_2
    state = state ^ _shift_right(state, 31)
    # 53 bits are what a float64 in [0, 1) can hold evenly.
    return _shift_right(state, 11).double() * 2.0**-53


def draw(
    logits_RV: torch.Tensor,
    uniforms_R: torch.Tensor,
    *,
    temperatures_R: torch.Tensor,
    top_ps_R: torch.Tensor,
    vocab_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a token for each row by inverting the cumulative distribution.

    Args:
        logits_RV: [R, padded vocabulary], any float dtype.
        uniforms_R: float64 [R] in [0, 1).
        temperatures_R: float32 [R], on the host: divide the logits; 0 takes the most probable token.
        top_ps_R: float32 [R], on the host: draw among the most probable tokens that hold this mass; 1 among all.
        vocab_size: ids from here on are padding and never drawn.

    Returns:
        Token ids, int64 [R], and the log-probs of all tokens, float32 [R, vocab_size], under
        softmax(logits / temperature). Top-p does not change the log-probs; at temperature 0 they are those of 1.
    """
    logits_RV = logits_RV[:, :vocab_size].float()
    is_any_sampled, is_any_cut = bool((temperatures_R > 0).any()), bool((top_ps_R < 1).any())
    temperatures_R, top_ps_R = temperatures_R.to(logits_RV.device), top_ps_R.to(logits_RV.device)
    is_sampled_R = temperatures_R > 0
    log_probs_RV = torch.log_softmax(logits_RV / temperatures_R.where(is_sampled_R, 1.0).unsqueeze(1), dim=-1)
    best_R = logits_RV.argmax(dim=-1)
    if not is_any_sampled:
        return best_R, log_probs_RV
    probs_RV = log_probs_RV.exp()
    if is_any_cut:
        # Rows with top-p 1 keep their bits: a response must not depend on the other rows of its batch.
        probs_RV = _nucleus(probs_RV, top_ps_R).where((top_ps_R < 1).unsqueeze(1), probs_RV)
    # In float64: with a large vocabulary, the error of a cumulative sum in float32 exceeds the smallest probabilities.
    cumulative_RV = probs_RV.cumsum(dim=-1, dtype=torch.float64)
    # The sum is not exactly 1, and after top-p far from it, so the uniform number is scaled to it.
    threshold_R = uniforms_R * cumulative_RV[:, -1]
    tokens_R = torch.searchsorted(cumulative_RV, threshold_R.unsqueeze(1), right=True).squeeze(1)
    return tokens_R.clamp(max=vocab_size - 1).where(is_sampled_R, best_R), log_probs_RV


def _nucleus(probs_RV: torch.Tensor, top_ps_R: torch.Tensor) -> torch.Tensor:
    """Zero all but the smallest set of most probable tokens whose mass reaches `top_ps_R`."""
    ordered_RV, order_RV = probs_RV.sort(dim=-1, descending=True, stable=True)
    # The mass before a token, so that the token that crosses the limit is kept, and the first one always is.
    mass_before_RV = ordered_RV.cumsum(dim=-1) - ordered_RV
    kept_RV = ordered_RV.where(mass_before_RV < top_ps_R.unsqueeze(1), 0.0)
    return torch.zeros_like(probs_RV).scatter(1, order_RV, kept_RV)


def _shift_right(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift to the right as an unsigned number."""
    # torch shifts int64 arithmetically: it fills with the sign bit, which the mask clears.
    return (value >> bits) & ((1 << (64 - bits)) - 1)
