"""The lm-eval task without lm-eval: what it reads of shards."""

import io

import pytest
from PIL import Image

from megatron_r1v2.data.samples import ShardSample
from megatron_r1v2.data.shards import write_shards
from megatron_r1v2.evaluation.lm_eval import shards
from tests.tiny import tiny_png


def sample(key, content, *, images=1, messages=()):
    return ShardSample(
        key=key,
        messages=(*messages, {"role": "user", "content": content}),
        answer="8",
        answer_type="numeric",
        images={f"{index}.png": tiny_png(index) for index in range(images)},
    )


def test_questions_and_pictures_are_those_of_the_shards(tmp_path):
    samples = [sample("one", "<image>\nHow many?"), sample("two", "<image>\n<image>\nAdd <b>.", images=2)]
    samples.append(sample("none", "What is 3 + 5?", images=0))
    write_shards(samples, tmp_path / "data", 2)
    rows = list(shards.load(shards=str(tmp_path / "data"), version=1.0)["test"])
    assert [(row["key"], row["question"], row["answer"]) for row in rows] == [
        ("one", "How many?", "8"),
        ("two", "Add <b>.", "8"),
        ("none", "What is 3 + 5?", "8"),
    ]
    assert [len(row["images"]) for row in rows] == [1, 2, 0]
    first, second = shards.images(rows[1])
    for picture, seed in ((first, 0), (second, 1)):
        expected = Image.open(io.BytesIO(tiny_png(seed))).convert("RGB")
        assert picture.tobytes() == expected.tobytes()
    assert first.tobytes() != second.tobytes()


@pytest.mark.parametrize(
    "asked",
    [sample("late", "Look: <image>"), sample("long", "<image>\nHm?", messages=({"role": "system", "content": "Be"},))],
)
def test_what_lm_eval_cannot_ask_is_refused(tmp_path, asked):
    write_shards([asked], tmp_path / "data")
    with pytest.raises(ValueError, match=f"sample '{asked.key}' has several messages, or an image behind text"):
        shards.load(shards=str(tmp_path / "data"))


def test_a_missing_folder_is_told():
    for folder in ("", "nowhere"):
        with pytest.raises(ValueError, match=f"no shards in '{folder}'; give their folder: --metadata"):
            shards.load(shards=folder)
