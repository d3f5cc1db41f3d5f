import json
import random

import pytest
from PIL import Image

from examples.digits import source
from examples.real_weights import make_data, questions
from megatron_r1v2.data.images import tile_image
from megatron_r1v2.data.rows import read_rows
from megatron_r1v2.rewards.answer import answer_is_correct

COUNTS = {"align": 48, "grpo": 26, "heldout": 24}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "data"
    make_data.make_data(folder, seed=1, counts=COUNTS, tile=28)
    return folder


def rows(data, name):
    return [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", COUNTS)
def test_a_set_is_half_photographs_of_each_thing_equally_often_and_half_digits(data, name):
    found = rows(data, name)
    assert len(found) == COUNTS[name]
    kinds = [row["metadata"]["kind"] for row in found]
    assert kinds.count("photograph") == kinds.count("digit")
    seen = [row["answer"] for row in found if row["metadata"]["kind"] == "photograph"]
    counts = [seen.count(answer) for answer in make_data.PHOTOGRAPHS]
    assert sum(counts) == len(seen)
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("name", COUNTS)
def test_every_row_is_a_sample_whose_own_response_is_right_and_whose_picture_is_one_tile(data, name):
    samples = list(read_rows(data / f"{name}.jsonl", data / "images"))
    assert len(samples) == COUNTS[name]
    for sample in samples:
        assert answer_is_correct(sample.response, sample.answer, sample.answer_type)
        assert not answer_is_correct("\\boxed{nothing}", sample.answer, sample.answer_type)
    picture = Image.open(next((data / "images").glob(f"{name}-*.png")))
    assert tile_image(picture, tile_size=28, max_tiles=1).shape == (1, 3, 28, 28)


def test_heldout_handwriting_is_in_no_other_set(data):
    origins = {
        name: {row["source"] for row in rows(data, name) if row["metadata"]["kind"] == "digit"} for name in COUNTS
    }
    assert origins["heldout"].isdisjoint(origins["align"] | origins["grpo"])
    heldout = {f"load_digits {index}" for index in source.split_indices()["heldout"]}
    assert origins["heldout"] <= heldout


@pytest.mark.parametrize("size", [(600, 400), (384, 191), (1411, 1411), (101, 99)])
def test_heldout_crops_touch_nothing_that_is_learned_from(size):
    """Every pixel says which part it is in."""
    width, height = size
    photograph = Image.new("L", size, 0)
    border = int(make_data.LEARNED_PART * width)
    photograph.paste(255, (border, 0, width, height))
    rng = random.Random(0)
    for _ in range(50):
        for heldout, shade in ((False, 0), (True, 255)):
            picture = make_data.crop(photograph, heldout=heldout, rng=rng)
            assert picture.width == picture.height > 0.2 * min(size)
            assert picture.getextrema() == (shade, shade)


def test_a_seed_decides_everything(data, tmp_path):
    for seed, same in ((1, True), (2, False)):
        make_data.make_data(tmp_path / str(seed), seed=seed, counts=COUNTS, tile=28)
        for name in ("align.jsonl", "images/align-000000.png"):
            assert ((tmp_path / str(seed) / name).read_bytes() == (data / name).read_bytes()) == same


def test_every_photograph_is_there():
    assert len(set(make_data.PHOTOGRAPHS.values())) == len(make_data.PHOTOGRAPHS) >= 10
    kinds = [each[0] for each in make_data.pictures("align", 2 * len(make_data.PHOTOGRAPHS), random.Random(0))]
    assert set(kinds) == questions.PHRASES.keys() == questions.ANSWER_TYPES.keys()
