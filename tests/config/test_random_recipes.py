"""Random recipes: each ends with settings or with advice, never with a traceback."""

import random

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1v2.config.choices import StageName
from megatron_r1v2.config.load import load_recipe, load_recipe_as, recipe_yaml
from megatron_r1v2.config.recipes import STAGES, EvaluateRecipe, PairsRecipe, ServeRecipe, every_section

SETTINGS = [f"{name}.{key}" for name, kind in every_section().items() for key in kind.model_fields]
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from([*SETTINGS, "train.oops", "nothing"]), value=ANYTHING)
def test_any_value_gives_a_recipe_or_a_value_error_that_names_the_setting(tmp_path_factory, name, value):
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    section, _, key = name.partition(".")
    stage = next((stage for stage, kind in STAGES.items() if section in kind.sections()), StageName.grpo)
    recipe = {"run": {"stage": stage.value}}
    recipe[section] = {**recipe.get(section, {}), key: value} if key else value
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    refusal = None
    try:
        load_recipe(path)
    except ValueError as error:
        refusal = str(error)
    assert refusal is None or (key or section) in refusal


def random_value(draw: random.Random, depth: int = 0) -> object:
    """Return something that YAML can hold, often of the right kind."""
    makers = [
        lambda: None,
        lambda: draw.random() < 0.5,
        lambda: draw.choice([0, 1, 2, -1, 7, 1000, 2**31, 10**30]),
        lambda: draw.choice([0.0, 0.5, 1.0, -0.5, 1e-6, 1e300, float("inf"), float("nan")]),
        lambda: draw.choice(
            ["", " ", "a", "grpo", "adapter", "full", "te", "(", "(?P<name>a)(?P<value>b)", "http://127.0.0.1", "\x85"]
        ),
        lambda: [random_value(draw, depth + 1) for _ in range(draw.randrange(3))],
        lambda: {draw.choice(["a", "steps", 3]): random_value(draw, depth + 1) for _ in range(draw.randrange(3))},
    ]
    return draw.choice(makers[: 5 if depth > 2 else 7])()


def random_recipe(draw: random.Random) -> object:
    """Return a recipe of a stage, some of its settings well, some badly, some misspelt, some of another stage."""
    stage = draw.choice([*StageName])
    recipe: dict = {"run": {"stage": stage.value}}
    own = [f"{section}.{key}" for section, keys in STAGES[stage].settings().items() for key in keys]
    for name in draw.sample(own if draw.random() < 0.5 else SETTINGS, draw.randrange(6)):
        section, _, key = name.partition(".")
        if draw.random() < 0.1:
            section = section[:-1]
        if draw.random() < 0.1:
            key = key[1:]
        field = every_section()[section].model_fields.get(key) if section in every_section() else None
        good = field is not None and draw.random() < 0.5
        value = field.get_default(call_default_factory=True) if good else random_value(draw)
        target = recipe.setdefault(section, {})
        if isinstance(target, dict):
            target[key] = value if not good else yaml.safe_load(yaml.safe_dump(plain(value)))
        if draw.random() < 0.05:
            recipe[section] = random_value(draw)
    if draw.random() < 0.05:
        recipe.pop("run")
    return recipe if draw.random() > 0.02 else random_value(draw)


def plain(value: object) -> object:
    return [plain(item) for item in value] if isinstance(value, tuple) else getattr(value, "value", value)


@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(5, 40))])
def test_4000_random_recipes_end_with_settings_or_with_advice(tmp_path, seed):
    draw = random.Random(seed)
    path = tmp_path / "recipe.yaml"
    accepted = 0
    for _ in range(100):
        path.write_text(yaml.safe_dump(random_recipe(draw)), encoding="utf-8")
        kinds = [None, EvaluateRecipe, ServeRecipe, PairsRecipe]
        kind = draw.choices(kinds, [7, 1, 1, 1])[0]
        overrides = [f"{draw.choice(SETTINGS)}={draw.choice(['1', 'a', '[', 'true', ''])}"] * (draw.random() < 0.2)
        recipe, refusal = None, None
        try:
            recipe = load_recipe(path, overrides) if kind is None else load_recipe_as(kind, path, overrides)
        except ValueError as error:
            refusal = error
        # Of ours: pydantic's own is a ValueError too.
        assert recipe or (type(refusal) is ValueError and str(refusal))
        if recipe and recipe.stage:
            accepted += 1
            (tmp_path / "saved.yaml").write_text(recipe_yaml(recipe))
            assert load_recipe_as(type(recipe), tmp_path / "saved.yaml", saved=True) == recipe
    assert accepted > 5
