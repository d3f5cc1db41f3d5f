"""Rows of full length, and folders of models whose weights are not here."""

import json
from pathlib import Path

import pytest

from megatron_r1v2.checkpoint.hf.config import read_hf_architecture, read_hf_config
from megatron_r1v2.checkpoint.hf.folders import SafetensorsFolder
from megatron_r1v2.checkpoint.hf.mapping import canonical_hf_name
from megatron_r1v2.config.schema import DataConfig
from megatron_r1v2.data.prompts import PromptBuilder
from megatron_r1v2.data.stream import read_shards
from megatron_r1v2.data.tokenizer import ChatTokenizer
from megatron_r1v2.rehearsal.rows import LONG, RowWriter, fill_up, write_model_folder
from tests.tiny_hf import tiny_hf_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_hf_model(folder, "6b")
    return folder


def test_rows_are_as_long_as_the_limits(model, tmp_path):
    tokenizer, settings = ChatTokenizer(model), DataConfig(max_prompt_tokens=160, max_tiles=4)
    writer = RowWriter(tokenizer, settings, 32, 16, max_response_tokens=50, end_token="<|im_end|>")
    writer.write(tmp_path / "rows", long=2, short=1)
    builder = PromptBuilder(settings=settings, tokenizer=tokenizer, tile_size=32, tokens_per_tile=16)
    first, second, short = read_shards(tmp_path / "rows", builder.build)
    assert LONG in first.key
    assert len(first.token_ids) == len(second.token_ids) == 160
    assert first.tiles_TCHW.shape[0] == 5, "four tiles and a thumbnail"
    for text in (first.response, first.preference.chosen, first.preference.rejected):
        assert 49 <= len(tokenizer.encode_response(text, "<|im_end|>")) <= 50
    assert short.modality == "text"
    assert len(short.token_ids) < 60


@pytest.mark.parametrize(("per_word", "limit"), [(1, 10), (2, 10), (2, 11), (3, 100)])
def test_filling_never_exceeds_the_limit(per_word, limit):
    def length(text):
        return 4 + per_word * text.count(" a") + text.count("!")

    assert limit - per_word < length(fill_up(length, limit)) <= limit


def test_a_prompt_that_holds_no_image_is_refused(model, tmp_path):
    writer = RowWriter(ChatTokenizer(model), DataConfig(max_prompt_tokens=10), 32, 16, 50, "<|im_end|>")
    with pytest.raises(ValueError, match=r"data.max_prompt_tokens=10 holds no image"):
        writer.write(tmp_path / "rows", long=1, short=0)


def test_a_made_folder_has_the_headers_of_the_model_and_takes_no_room(model, tmp_path):
    config, _ = read_hf_config(model)
    # Far enough from the bytes of the made tokenizer.
    config = json.loads(json.dumps(config)) | {"image_token_id": 299}
    write_model_folder(tmp_path / "made", config, None)
    architecture, layout = read_hf_architecture(tmp_path / "made")
    assert layout == "transformers"
    assert architecture.language == read_hf_architecture(model)[0].language
    with SafetensorsFolder(tmp_path / "made") as made, SafetensorsFolder(model) as real:
        # transformers saves other names than the model has inside, and loads both.
        of_made = {canonical_hf_name(name): made.info(name).shape for name in made.names()}
        assert of_made == {name: real.info(name).shape for name in real.names()}
    used = sum(path.stat().st_blocks * 512 for path in Path(tmp_path / "made").glob("*.safetensors"))
    assert used < 100_000
    tokenizer = ChatTokenizer(tmp_path / "made")
    assert tokenizer.image_token_id == 299
    assert tokenizer.decode(tokenizer.encode_text("left 3 \\boxed{8}")) == "left 3 \\boxed{8}"


def test_a_tokenizer_beside_is_taken(model, tmp_path):
    config, _ = read_hf_config(model)
    write_model_folder(tmp_path / "made", config, model)
    assert ChatTokenizer(tmp_path / "made").is_same_as(ChatTokenizer(model))
