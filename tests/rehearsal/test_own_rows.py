"""The recipe's own rows: measured against the limits, the longest ones taken."""

import io

import pytest
from PIL import Image

from megatron_r1v2.config.choices import StageName, TooLong
from megatron_r1v2.config.schema import DataConfig
from megatron_r1v2.data.prompts import PromptBuilder
from megatron_r1v2.data.samples import ShardSample
from megatron_r1v2.data.shards import write_shards
from megatron_r1v2.data.stream import read_shards
from megatron_r1v2.data.tokenizer import ChatTokenizer
from megatron_r1v2.rehearsal.own_rows import DataLengths, NemoRows, OwnRows, check_lengths, read_sample
from megatron_r1v2.rehearsal.rows import LONG
from megatron_r1v2.types import DataEndsRunError
from tests.rehearsal.tiny_rehearsal import tiny_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return ChatTokenizer(tiny_model(tmp_path_factory.mktemp("model") / "model"))


def png(width=32):
    encoded = io.BytesIO()
    Image.new("RGB", (width, 32)).save(encoded, "PNG")
    return encoded.getvalue()


def sample(key, words, *, response=10, image=True, **changes):
    return ShardSample(
        key=key,
        messages=({"role": "user", "content": ("<image>\n" if image else "") + "a" * words},),
        answer="no number",
        answer_type="exact",
        images={"0.png": png()} if image else {},
        **{"chosen": "b" * response, "rejected": "c" * (response // 2), "margin": 0.1, "unclosed_think": True}
        | changes,
    )


def own_rows(tokenizer, stage=StageName.mpo, *, nemo=None, **changes):
    settings = DataConfig(max_prompt_tokens=120, max_tiles=1, **changes)
    builder = PromptBuilder(settings=settings, tokenizer=tokenizer, tile_size=32, tokens_per_tile=16)
    return OwnRows(
        stage, builder, settings, "<|im_end|>", max_positions=400, max_response_tokens=50, needs_image=True, nemo=nemo
    )


SAMPLES = [
    sample("short", 10),
    sample("prompt", 60),
    sample("response", 20, response=100),
    sample("text", 70, response=200, image=False),
]


@pytest.fixture
def folder(tmp_path):
    write_shards(SAMPLES, tmp_path / "data", samples_per_shard=2)
    return str(tmp_path / "data")


def test_the_longest_prompt_and_row_are_named_with_their_place(tokenizer, folder):
    rows = own_rows(tokenizer)
    lengths = rows.measure(folder, 2)
    assert lengths.rows == 4
    assert [row.key for row in lengths.longest] == ["response", "prompt"], "text trains nothing in the adapter"
    assert lengths.longest[0].tokens == lengths.longest[0].prompt + 101
    (sentence,) = lengths.sentences(rows.settings)
    assert f"4 rows; the longest prompt has {lengths.longest_prompt.prompt} of 120 tokens" in sentence
    assert "(shard-000000.tar: prompt)" in sentence
    assert f"the longest row {lengths.longest[0].tokens} (shard-000001.tar: response)" in sentence
    assert not lengths.mistakes
    check_lengths([lengths])


def test_sampled_responses_are_as_long_as_the_limit(tokenizer, folder):
    lengths = own_rows(tokenizer, StageName.grpo).measure(folder, 1)
    assert lengths.longest[0].tokens == lengths.longest[0].prompt + 50
    (row,) = own_rows(tokenizer).measure(folder, 1, given=False).longest
    assert row.tokens == row.prompt + 50, "a validation samples too"


@pytest.mark.parametrize("policy", [TooLong.error, TooLong.fewer_tiles])
def test_prompts_above_the_limit_are_refused_by_name(tokenizer, tmp_path, policy):
    write_shards([*SAMPLES, sample("huge", 300)], tmp_path / "data")
    rows = own_rows(tokenizer, too_long=policy)
    lengths = rows.measure(str(tmp_path / "data"), 2)
    assert lengths.left_out == []
    assert len(rows.measure(str(tmp_path / "data"), 2).sentences(rows.settings)) == 1, "nothing is left out"
    with pytest.raises(DataEndsRunError) as refused:
        check_lengths([lengths])
    count, mistake = str(refused.value).splitlines()
    assert count == f"{tmp_path / 'data'}: 1 of 5 rows are too long and would end the run"
    assert mistake.startswith("  shard-000000.tar: sample 'huge': the prompt has 3")
    assert "data.max_prompt_tokens is 120; raise it" in mistake


def test_prompts_above_the_limit_that_are_skipped_are_told(tokenizer, tmp_path):
    write_shards([*SAMPLES, sample("huge", 300)], tmp_path / "data")
    rows = own_rows(tokenizer, too_long=TooLong.skip)
    lengths = rows.measure(str(tmp_path / "data"), 2)
    assert lengths.mistakes == []
    assert (
        "1 rows are too long and are left out: shard-000000.tar: sample 'huge': the prompt has"
        in (lengths.sentences(rows.settings)[1])
    )


def test_a_row_longer_than_the_model_is_an_error(tokenizer, tmp_path):
    write_shards([*SAMPLES, sample("huge", 300), sample("endless", 10, response=500)], tmp_path / "data")
    lengths = own_rows(tokenizer, too_long=TooLong.skip).measure(str(tmp_path / "data"), 2)
    (mistake,) = lengths.mistakes
    assert "endless: prompt and response have" in mistake
    assert "the model has 400 positions" in mistake
    assert len(lengths.left_out) == 1, "which is no error"


def test_rows_that_nemo_cannot_pack_are_errors_and_those_of_a_pair_count_together(tokenizer, folder):
    prompt, chosen, rejected = 90, 30, 10
    assert NemoRows(224, 8, 0).mistake(prompt, [chosen, rejected]) is None, "120 and 104"
    assert "a sequence has 224 tokens, more than" in NemoRows(223, 8, 0).mistake(prompt, [chosen, rejected])
    assert "a sequence has 232 tokens, more than" in NemoRows(223, 8, 1).mistake(prompt, [chosen, rejected])
    (longest, *_) = own_rows(tokenizer).measure(folder, 2).longest
    together = sum(-(-(longest.prompt + each) // 8) * 8 for each in longest.responses)
    lengths = own_rows(tokenizer, nemo=NemoRows(together - 1, 8, 0)).measure(folder, 2)
    (mistake,) = lengths.mistakes
    assert mistake.startswith(f"shard-000001.tar: response: a sequence has {together} tokens, more than")
    assert "set train.packing=first_fit_decreasing" in mistake
    assert [row.key for row in lengths.longest] == ["prompt", "short"], "text is in no step"
    validated = own_rows(tokenizer, nemo=NemoRows(1, 8, 0)).measure(folder, 2, given=False)
    assert validated.mistakes == [], "what is sampled in a validation is not packed"


def test_pairs_that_never_close_their_think_would_end_the_run(tokenizer, tmp_path):
    unclosed = {"chosen": "<think>so", "rejected": "no"}
    rows = [sample("asked-for", 5, **unclosed), sample("open", 5, **unclosed, unclosed_think=False)]
    write_shards(rows, tmp_path / "data")
    lengths = own_rows(tokenizer).measure(str(tmp_path / "data"), 2)
    with pytest.raises(DataEndsRunError, match=f"1 pairs of {tmp_path / 'data'} have a response that never .*: open;"):
        check_lengths([lengths])
    assert own_rows(tokenizer, StageName.align).measure(str(tmp_path / "data"), 2).unclosed == [], "it takes no pairs"


def test_the_first_rows_of_each_data_set_are_listed_and_the_rest_counted():
    many = DataLengths("many", rows=9, mistakes=[f"row {number}" for number in range(7)])
    five = DataLengths("five", rows=9, mistakes=[f"row {number}" for number in range(5)])
    with pytest.raises(DataEndsRunError) as refused:
        check_lengths([many, DataLengths("sound", rows=9), five])
    rows = [f"  row {number}" for number in range(5)]
    assert str(refused.value).splitlines() == [
        *("many: 7 of 9 rows are too long and would end the run", *rows, "  ... and 2 more"),
        *("five: 5 of 9 rows are too long and would end the run", *rows),
    ]


@pytest.mark.parametrize("stage", [StageName.mpo, StageName.grpo])
def test_the_longest_rows_make_a_data_set_of_long_ones(tokenizer, folder, tmp_path, stage):
    rows = own_rows(tokenizer, stage)
    lengths = rows.measure(folder, 3)
    rows.write([lengths], tmp_path / "made", rows=2, steps=2)
    made = list(read_shards(tmp_path / "made", rows.builder.build))
    assert [prompt.key for prompt in made] == [f"{LONG}-{step}-{index}" for step in range(2) for index in range(2)]
    assert len(made[0].token_ids) == lengths.longest[0].prompt
    assert made[3].token_ids == made[0].token_ids, "three rows fit, so the longest comes again"
    assert (made[0].answer, made[0].answer_type) == ("8", "numeric")


def test_the_longest_rows_of_a_mixture_are_those_of_all_its_sets(tokenizer, folder, tmp_path):
    write_shards([sample("other", 20, response=80), sample("tiny", 1)], tmp_path / "more")
    rows = own_rows(tokenizer)
    measured = [rows.measure(each, 2) for each in (folder, str(tmp_path / "more"))]
    rows.write(measured, tmp_path / "made", rows=2)
    made = list(read_shards(tmp_path / "made", rows.builder.build))
    assert [len(prompt.preference.chosen) for prompt in made] == [100, 80], "one of each set"


def test_nothing_that_fits_is_an_error(tokenizer, tmp_path):
    write_shards([sample("huge", 300)], tmp_path / "data")
    rows = own_rows(tokenizer, too_long=TooLong.skip)
    lengths = rows.measure(str(tmp_path / "data"), 2)
    with pytest.raises(ValueError, match="none of 1 rows can be trained on"):
        rows.write([lengths], tmp_path / "made", rows=1)


def test_a_sample_is_read_with_its_images(folder):
    from pathlib import Path

    assert read_sample(Path(folder) / "shard-000000.tar", "prompt") == SAMPLES[1]
