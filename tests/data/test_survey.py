"""Long prompts and think tags found by the texts and the heads of images, before anything is trained."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_r1v2.config.choices import StageName
from megatron_r1v2.config.schema import DataConfig
from megatron_r1v2.data.prompts import PromptBuilder
from megatron_r1v2.data.samples import ShardSample
from megatron_r1v2.data.shards import write_shards
from megatron_r1v2.data.stream import read_shards
from megatron_r1v2.data.survey import GIVEN_FIELDS, DataSurvey, GivenResponses, survey_data
from megatron_r1v2.data.tokenizer import ChatTokenizer
from tests.tiny import tiny_png, tiny_sample, tiny_tokenizer

LONG = ({"role": "user", "content": "<image>\n" + "left + right? " * 40},)
LIMIT = 120
END = "<|im_end|>"


def samples() -> list[ShardSample]:
    """Return samples of which 3 and 7 have a long text, and 5 an image of many tiles."""
    changes = {
        3: {"messages": LONG},
        7: {"messages": LONG},
        5: {"images": {"0.png": tiny_png(5, width=384, height=32)}},
    }
    return [tiny_sample(number, **changes.get(number, {})) for number in range(9)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(samples(), tmp_path / "data", 2)
    return tmp_path / "data"


def builder(tmp_path: Path, **settings: object) -> tuple[PromptBuilder, DataConfig]:
    config = DataConfig(max_prompt_tokens=LIMIT, **settings)
    tokenizer = ChatTokenizer(tiny_tokenizer(tmp_path / "tokenizer"))
    return PromptBuilder(settings=config, tokenizer=tokenizer, tile_size=32, tokens_per_tile=10), config


def find(folder: Path, tmp_path: Path, *, parts: int = 1, **settings: object) -> DataSurvey:
    made, config = builder(tmp_path, **settings)
    return sum((survey_data(folder, made, config, part=n, parts=parts) for n in range(parts)), DataSurvey())


@pytest.mark.parametrize("parts", [1, 3])
def test_what_is_found_is_what_the_reader_leaves_out(folder: Path, tmp_path: Path, parts: int) -> None:
    found = find(folder, tmp_path, parts=parts, too_long="skip")
    assert sorted(found.too_long) == ["digits-0003", "digits-0005", "digits-0007"]
    assert found.reduced == ()
    made, _ = builder(tmp_path, too_long="skip")
    read = {prompt.key for prompt in read_shards(folder, made.build)}
    assert read == {sample.key for sample in samples()} - set(found.too_long)
    fewer = find(folder, tmp_path, parts=parts, too_long="fewer_tiles")
    assert (sorted(fewer.too_long), fewer.reduced) == (["digits-0003", "digits-0007"], ("digits-0005",))


def test_the_digest_is_that_of_the_rows_wherever_they_are(folder: Path, tmp_path: Path) -> None:
    digest = find(folder, tmp_path).digest
    assert find(folder, tmp_path, parts=3).digest == digest
    assert find(folder.rename(tmp_path / "moved"), tmp_path).digest == digest
    rows = samples()
    for name, changed in {
        "answer": replace(rows[0], answer=str(int(rows[0].answer) + 1)),
        "image": replace(rows[0], images={"0.png": tiny_png(77, width=48, height=32)}),
        "key": replace(rows[0], key="another"),
    }.items():
        write_shards([changed, *rows[1:]], tmp_path / name, 2)
        assert find(tmp_path / name, tmp_path).digest != digest, name
    assert find(tmp_path / "key", tmp_path).with_prefix("a:").digest != find(tmp_path / "key", tmp_path).digest


def test_the_sentences_count_and_name(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"sample 'digits-0003': .* 3 prompts of D are too long: digits-0003, digits-"
    ) as e:
        find(folder, tmp_path).sentences("D", DataConfig())
    assert "lower data.max_tiles, set data.too_long to skip or fewer_tiles, or take the sample out" in str(e.value)
    settings = DataConfig(max_prompt_tokens=LIMIT, too_long="skip")
    assert find(folder, tmp_path, too_long="skip").sentences("D", settings) == [
        "3 prompts of D are longer than data.max_prompt_tokens=120 and are left out: "
        "digits-0003, digits-0005, digits-0007"
    ]
    only = DataSurvey(reduced=tuple(f"k{number}" for number in range(30)))
    (line,) = only.sentences("D", DataConfig(too_long="fewer_tiles"))
    assert line.startswith("30 prompts of D")
    assert line.endswith("cut into fewer tiles: " + ", ".join(f"k{number}" for number in range(20)) + ", ...")
    assert DataSurvey().sentences("D", DataConfig()) == []


def test_only_the_heads_of_images_are_read_and_corrupt_samples_are_left_to_the_reader(
    folder: Path, tmp_path: Path
) -> None:
    expected = find(folder, tmp_path, too_long="skip")
    for shard in folder.glob("*.tar"):
        content = bytearray(shard.read_bytes())
        position = 0
        while (position := content.find(b"IDAT", position + 1)) > 0:
            content[position + 8 : position + 40] = bytes(32)
        shard.write_bytes(content)
    assert find(folder, tmp_path, too_long="skip") == expected
    shard = folder / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes().replace(b'"answer"', b'"anwser"'))
    assert "digits-0003" not in find(folder, tmp_path, too_long="skip").too_long
    shard.write_bytes(b"x" * 20_000)
    with pytest.raises(ValueError, match=r"shard-000001\.tar cannot be read"):
        find(folder, tmp_path)


def test_think_tags_that_are_given_twice_or_never_closed(tmp_path: Path) -> None:
    texts = {
        0: {"response": "left 3</think>8"},
        1: {"response": "<think>\nleft 3</think>8"},
        2: {"chosen": "a</think>b", "rejected": "<think>c</think>d"},
        3: {"chosen": "a</think>b", "rejected": "never"},
        4: {"chosen": "a</think>b", "rejected": "<think>never"},
        5: {"chosen": "a</think>b", "rejected": "never", "unclosed_think": True},
        6: {"response": "never"},
    }
    folder = tmp_path / "tags"
    write_shards([tiny_sample(number, **{"response": None, **changes}) for number, changes in texts.items()], folder, 2)
    found = find(folder, tmp_path)
    assert [sorted(key[-1] for key in keys) for keys in (found.second_think, found.unclosed)] == [
        list("124"),
        list("34"),
    ]
    settings = DataConfig()
    (line,) = found.sentences("D", settings)
    assert line == (
        "responses of 3 samples of D begin with <think>, which the chat template gives already; it is taken off: "
        "digits-0001, digits-0002, digits-0004"
    )
    with pytest.raises(ValueError, match=r"2 pairs of D have a response that never closes.*digits-0003, digits-0004"):
        found.sentences("D", settings, pairs=True)
    assert DataSurvey().sentences("D", settings, pairs=True) == []


@pytest.mark.parametrize(
    ("stage", "keys"),
    [(StageName.align, ["digits-0001"]), (StageName.mpo, ["digits-0002", "digits-0003"])],
)
@pytest.mark.parametrize("parts", [1, 2])
def test_rows_with_more_tokens_than_positions_are_refused(
    tmp_path: Path, stage: StageName, keys: list[str], parts: int
) -> None:
    short, long = "left 3</think>8", "left 3 right 4 " * 20 + "</think>8"
    texts = {
        0: {"response": short, "chosen": short, "rejected": short},
        1: {"response": long, "chosen": short, "rejected": short},
        2: {"response": short, "chosen": long, "rejected": short},
        3: {"response": short, "chosen": short, "rejected": long},
    }
    folder = tmp_path / "rows"
    write_shards([tiny_sample(number, **changes) for number, changes in texts.items()], folder, 2)
    made, config = builder(tmp_path)
    tokenizer = made.tokenizer
    prompts = {prompt.key: prompt for prompt in read_shards(folder, made.build)}
    longest = {
        key: len(prompt.token_ids) + len(tokenizer.encode_response(long, END)) for key, prompt in prompts.items()
    }

    def survey(positions: int) -> DataSurvey:
        given = GivenResponses(GIVEN_FIELDS[stage], END, positions)
        found = (survey_data(folder, made, config, given=given, part=n, parts=parts) for n in range(parts))
        return sum(found, DataSurvey())

    most = max(longest[key] for key in keys)
    assert survey(most).past_positions == {}, "as many as there are is not too many"
    found = survey(min(longest[key] for key in keys) - 1)
    assert sorted(found.past_positions) == keys
    response = longest[keys[0]] - len(prompts[keys[0]].token_ids)
    told = (
        f"sample '{keys[0]}': prompt and response have {len(prompts[keys[0]].token_ids)} + {response} = "
        f"{longest[keys[0]]} tokens, but the model has {min(longest[key] for key in keys) - 1} positions"
    )
    with pytest.raises(ValueError, match=re.escape(told)) as error:
        found.sentences("D", DataConfig(too_long="skip"))
    assert f"{len(keys)} rows of D are too long: {', '.join(keys)}" in str(error.value)
    assert found.with_prefix("a:").past_positions.keys() == {f"a:{key}" for key in keys}
    assert survey_data(folder, made, config).past_positions == {}, "a stage that samples its own responses"
