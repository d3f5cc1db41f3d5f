"""Recipes: what is read, what is refused, and what the refusal says."""

import dataclasses

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1v2.config.load import load_recipe, recipe_yaml, settings_of
from megatron_r1v2.config.schema import Part, Recompute, RunRecipe


def write(folder, text, name="recipe.yaml"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_an_empty_recipe_is_all_defaults(tmp_path):
    assert load_recipe(write(tmp_path, "")) == RunRecipe()


def test_values_reach_their_settings_with_the_right_types(tmp_path):
    recipe = load_recipe(
        write(
            tmp_path,
            "run: {name: digits}\n"
            "train: {parts: [vision, adapter], learning_rate: 3e-4, recompute: full, steps: 7}\n"
            "model: {transformer_config: {attention_dropout: 0.1, moe: {experts: 2}}}\n"
            "generation: {stop_tokens: ['</s>'], temperature: 2}\n",
        )
    )
    assert recipe.run.name == "digits"
    assert recipe.train.parts == [Part.vision, Part.adapter]
    assert recipe.train.recompute is Recompute.full
    assert (recipe.train.learning_rate, recipe.train.steps) == (3e-4, 7)
    assert recipe.generation.temperature == 2.0
    assert isinstance(recipe.generation.temperature, float)
    assert recipe.generation.stop_tokens == ["</s>"]
    assert recipe.model.transformer_config == {"attention_dropout": 0.1, "moe": {"experts": 2}}
    assert dataclasses.replace(recipe.buffer) == RunRecipe().buffer


def test_overrides_win_and_text_is_taken_as_it_stands(tmp_path):
    recipe = load_recipe(
        write(tmp_path, "train: {steps: 5, parts: [adapter]}\nmodel: {transformer_config: {a: 1}}\n"),
        [
            "train.steps=9",
            "train.parts=[language, adapter]",
            "buffer.enabled=false",
            "run.name=2024",
            r"reward.claim_pattern=(?P<name>left|right)[: =]+(?P<value>\d)",
            "model.transformer_config.b=[1, 2]",
        ],
    )
    assert recipe.train.steps == 9
    assert recipe.train.parts == [Part.language, Part.adapter]
    assert recipe.buffer.enabled is False
    assert recipe.run.name == "2024"
    assert recipe.reward.claim_pattern == r"(?P<name>left|right)[: =]+(?P<value>\d)"
    assert recipe.model.transformer_config == {"a": 1, "b": [1, 2]}


def test_a_recipe_may_start_from_another(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path, "train: {steps: 5, warmup_steps: 2}\nrun: {name: base}\n", "base.yaml")
    variant = write(tmp_path, "defaults: ../base.yaml\ntrain: {steps: 8}\n", "sub/variant.yaml")
    recipe = load_recipe(variant)
    assert (recipe.train.steps, recipe.train.warmup_steps, recipe.run.name) == (8, 2, "base")


def test_recipes_that_start_from_each_other_are_refused(tmp_path):
    write(tmp_path, "defaults: b.yaml\n", "a.yaml")
    with pytest.raises(ValueError, match="leads back to this file"):
        load_recipe(write(tmp_path, "defaults: a.yaml\n", "b.yaml"))


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("train: {learning_rat: 1}", [], r"unknown setting 'train.learning_rat'; did you mean 'learning_rate'\?"),
        ("trian: {steps: 1}", [], r"unknown setting 'trian'; did you mean 'train'\?"),
        ("learning_rate: 1", [], r"unknown setting 'learning_rate'; did you mean 'train.learning_rate'\?"),
        ("buffer: {zzz: 1}", [], "unknown setting 'buffer.zzz'; accepted: enabled, capacity"),
        ("train: 5", [], r"train=5 is a section; it needs settings below it: parts, steps"),
        ("train: {steps: many}", [], r"train.steps='many' is not accepted; expected a whole number"),
        ("train: {steps: 2.5}", [], r"train.steps=2.5 is not accepted; expected a whole number"),
        ("train: {steps: true}", [], r"train.steps is true; expected a whole number"),
        ("train: {steps: }", [], r"train.steps is nothing; expected a whole number"),
        ("buffer: {enabled: maybe}", [], r"buffer.enabled='maybe' is not accepted; expected true or false"),
        ("model: {layers: fast}", [], r"model.layers='fast' is not accepted; expected one of local, te"),
        ("train: {parts: [head]}", [], r"train.parts=\['head'\] is not accepted; expected a list, each one of vision"),
        ("train: {parts: adapter}", [], r"train.parts='adapter' is not accepted; expected a list"),
        ("train: {steps: 1", [], "is not valid YAML"),
        ("train: {steps: 1, steps: 2}", [], "is not valid YAML.*duplicate key"),
        ("- 1", [], "must map section names to settings"),
        ("run: {name: '${nowhere.at.all}'}", [], "nowhere"),
        ("", ["train.steps"], "override 'train.steps' is not understood; write section.key=value"),
        ("", ["steps=3"], "override 'steps=3' is not understood"),
        ("", ["train.steps=[1"], "the value is not valid YAML"),
        ("", ["train.stepz=3"], r"unknown setting 'train.stepz'; did you mean 'steps'\?"),
        ("", ["train.steps.more=3"], "train.steps={'more': 3} is not accepted"),
        ("", ["train.steps=0"], "train.steps=0 is out of range; accepted: 1 or more"),
    ],
)
def test_bad_input_is_refused_by_name(tmp_path, text, overrides, message):
    with pytest.raises(ValueError, match="(?s)" + message):
        load_recipe(write(tmp_path, text), overrides)


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(ValueError, match="'.*none.yaml' is not a file"):
        load_recipe(tmp_path / "none.yaml")


def test_what_is_saved_is_read_back(tmp_path):
    recipe = load_recipe(
        write(tmp_path, "model: {transformer_config: {x: [1]}}\n"),
        ["train.parts=[vision]", "train.learning_rate=1e-7", r"reward.claim_pattern=(?P<name>a)\s: #(?P<value>b)$"],
    )
    (tmp_path / "saved.yaml").write_text(recipe_yaml(recipe))
    assert load_recipe(tmp_path / "saved.yaml") == recipe


SETTINGS = [f"{name}.{key}" for name, kind in settings_of(RunRecipe).items() for key in settings_of(kind)]


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from([*SETTINGS, "train.oops", "nothing"]),
    value=st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 3),
        st.floats(),
        st.text(max_size=4),
        st.lists(st.integers(), max_size=2),
    ),
)
def test_any_value_gives_a_recipe_or_a_value_error_that_names_the_setting(tmp_path_factory, name, value):
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    section, _, key = name.partition(".")
    path.write_text(yaml.safe_dump({section: {key: value} if key else value}), encoding="utf-8")
    refusal = None
    try:
        load_recipe(path)
    except ValueError as error:
        refusal = str(error)
    assert refusal is None or key in refusal
