import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from examples.digits import make_data, questions, source
from megatron_r1v2.data.images import tile_image
from megatron_r1v2.data.rows import read_rows
from megatron_r1v2.rewards.claims import find_claims, judge_claims
from megatron_r1v2.rewards.format import format_score

COUNTS = {"align": 24, "prefer": 24, "grpo": 24, "validation": 24, "heldout": 24, "text": 8}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "data"
    make_data.make_data(folder, seed=7, counts=COUNTS)
    return folder


def rows_of(data: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]


def test_each_source_digit_is_in_exactly_one_split():
    splits = source.split_indices()
    together = np.concatenate(list(splits.values()))
    assert sorted(together) == list(range(1797))
    for name, fraction in source.SPLITS.items():
        assert len(splits[name]) == pytest.approx(1797 * fraction, rel=0.02)


def test_each_split_has_every_digit_in_the_same_proportion():
    _, labels = source.digit_tiles()
    for indices in source.split_indices().values():
        counts = np.bincount(labels[indices], minlength=10)
        assert counts.min() > 0.9 * counts.max() - 2


def test_handwriting_of_heldout_and_validation_is_in_no_other_set(data):
    used = {
        name: {int(index) for row in rows_of(data, name) for index in row["source"].split()[1:]}
        for name in make_data.HANDWRITING
    }
    training = used["align"] | used["prefer"] | used["grpo"]
    assert not used["heldout"] & (training | used["validation"])
    assert not used["validation"] & training


def test_images_show_the_digits_that_the_facts_name(data):
    tiles, labels = source.digit_tiles()
    for row in rows_of(data, "heldout"):
        left, right = (int(index) for index in row["source"].split()[1:])
        assert row["facts"] == {"left": str(labels[left]), "right": str(labels[right])}
        pixels = np.asarray(Image.open(data / "images" / row["images"][0]))
        assert pixels.shape == (32, 64, 3)
        assert (pixels == np.concatenate([tiles[left], tiles[right]], 1)[..., None]).all()


def test_an_image_is_cut_into_its_two_tiles_and_the_thumbnail_that_the_tower_was_trained_on(data):
    tiles, _ = source.digit_tiles()
    row = rows_of(data, "align")[0]
    left, right = (tiles[int(index)] for index in row["source"].split()[1:])
    cut = tile_image(Image.open(data / "images" / row["images"][0]), tile_size=32, max_tiles=12)
    cut = np.asarray(cut)
    assert cut.shape == (3, 3, 32, 32)
    for tile, wanted in zip(cut, (left, right, source.thumbnail(left, right)), strict=True):
        assert (tile == wanted).all()


def test_reference_responses_are_right_well_formed_and_true(data):
    for row in rows_of(data, "align") + rows_of(data, "text"):
        assert format_score(row["response"]) == 1.0
        assert row["response"].endswith(f"\\boxed{{{row['answer']}}}")
        claims = find_claims(row["response"], questions.CLAIM_PATTERN)
        assert [name for name, _ in claims] == ["left", "right"]
        verdicts = judge_claims(claims, row["facts"])
        assert verdicts == ((True, True) if row["images"] else (None, None))


def test_every_set_is_accepted_by_prepare(data):
    for name, count in COUNTS.items():
        assert len(list(read_rows(data / f"{name}.jsonl", data / "images"))) == count


def test_the_same_seed_makes_the_same_data_and_another_seed_does_not(tmp_path, data):
    for seed in (7, 8):
        make_data.make_data(tmp_path / str(seed), seed=seed, counts={"grpo": 24})
    assert rows_of(tmp_path / "7", "grpo") == rows_of(data, "grpo")
    assert rows_of(tmp_path / "8", "grpo") != rows_of(data, "grpo")


@given(st.integers(0, 9), st.integers(0, 9), st.integers())
def test_the_answer_is_the_value_of_the_expression_in_the_response(left, right, seed):
    problem = questions.make_problem(left, right, random.Random(seed))
    expression, value = problem.response.split(", ")[2].split("</think>")[0].rsplit("=", 1)
    assert str(eval(expression)) == value == problem.answer
    assert problem.question in questions.PHRASES[problem.operation]


@given(st.integers(0, 9), st.integers(0, 9), st.integers(), st.floats(0, 1), st.floats(0, 1))
def test_a_note_has_as_many_words_as_an_image_has_tokens(left, right, seed, filler, wrong):
    note = questions.make_note(left, right, random.Random(seed), filler=filler, wrong=wrong)
    start, *words, end = note.split(" ")
    assert (start, end, len(words)) == ("note", "end", 48)


def test_a_clear_note_names_the_left_digit_then_the_right_one_then_both():
    words = questions.make_note(3, 5, random.Random(0), filler=0, wrong=0).split(" ")[1:-1]
    assert words[:16] == ["three"] * 16
    assert words[16:32] == ["five"] * 16
    assert words[32:] == ["three", "three", "five", "five"] * 4
