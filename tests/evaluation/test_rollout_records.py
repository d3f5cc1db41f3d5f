import base64
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_r1v2.evaluation.rollout_records import (
    MAX_PICTURE_SIDE,
    assemble_tiles,
    picture_base64,
    question,
    rollout_record,
    write_rollouts,
)
from megatron_r1v2.types import Prompt, Rollout, ScoredRollout


def _picture(rows, columns, side=8, seed=0):
    """Return a smooth random picture [3, rows x side, columns x side] and its tiles, the thumbnail last."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 2 * rows, 2 * columns, generator=generator) * 255
    picture = torch.nn.functional.interpolate(coarse, size=(rows * side, columns * side), mode="bilinear")[0]
    picture = picture.round().to(torch.uint8)
    tiles = [
        picture[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
        for row in range(rows)
        for column in range(columns)
    ]
    if len(tiles) > 1:
        image = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((side, side))
        tiles.append(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1))
    return picture, torch.stack(tiles)


def _prompt(tiles, content="<image>\nAdd them."):
    return Prompt(
        key="digits-1",
        messages=({"role": "system", "content": "Think."}, {"role": "user", "content": content}),
        token_ids=(1, 2),
        tiles_TCHW=tiles,
        answer="8",
        answer_type="numeric",
        facts={"left": "3", "right": "5"},
    )


def _decode(encoded):
    image = Image.open(io.BytesIO(base64.b64decode(encoded)))
    assert image.format == "PNG"
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("rows", "columns"),
    [(1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (2, 2), (2, 3), (3, 2), (1, 6), (3, 4), (4, 3), (2, 6)],
)
def test_the_picture_is_put_together_as_it_was_cut(rows, columns):
    picture, tiles = _picture(rows, columns, seed=rows)
    assert torch.equal(_decode(picture_base64(_prompt(tiles))), picture)


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 5))
def test_any_number_of_tiles_of_any_size_keeps_every_pixel(num_tiles, height, width):
    generator = torch.Generator().manual_seed(num_tiles)
    tiles = torch.randint(0, 256, (num_tiles, 3, height, width), dtype=torch.uint8, generator=generator)
    kept = tiles if num_tiles == 1 else tiles[:-1]
    assert torch.equal(assemble_tiles(tiles, one_image=True).flatten().sort().values, kept.flatten().sort().values)
    assert assemble_tiles(tiles, one_image=False).shape == (3, height, num_tiles * width)


def test_several_images_stand_side_by_side():
    _, tiles = _picture(1, 2)
    picture = _decode(picture_base64(_prompt(tiles, "<image> and <image> and <image>")))
    assert torch.equal(picture, torch.cat(list(tiles), dim=2))


def test_a_large_picture_is_shrunk_for_the_report():
    tiles = torch.zeros(7, 3, 448, 448, dtype=torch.uint8)
    picture = _decode(picture_base64(_prompt(tiles)))
    assert max(picture.shape[1:]) == MAX_PICTURE_SIDE


def test_a_text_prompt_has_no_picture():
    assert picture_base64(_prompt(torch.zeros(0, 3, 4, 4, dtype=torch.uint8))) is None


def test_the_question_is_the_last_user_message_without_image_marks():
    messages = (
        {"role": "user", "content": "<image>\nWhat?"},
        {"role": "assistant", "content": "A fox."},
        {"role": "user", "content": "<image>\n<image>\nAnd here?"},
    )
    assert question(messages) == "And here?"
    assert question(()) == ""


def test_a_record_has_the_agreed_fields_and_survives_json(tmp_path):
    _, tiles = _picture(1, 2)
    rollout = Rollout("digits-1", 3, (5, 6, 7), (0.0, 0.0, 0.0), policy_version=4, finish_reason="length")
    text = "left 3\x00, right 4, top 1\ud800</think>\\boxed{7}\n"
    claims = (("left", "3"), ("right", "4"), ("top", "1"))
    scored = ScoredRollout(rollout, text, {"answer": 0.0, "format": 1.0}, 0.2, False, claims, model_score=-7.5)
    record = rollout_record(12, _prompt(tiles), scored, advantage=-0.5)
    assert {name: value for name, value in record.items() if name != "image_png"} == {
        "step": 12,
        "prompt_key": "digits-1",
        "question": "Add them.",
        "messages": [
            {"role": "system", "content": "Think."},
            {"role": "user", "content": "<image>\nAdd them."},
        ],
        "answer": "8",
        "text": text,
        "rewards": {"answer": 0.0, "format": 1.0},
        "total": 0.2,
        "model_score": -7.5,
        "advantage": -0.5,
        "correct": False,
        "claims": [["left", "3", True], ["right", "4", False], ["top", "1", None]],
        "finish_reason": "length",
        "response_tokens": 3,
    }
    path = tmp_path / "run" / "evaluation-after.rollouts.jsonl"
    write_rollouts(path, [record, record])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [record, record]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_prompt_that_is_a_question_alone_stands_once_in_its_record():
    rollout = Rollout("digits-1", 0, (5,), (0.0,), policy_version=0, finish_reason="stop")
    scored = ScoredRollout(rollout, "8", {}, 0.0, True, (), model_score=None)
    prompt = _prompt(_picture(1, 2)[1])
    alone = replace(prompt, messages=prompt.messages[1:])
    record = rollout_record(1, alone, scored, advantage=0.0, picture=False)
    assert record["question"] == "Add them."
    assert "messages" not in record


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    write_rollouts(path, [{"step": 1}])
    with pytest.raises(ValueError, match="JSON compliant"):
        write_rollouts(path, [{"step": 2}, {"step": float("nan")}])
    assert json.loads(path.read_text()) == {"step": 1}
