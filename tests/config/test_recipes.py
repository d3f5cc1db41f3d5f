"""The settings that each stage reads, needs and refuses."""

import pytest
from pydantic import ValidationError

from megatron_r1v2.config.choices import Part, StageName
from megatron_r1v2.config.recipes import (
    STAGES,
    AlignRecipe,
    EvaluateRecipe,
    GrpoRecipe,
    MpoRecipe,
    PairsRecipe,
    RewardModelRecipe,
    ServeRecipe,
    every_section,
    stages_that_read,
)
from megatron_r1v2.config.schema import (
    EvaluationConfig,
    GenerationConfig,
    HallucinationConfig,
    PairsConfig,
    PreferenceConfig,
    RewardConfig,
    TrainConfig,
)

EVERYWHERE = {"run", "model", "parallel", "data", "generation"}
TRAINING = EVERYWHERE | {"train", "checkpoint", "evaluation", "logging"}
HELD = {
    "hallucination": HallucinationConfig(target_rate=0.2, max_margin=0.6),
    "evaluation": EvaluationConfig(every_steps=5),
    "data": {"validation": "shards"},
}
PATTERN = r"(?P<name>left) (?P<value>\d)"


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        (AlignRecipe, TRAINING | {"reward"}),
        (PairsRecipe, EVERYWHERE | {"train", "reward", "reward_model", "pairs"}),
        (MpoRecipe, TRAINING | {"reward", "preference", "loss", "hallucination"}),
        (RewardModelRecipe, TRAINING | {"reward_model"}),
        (GrpoRecipe, TRAINING | {"reward", "reward_model", "algorithm", "loss", "buffer", "hallucination"}),
        (EvaluateRecipe, EVERYWHERE | {"reward", "evaluation"}),
        (ServeRecipe, EVERYWHERE),
    ],
)
def test_a_recipe_is_made_of_the_sections_that_its_stage_reads(kind, own):
    assert set(kind.sections()) == own
    kind()  # its defaults fit together
    assert len(kind.purpose().splitlines()) > (3 if kind is not ServeRecipe else 0)
    with pytest.raises(ValidationError, match="frozen"):
        kind().run = None


def test_stages_have_their_names():
    assert list(STAGES) == list(StageName)
    assert all(kind.stage is stage and kind.title() == stage.value for stage, kind in STAGES.items())
    assert (EvaluateRecipe.title(), ServeRecipe.title()) == ("evaluate", "serve")
    assert stages_that_read("hallucination") == ["mpo", "grpo"]
    assert set(every_section()) == {section for kind in STAGES.values() for section in kind.sections()}


@pytest.mark.parametrize("kind", [AlignRecipe, PairsRecipe, MpoRecipe, RewardModelRecipe, GrpoRecipe, EvaluateRecipe])
def test_what_its_rows_need_is_said(kind):
    assert "Rows of " in kind.purpose()
    assert "messages" in kind.purpose()


def test_the_head_of_a_reward_model_trains_in_its_stage_and_nowhere_else():
    assert RewardModelRecipe().train.parts == (Part.adapter, Part.score)
    with pytest.raises(ValueError, match=r"add score, e.g. train.parts=\[adapter, score\]"):
        RewardModelRecipe(train=TrainConfig())
    with pytest.raises(ValueError, match="only the reward_model stage has a score head; take score out"):
        GrpoRecipe(train=TrainConfig(parts=(Part.adapter, Part.score)))


def test_grpo_needs_something_to_learn_from():
    nothing = {"answer_weight": 0.0, "format_weight": 0.0}
    GrpoRecipe(reward=RewardConfig(**nothing, steps_weight=0.1))
    with pytest.raises(ValueError, match="every weight in the reward section is 0 .*: nothing to learn"):
        GrpoRecipe(reward=RewardConfig(**nothing))
    with pytest.raises(ValueError, match="responses_per_prompt=1 leaves nothing to compare within a group"):
        GrpoRecipe(generation=GenerationConfig(responses_per_prompt=1))


def test_mpo_needs_a_term():
    names = ("preference_weight", "quality_weight", "generation_weight")
    for kept in names:
        MpoRecipe(preference=PreferenceConfig(**{name: 0.0 for name in names if name != kept}))
    with pytest.raises(ValueError, match="preference.generation_weight are all 0: nothing to learn"):
        MpoRecipe(preference=PreferenceConfig(**dict.fromkeys(names, 0.0)))


def test_pairs_need_something_to_compare():
    one = GenerationConfig(responses_per_prompt=1)
    with pytest.raises(ValueError, match="responses_per_prompt=1 leaves nothing to compare; pairs need"):
        PairsRecipe(generation=one)
    PairsRecipe(generation=one, pairs=PairsConfig(max_pairs_per_prompt=0))
    with pytest.raises(ValueError, match="are both 0: there would be no pairs"):
        PairsRecipe(pairs=PairsConfig(max_pairs_per_prompt=0, dropout_ntp_fraction=0.0))


def test_holding_the_hallucination_rate_needs_something_to_move():
    source = {"reward_model": {"checkpoint": "a"}}
    GrpoRecipe(**HELD, **source, reward=RewardConfig(model_weight=0.11, claim_pattern=PATTERN))
    MpoRecipe(**HELD, reward=RewardConfig(claim_pattern=PATTERN), preference=PreferenceConfig(min_margin=0.59))
    with pytest.raises(ValueError, match="lowers reward.model_weight, but it is 0; raise it"):
        GrpoRecipe(**HELD, reward=RewardConfig(claim_pattern=PATTERN))
    with pytest.raises(ValueError, match="raises preference.min_margin, but it is 0.6 and"):
        MpoRecipe(**HELD, reward=RewardConfig(claim_pattern=PATTERN), preference=PreferenceConfig(min_margin=0.6))


def test_all_that_does_not_fit_is_told_at_once():
    with pytest.raises(ValidationError) as caught:
        GrpoRecipe(train=TrainConfig(warmup_steps=200, parts=()), generation=GenerationConfig(responses_per_prompt=1))
    told = str(caught.value)
    assert "train.parts is empty" in told
    assert "train.warmup_steps=200 is more" in told
    assert "generation.responses_per_prompt=1 leaves" in told


@pytest.mark.parametrize(
    ("kind", "section", "unread"),
    [
        (AlignRecipe, "train", {"updates_per_step"}),
        (AlignRecipe, "generation", {"responses_per_prompt", "segment_tokens", "temperature"}),
        (GrpoRecipe, "generation", set()),
        (GrpoRecipe, "hallucination", {"max_margin"}),
        (PairsRecipe, "reward", {"shuffle"}),
        (EvaluateRecipe, "evaluation", {"every_steps", "stop_at_pass_at_1"}),
        (ServeRecipe, "run", {"output_dir"}),
    ],
)
def test_a_recipe_reads_some_settings_of_a_section(kind, section, unread):
    fields = kind.sections()[section].model_fields
    assert kind.settings()[section] == tuple(key for key in fields if key not in unread)


@pytest.mark.parametrize("kind", [*STAGES.values(), EvaluateRecipe, ServeRecipe])
def test_what_is_said_of_a_section_is_about_its_settings(kind):
    for name, section in kind.sections().items():
        for mark in kind.model_fields[name].metadata:
            assert mark <= set(section.model_fields), f"{kind.title()}: {name}"


def test_a_setting_is_read_by_stages_and_commands():
    assert stages_that_read("evaluation", "runs") == ["align", "mpo", "grpo", "evaluate"]
    assert stages_that_read("train", "updates_per_step") == ["grpo"]
    for name, section in every_section().items():
        assert all(stages_that_read(name, key) for key in section.model_fields), "a setting that nothing reads"
