"""Tokens are drawn from the right distribution by numbers that depend on the response's name alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1v2.generation.sampling import draw, response_key, uniforms

INT64 = st.integers(-(2**63), 2**63 - 1)


def splitmix64(seed: int, steps: int) -> int:
    """Return the last of `steps` outputs, in Python's unbounded integers."""
    mask = 2**64 - 1
    z = (seed + steps * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_splitmix64_has_its_published_first_outputs():
    # Of the reference implementation (Vigna, prng.di.unimi.it/splitmix64.c) for the seed 1234567.
    assert [splitmix64(1234567, step) for step in (1, 2)] == [6457827717110365317, 3203168211198807973]


@given(key=INT64, position=st.integers(0, 100_000))
def test_uniforms_are_splitmix64(key, position):
    number = uniforms(torch.tensor([key]), torch.tensor([position])).item()
    assert number == (splitmix64(key, position + 1) >> 11) * 2.0**-53


def test_uniforms_are_uniform_over_responses_and_over_positions():
    keys = torch.tensor([response_key(1, 0, "prompt", sample) for sample in range(4000)])
    for numbers in (uniforms(keys, torch.full((4000,), 17)), uniforms(keys[:1].repeat(4000), torch.arange(4000))):
        counts = torch.histc(numbers.float(), bins=20, min=0, max=1)
        chi_square = ((counts - 200) ** 2 / 200).sum().item()
        assert chi_square < 43.8  # 0.1 % of the distribution with 19 degrees of freedom lie above


def test_every_part_of_the_name_changes_the_key():
    names = [(1, 2, "a", 3), (2, 2, "a", 3), (1, 3, "a", 3), (1, 2, "b", 3), (1, 2, "a", 4), (12, 1, "a", 3)]
    keys = [response_key(*name) for name in names]
    assert len(set(keys)) == len(keys)
    assert keys[0] == response_key(1, 2, "a", 3)


def even_numbers(count: int) -> torch.Tensor:
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def draw_alike(
    logits: torch.Tensor, numbers: torch.Tensor, *, temperature: float = 1.0, top_p: float = 1.0, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw all rows in one way; returns the tokens and their log-probs."""
    tokens, log_probs = draw(
        logits,
        numbers,
        temperatures_R=torch.full((len(logits),), temperature),
        top_ps_R=torch.full((len(logits),), top_p),
        vocab_size=vocab_size,
    )
    assert log_probs.shape == (len(logits), vocab_size)
    return tokens, log_probs.gather(1, tokens[:, None])[:, 0]


def frequencies(logits: torch.Tensor, **arguments) -> torch.Tensor:
    count = 20_000
    tokens, _ = draw_alike(logits.expand(count, -1), even_numbers(count), **arguments)
    return torch.bincount(tokens, minlength=logits.shape[0]) / count


@pytest.mark.parametrize("temperature", [0.25, 1.0, 2.0])
def test_frequencies_are_the_tempered_softmax_and_padding_is_never_drawn(temperature):
    logits = torch.tensor([1.0, -1.0, 0.3, 2.0, 50.0])
    results = frequencies(logits, temperature=temperature, top_p=1.0, vocab_size=4)
    expected = torch.softmax(logits[:4] / temperature, dim=0)
    torch.testing.assert_close(results, torch.cat([expected, torch.zeros(1)]), atol=2e-4, rtol=0)


def test_top_p_keeps_the_smallest_set_with_the_mass():
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    results = frequencies(logits, temperature=1.0, top_p=0.7, vocab_size=4)
    torch.testing.assert_close(results, torch.tensor([0.0, 2 / 3, 0.0, 1 / 3]), atol=2e-4, rtol=0)
    only_best = frequencies(logits, temperature=1.0, top_p=0.3, vocab_size=4)
    assert only_best.tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_log_probs_are_those_of_the_whole_tempered_distribution(top_p):
    logits = torch.randn(64, 9, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    tokens, log_probs = draw_alike(logits, even_numbers(64), temperature=0.25, top_p=top_p, vocab_size=7)
    expected = torch.log_softmax(logits[:, :7].float() / 0.25, dim=1)[torch.arange(64), tokens]
    torch.testing.assert_close(log_probs, expected)
    assert log_probs.dtype == torch.float32


def test_temperature_zero_takes_the_most_probable_token():
    logits = torch.tensor([[0.0, 3.0, 9.0], [2.0, 1.0, 9.0]])
    tokens, log_probs = draw_alike(
        logits, torch.tensor([0.99, 0.99]).double(), temperature=0.0, top_p=1.0, vocab_size=2
    )
    assert tokens.tolist() == [1, 0]
    torch.testing.assert_close(log_probs, torch.log_softmax(logits[:, :2], dim=1).amax(dim=1))


def test_the_ends_of_the_unit_interval_give_tokens_of_positive_probability():
    logits = torch.tensor([[-200.0, 0.0, 0.0, -200.0]]).expand(2, -1)
    numbers = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    tokens, _ = draw_alike(logits, numbers, temperature=1.0, top_p=1.0, vocab_size=4)
    assert tokens.tolist() == [1, 2]


def test_each_row_is_drawn_in_its_own_way_as_if_it_were_alone():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(60, 50, generator=generator) * 3
    numbers = torch.rand(60, generator=generator, dtype=torch.float64)
    temperatures = torch.tensor([0.0, 0.3, 1.0, 1.0, 2.0]).repeat(12)
    top_ps = torch.tensor([1.0, 0.5, 1.0, 0.9, 1e-6]).repeat(12)
    tokens, log_probs = draw(logits, numbers, temperatures_R=temperatures, top_ps_R=top_ps, vocab_size=48)
    for row in range(60):
        alone = draw_alike(
            logits[row : row + 1],
            numbers[row : row + 1],
            temperature=temperatures[row].item(),
            top_p=top_ps[row].item(),
            vocab_size=48,
        )
        assert tokens[row] == alone[0][0]
        assert log_probs[row, tokens[row]] == alone[1][0]
    assert (tokens[::5] == logits[::5, :48].argmax(dim=1)).all()
    assert (tokens[4::5] == logits[4::5, :48].argmax(dim=1)).all()
    assert (tokens[2::5] != logits[2::5, :48].argmax(dim=1)).any()


def test_a_row_that_is_not_cut_stays_so_beside_one_that_is():
    """Sums of float32 reach 1 before the last tokens: a nucleus of 1 would drop them."""
    logits = torch.randn(4000, 400, generator=torch.Generator().manual_seed(2)) * 8
    numbers = torch.full((4000,), 1 - 2.0**-53, dtype=torch.float64)
    arguments = {"temperatures_R": torch.ones(4000), "vocab_size": 400}
    expected, _ = draw(logits, numbers, top_ps_R=torch.ones(4000), **arguments)
    results, _ = draw(logits, numbers, top_ps_R=torch.tensor([0.5] + [1.0] * 3999), **arguments)
    assert results[1:].equal(expected[1:])
