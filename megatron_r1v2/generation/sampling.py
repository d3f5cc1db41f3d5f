"""Draws tokens so that a response depends on nothing but the weights and its own name.

The uniform number of each token is a hash of (seed, policy version, prompt key, sample index, position), so a response
is the same whatever else is in the batch, whichever rank generates it, and after a restart.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

# splitmix64: Steele, Lea & Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, as signed 64 bits.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


@dataclass(frozen=True)
class Draw:
    """How the tokens of one response are drawn."""

    response_key: int
    """From `response_key`: names the response."""
    temperature: float
    """Divides the logits; 0 takes the most probable token."""
    top_p: float = 1.0
    """Draw among the most probable tokens that hold this mass; 1 among all."""
    num_alternatives: int = 0
    """How many of the most probable tokens are told beside the drawn one."""


def response_key(seed: int, policy_version: int, prompt_key: str, sample_index: int) -> int:
    """Return 64 bits (signed) that name one response.

    Args:
        seed: of the run or the evaluation.
        policy_version: optimizer steps behind the weights.
        prompt_key: `Prompt.key`.
        sample_index: which of the responses to this prompt.
    """
    name = f"{seed}|{policy_version}|{sample_index}|{prompt_key}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little", signed=True)


def uniforms(response_keys_R: torch.Tensor, positions_R: torch.Tensor) -> torch.Tensor:
    """Return one number in [0, 1) for each response at its position.

    Args:
        response_keys_R: int64 [R], from `response_key`.
        positions_R: int64 [R]: tokens before the drawn one, the prompt's included.

    Returns:
        float64 [R].
    """
    state = response_keys_R + (positions_R + 1) * _GAMMA
    state = (state ^ _shift_right(state, 30)) * _MIX_1
    state = (state ^ _shift_right(state, 27)) * _MIX_2
    state = state ^ _shift_right(state, 31)
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
        temperatures_R: float32 [R]: divide the logits; 0 takes the most probable token.
        top_ps_R: float32 [R]: draw among the most probable tokens that hold this mass; 1 among all.
        vocab_size: ids from here on are padding and never drawn.

    Returns:
        Token ids, int64 [R], and the log-probs of all tokens, float32 [R, vocab_size], under
        softmax(logits / temperature) (top-p is not in them; at temperature 0 they are those of temperature 1).
    """
    logits_RV = logits_RV[:, :vocab_size].float()
    is_sampled_R = temperatures_R > 0
    log_probs_RV = torch.log_softmax(logits_RV / temperatures_R.where(is_sampled_R, 1.0).unsqueeze(1), dim=-1)
    best_R = logits_RV.argmax(dim=-1)
    if not is_sampled_R.any():
        return best_R, log_probs_RV
    probs_RV = log_probs_RV.exp()
    is_cut_R = top_ps_R < 1
    if is_cut_R.any():
        # A row that is not cut stays as it is to the bit: a response does not depend on its batch.
        probs_RV = _nucleus(probs_RV, top_ps_R).where(is_cut_R.unsqueeze(1), probs_RV)
    cumulative_RV = probs_RV.cumsum(dim=-1, dtype=torch.float64)
    threshold_R = uniforms_R * cumulative_RV[:, -1]
    tokens_R = torch.searchsorted(cumulative_RV, threshold_R.unsqueeze(1), right=True).squeeze(1)
    return tokens_R.clamp(max=vocab_size - 1).where(is_sampled_R, best_R), log_probs_RV


def _nucleus(probs_RV: torch.Tensor, top_ps_R: torch.Tensor) -> torch.Tensor:
    """Zero all but the smallest set of most probable tokens whose mass reaches `top_ps_R`."""
    ordered_RV, order_RV = probs_RV.sort(dim=-1, descending=True, stable=True)
    mass_before_RV = ordered_RV.cumsum(dim=-1) - ordered_RV
    kept_RV = ordered_RV.where(mass_before_RV < top_ps_R.unsqueeze(1), 0.0)
    return torch.zeros_like(probs_RV).scatter(1, order_RV, kept_RV)


def _shift_right(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift as an unsigned number."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
