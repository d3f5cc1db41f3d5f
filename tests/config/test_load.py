"""Recipes: what is read, what is refused, and what the refusal says."""

from pathlib import Path

import pytest
import yaml

from megatron_r1v2.config import load
from megatron_r1v2.config.choices import Packing, Part, Recompute, StageName
from megatron_r1v2.config.load import load_recipe, load_recipe_as, own_defaults, recipe_yaml
from megatron_r1v2.config.recipes import (
    STAGES,
    AlignRecipe,
    EvaluateRecipe,
    GrpoRecipe,
    MpoRecipe,
    RewardModelRecipe,
    ServeRecipe,
)

SAVED = Path(__file__).parent / "saved" / "schema-1"


def write(folder, text, name="recipe.yaml", stage="grpo"):
    path = folder / name
    named = f"run: {{stage: {stage}}}\n" if stage and "run:" not in text else ""
    path.write_text(named + text, encoding="utf-8")
    return path


@pytest.mark.parametrize(("stage", "kind"), STAGES.items())
def test_a_recipe_without_settings_is_all_defaults(tmp_path, stage, kind):
    recipe = load_recipe(write(tmp_path, "", stage=stage.value))
    assert type(recipe) is kind
    assert recipe.changed(run=kind().run) == kind()


def test_values_reach_their_settings_with_the_right_types(tmp_path):
    recipe = load_recipe(
        write(
            tmp_path,
            "run: {stage: grpo, output_dir: runs/digits}\n"
            "train: {parts: [vision, adapter], learning_rate: 3e-4, recompute: full, steps: 7}\n"
            "model: {transformer_config: {attention_dropout: 0.1, moe: {experts: 2}}}\n"
            "generation: {stop_tokens: ['</s>'], temperature: 2}\n",
        )
    )
    assert recipe.run.name == "digits"
    assert recipe.train.parts == (Part.vision, Part.adapter)
    assert recipe.train.recompute is Recompute.full
    assert (recipe.train.learning_rate, recipe.train.steps) == (3e-4, 7)
    assert recipe.generation.temperature == 2.0
    assert isinstance(recipe.generation.temperature, float)
    assert recipe.generation.stop_tokens == ("</s>",)
    assert recipe.model.transformer_config == {"attention_dropout": 0.1, "moe": {"experts": 2}}
    assert recipe.buffer == GrpoRecipe().buffer


def test_overrides_win_and_text_is_taken_as_it_stands(tmp_path):
    recipe = load_recipe(
        write(tmp_path, "train: {steps: 5, parts: [adapter]}\nmodel: {transformer_config: {a: 1}}\n"),
        [
            "train.steps=9",
            "train.parts=[language, adapter]",
            "checkpoint.asynchronous=false",
            "run.output_dir=2024",
            r"reward.claim_pattern=(?P<name>left|right)[: =]+(?P<value>\d)",
            "model.transformer_config.b=[1, 2]",
        ],
    )
    assert recipe.train.steps == 9
    assert recipe.train.parts == (Part.language, Part.adapter)
    assert recipe.checkpoint.asynchronous is False
    assert recipe.run.output_dir == "2024"
    assert recipe.reward.claim_pattern == r"(?P<name>left|right)[: =]+(?P<value>\d)"
    assert recipe.model.transformer_config == {"a": 1, "b": [1, 2]}


def test_a_recipe_may_start_from_another(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path, "train: {steps: 5, warmup_steps: 2}\nrun: {stage: grpo, output_dir: base}\n", "base.yaml")
    variant = write(tmp_path, "defaults: ../base.yaml\ntrain: {steps: 8}\n", "sub/variant.yaml", stage=None)
    recipe = load_recipe(variant)
    assert (recipe.train.steps, recipe.train.warmup_steps, recipe.run.name) == (8, 2, "base")


def test_a_recipe_may_start_from_one_of_another_stage(tmp_path):
    write(tmp_path, "train: {steps: 5}\nbuffer: {capacity: 7}\nalgorithm: {clip_low: 0.1}\n", "grpo.yaml")
    recipe = load_recipe(write(tmp_path, "defaults: grpo.yaml\ntrain: {warmup_steps: 1}\n", "align.yaml", "align"))
    assert type(recipe) is AlignRecipe
    assert (recipe.train.steps, recipe.train.warmup_steps) == (5, 1)
    own = write(tmp_path, "defaults: grpo.yaml\nbuffer: {capacity: 8}\n", "own.yaml", "align")
    with pytest.raises(ValueError, match=r"own.yaml: section buffer is not read by the align stage, only by grpo"):
        load_recipe(own)
    with pytest.raises(ValueError, match=r"override 'buffer.capacity=8': section buffer is not read by the align"):
        load_recipe(tmp_path / "align.yaml", ["buffer.capacity=8"])
    write(tmp_path, "train: {stepz: 5}\nbufer: {capacity: 7}\n", "grpo.yaml")
    with pytest.raises(ValueError, match=r"(?s)grpo.yaml: unknown setting 'train.stepz'.*grpo.yaml: .*'bufer'"):
        load_recipe(tmp_path / "align.yaml")


def test_a_stage_may_have_a_default_of_its_own(tmp_path):
    recipe = load_recipe(write(tmp_path, "train: {steps: 5}", stage="reward_model"))
    assert recipe.train.parts == (Part.adapter, Part.score)
    assert own_defaults(RewardModelRecipe, "train") == {"parts": (Part.adapter, Part.score)}
    assert own_defaults(GrpoRecipe, "train") == {}


def test_recipes_that_start_from_each_other_are_refused(tmp_path):
    write(tmp_path, "defaults: b.yaml\n", "a.yaml")
    with pytest.raises(ValueError, match="leads back to this file"):
        load_recipe(write(tmp_path, "defaults: a.yaml\n", "b.yaml"))


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("train: {learning_rat: 1}", [], r"unknown setting 'train.learning_rat'; did you mean 'train.learning_rate'\?"),
        ("trian: {steps: 1}", [], r"unknown setting 'trian'; did you mean 'train.steps'\?"),
        ("learning_rate: 1", [], r"unknown setting 'learning_rate'; did you mean 'train.learning_rate'\?"),
        ("buffer: {zzz: 1}", [], "unknown setting 'buffer.zzz'; accepted: buffer.capacity, buffer.max_age"),
        (
            "train: {buffer: 1}",
            [],
            r"unknown setting 'train.buffer'; did you mean 'buffer.capacity' or 'buffer.max_age'",
        ),
        ("train: {max_tiles: 1}", [], r"unknown setting 'train.max_tiles'; did you mean 'data.max_tiles'\?"),
        ("learning_rat: 1", [], r"unknown setting 'learning_rat'; did you mean 'train.learning_rate'\?"),
        (
            "preferenc: {bta: 1}",
            [],
            r"unknown setting 'preferenc'; did you mean 'preference.beta'\? It is read only by mpo",
        ),
        ("hallucination: {max_margn: 1}", [], r"did you mean 'hallucination.max_margin'\? It is read only by mpo$"),
        (
            "hallucination: {max_margin: 1}",
            [],
            "hallucination.max_margin is not read by the grpo stage, only by mpo; remo",
        ),
        (
            "evaluation: {judge_url: a}",
            [],
            "evaluation.judge_url is not read by the grpo stage, only by evaluate; remove",
        ),
        ("zzz: {a: 1}", [], "unknown setting 'zzz'; accepted: run, model"),
        ("preference: {beta: 1}", [], "section preference is not read by the grpo stage, only by mpo; remove it"),
        (
            "reward: {functions: [{path: a.py}]}",
            [],
            r"reward.functions\[0\].name: Field required; expected a list, each \{path, name, weight\}",
        ),
        (
            "reward: {functions: [{path: a.py, name: f, weight: -1}]}",
            [],
            r"reward.functions\[0\].weight: Input should be greater than or equal to 0; expected a list",
        ),
        (
            "reward: {functions: [a.py]}",
            [],
            r"reward.functions=\['a.py'\] is not accepted; expected a list, each \{path",
        ),
        ("train: 5", [], r"train=5 is a section; it needs settings below it: parts, steps"),
        ("train:", [], r"train=None is a section; it needs settings below it: parts, steps"),
        ("train: {steps: many}", [], r"recipe.yaml: train.steps='many' is not accepted; expected a whole number"),
        ("train: {steps: 2.5}", [], r"train.steps=2.5 is not accepted; expected a whole number"),
        ("train: {steps: true}", [], r"train.steps is true; expected a whole number"),
        ("train: {steps: }", [], r"train.steps is nothing; expected a whole number"),
        (
            "reward: {shuffle: maybe}",
            [],
            r"reward.shuffle='maybe' is not accepted; expected true or false",
        ),
        ("run: {stage: grpo, output_dir: 3}", [], r"run.output_dir=3 is not accepted; expected text"),
        ("model: {layers: fast}", [], r"model.layers='fast' is not accepted; expected one of local, te"),
        ("train: {parts: [head]}", [], r"train.parts=\['head'\] is not accepted; expected a list, each one of vision"),
        ("train: {parts: adapter}", [], r"train.parts='adapter' is not accepted; expected a list"),
        ("train: {steps: 1", [], "is not valid YAML"),
        ("train: {steps: 1, steps: 2}", [], "is not valid YAML.*duplicate key"),
        ("train:\n  seed: 1\nrun: {}\ntrain: {}", [], "(?s)duplicate key 'train'.*line 4, column 1"),
        ("defaults: [a]", [], r"defaults=\['a'\] must be the path of one recipe"),
        ("", ["train.steps"], "override 'train.steps' is not understood; write section.key=value"),
        (
            "",
            ["steps=3"],
            r"override 'steps=3' is not understood; write .* train.steps=200; did you mean 'train.steps'\?",
        ),
        (
            "preference: {beta: 1}\nzzz: {}",
            ["run.stage=mpo", "bufer.x=1"],
            r"'bufer'; did .*'buffer'\? It is read only by grpo",
        ),
        ("", ["bufer.x=1"], r"override 'bufer.x=1': unknown setting 'bufer'; did you mean 'buffer'\?$"),
        ("", ["train.steps=[1"], "the value is not valid YAML"),
        ("", ["train.stepz=3"], r"unknown setting 'train.stepz'; did you mean 'train.steps'\?"),
        ("", ["train.steps.more=3"], "train.steps={'more': 3} is not accepted"),
        ("", ["train.steps=0"], "override 'train.steps=0': train.steps=0 is out of range; accepted: 1 or more"),
        ("run: {stage: grpo, output_dir: ' '}", [], "run.output_dir is empty"),
        ("run: {stage: fast}", [], "run.stage='fast' is not accepted; expected one of align, pairs"),
        ("run: {seed: 1}", [], "run.stage is not set; name the stage that the recipe is for: align, pairs"),
        ("train: {warmup_steps: 200}", [], "^train.warmup_steps=200 is more than train.steps=100"),
    ],
)
def test_bad_input_is_refused_by_name(tmp_path, text, overrides, message):
    with pytest.raises(ValueError, match="(?s)" + message):
        load_recipe(write(tmp_path, text), overrides)


def test_a_list_is_no_recipe(tmp_path):
    with pytest.raises(ValueError, match="must map section names to settings; sections: run, model"):
        load_recipe(write(tmp_path, "- 1", stage=None))


def test_all_mistakes_are_told_at_once_each_setting_once(tmp_path):
    text = "trian: {steps: 1}\ntrain: {stepz: 1, steps: x, parts: [a, b], learning_rate: -1}\npairs: {prompts: 1}"
    with pytest.raises(ValueError, match="^8 mistakes\n") as caught:
        load_recipe(write(tmp_path, text), ["buffer.max_age=0", "zzz"])
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 8
    for told in (
        "'zzz'",
        "'trian'",
        "train.stepz",
        "train.steps='x'",
        "train.parts=",
        "learning_rate=-1",
        "section pairs",
        "max_age=0",
    ):
        assert sum(told in line for line in lines) == 1, told


def test_a_long_value_is_cut(tmp_path):
    with pytest.raises(ValueError, match="train.steps='xxx") as caught:
        load_recipe(write(tmp_path, f"train: {{steps: {'x' * 10_000}}}"))
    assert len(str(caught.value)) < 500


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(ValueError, match="'.*none.yaml' is not a file"):
        load_recipe(tmp_path / "none.yaml")


def test_a_stage_reads_its_own_recipes_alone(tmp_path):
    path = write(tmp_path, "train: {steps: 5}", stage="align")
    assert load_recipe_as(AlignRecipe, path).train.steps == 5
    with pytest.raises(ValueError, match="is a recipe of the align stage .*; run python -m megatron_r1v2 align"):
        load_recipe_as(GrpoRecipe, path)


@pytest.mark.parametrize("stage", STAGES)
def test_a_command_takes_the_recipe_of_any_stage(tmp_path, stage):
    path = write(tmp_path, "model: {hf_path: there}\ntrain: {prompts_per_step: 5}", stage=stage.value)
    recipe = load_recipe_as(
        EvaluateRecipe, path, ["train.prompts_per_step=3", "evaluation.runs=2", "reward.claim_pattern="]
    )
    assert type(recipe) is EvaluateRecipe
    assert (recipe.model.hf_path, recipe.evaluation.runs, recipe.reward.claim_pattern) == ("there", 2, "")
    assert type(load_recipe_as(ServeRecipe, path)) is ServeRecipe


def test_a_command_refuses_what_neither_it_nor_the_stage_reads(tmp_path):
    path = write(tmp_path, "", stage="align")
    with pytest.raises(ValueError, match="section buffer is not read by the align stage"):
        load_recipe_as(EvaluateRecipe, path, ["buffer.capacity=3"])
    with pytest.raises(ValueError, match="train.steps=0 is out of range"):
        load_recipe_as(EvaluateRecipe, path, ["train.steps=0"])
    with pytest.raises(ValueError, match="section train is not read by the evaluate stage, only by align"):
        load_recipe_as(EvaluateRecipe, None, ["train.steps=3"])
    assert load_recipe_as(EvaluateRecipe, None, ["evaluation.runs=3"]).evaluation.runs == 3


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_saved_is_read_back(tmp_path, stage):
    recipe = load_recipe(
        write(tmp_path, "model: {transformer_config: {x: [1]}}\n", stage=stage.value),
        ["run.output_dir=1e-7", "data.max_corrupt_fraction=1e-7", "generation.feature_cache_gib=0.1"],
    )
    path = tmp_path / "saved.yaml"
    path.write_text(recipe_yaml(recipe))
    assert load_recipe(path, saved=True) == recipe
    assert load_recipe(path) == recipe


def test_a_recipe_made_in_code_is_saved_with_its_stage(tmp_path):
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(MpoRecipe()))
    assert load_recipe(tmp_path / "recipe.yaml", saved=True).run.stage is StageName.mpo


def test_a_saved_recipe_of_an_earlier_commit_is_refused_in_one_sentence(tmp_path):
    path = write(tmp_path, "train: {steps: 5}")
    with pytest.raises(
        ValueError, match=r"recipe.yaml was written by an earlier version, before .* is not read; start"
    ):
        load_recipe(path, saved=True)


@pytest.mark.parametrize("schema", ["0", "4", "one"])
def test_a_schema_of_another_version_is_refused(tmp_path, schema):
    with pytest.raises(ValueError, match=rf"has schema='?{schema}'?; this version reads 1 to 3"):
        load_recipe(write(tmp_path, f"schema: {schema}\n"))


def test_settings_with_a_new_name_are_read_from_older_recipes(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "SCHEMA", 3)
    monkeypatch.setattr(
        load,
        "RENAMES",
        {
            2: {"train.size": "train.rows"},
            3: {"train.rows": "train.steps", "old.age": "buffer.max_age", "old.gone": ""},
        },
    )
    text = "train: {%s: 5, warmup_steps: 1}\nold: {age: 3, gone: 7}\n"
    for schema, name in ((1, "size"), (2, "rows")):
        recipe = load_recipe(write(tmp_path, f"schema: {schema}\n" + text % name), saved=True)
        assert (recipe.train.steps, recipe.train.warmup_steps, recipe.buffer.max_age) == (5, 1, 3)
    with pytest.raises(ValueError, match=r"unknown setting 'train.rows'"):
        load_recipe(write(tmp_path, "schema: 3\n" + text % "rows"))


@pytest.mark.parametrize("stage", ["align", "mpo"])
def test_a_setting_that_the_stage_does_not_read_is_refused_with_those_that_do(tmp_path, stage):
    text = "reward: {shuffle: false, model_weight: 1}\nevaluation: {data: there}\ntrain: {updates_per_step: 1}\n"
    with pytest.raises(ValueError, match="^4 mistakes\n") as caught:
        load_recipe(write(tmp_path, text, stage=stage))
    for told in (
        f"reward.shuffle is not read by the {stage} stage, only by grpo; remove it",
        f"reward.model_weight is not read by the {stage} stage, only by pairs, grpo; remove it",
        f"evaluation.data is not read by the {stage} stage, only by evaluate; remove it",
        f"train.updates_per_step is not read by the {stage} stage, only by grpo; remove it",
    ):
        assert told in str(caught.value)


def test_inherited_settings_that_the_stage_does_not_read_are_left_out(tmp_path):
    write(tmp_path, "reward: {shuffle: true, claim_pattern: '(?P<name>a)(?P<value>b)'}\n", "grpo.yaml")
    recipe = load_recipe(write(tmp_path, "defaults: grpo.yaml\n", "align.yaml", "align"))
    assert (recipe.reward.shuffle, recipe.reward.claim_pattern) == (False, "(?P<name>a)(?P<value>b)")
    with pytest.raises(ValueError, match="override 'reward.shuffle=true': reward.shuffle is not read by the align"):
        load_recipe(tmp_path / "align.yaml", ["reward.shuffle=true"])


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_saved_holds_what_the_stage_reads_and_no_more(stage):
    saved = yaml.safe_load(recipe_yaml(STAGES[stage]()))
    assert saved.pop("schema") == load.SCHEMA
    assert {name: tuple(settings) for name, settings in saved.items()} == STAGES[stage].settings()


def test_a_checkpoint_alone_brings_the_folder_that_its_run_began_from(tmp_path):
    base, run = tmp_path / "base", tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(f"model: {{hf_path: {base}}}\n")

    def hf_path(*overrides):
        recipe = load_recipe_as(EvaluateRecipe, None, [f"model.checkpoint={run}", *overrides])
        return recipe.model.hf_path

    assert hf_path() == "", "it is not there"
    base.mkdir()
    assert hf_path() == str(base)
    assert hf_path("model.hf_path=other") == "other"
    (run / "data").mkdir()
    assert hf_path(f"model.checkpoint={run / 'data'}") == "", "a folder of the run that is no checkpoint"
    assert load_recipe_as(EvaluateRecipe, None, []).model.hf_path == ""


def test_a_recipe_without_a_stage_is_judged_as_that_which_it_suits_best(tmp_path):
    text = "run: {seed: 1}\nbuffer: {capacity: -1}\nalgorithm: {clip_lo: 1}\ngeneration: {responses_per_prompt: 1}\n"
    with pytest.raises(ValueError, match="^5 mistakes\n") as caught:
        load_recipe(write(tmp_path, text), check=lambda recipe: [f"{recipe.title()} has no data"])
    lines = str(caught.value).splitlines()[1:]
    for told in (
        "recipe.yaml: run.stage is not set",
        "did you mean 'algorithm.clip_low'?",
        "buffer.capacity=-1 is out of range",
        "generation.responses_per_prompt=1 leaves nothing to compare",
        "grpo has no data",
    ):
        assert sum(told in line for line in lines) == 1, told


def test_values_bounds_combinations_and_checks_are_told_at_once(tmp_path):
    text = (
        "run: {stage: grpo}\nmodel: {layers: te, precision: fp32}\nbuffer: {max_age: 0}\ntrain: {parts: []}\n"
        "reward: {consistency_weight: 1.0}\nzzz: {}\n"
    )
    with pytest.raises(ValueError, match="^8 mistakes\n") as caught:
        load_recipe(write(tmp_path, text), ["x=1", "train.stepz=1"], check=lambda _: ["data.train='a' is not a folder"])
    for told in (
        "override 'x=1'",
        "'zzz'",
        "'train.stepz'",
        "buffer.max_age=0",
        "model.layers=te with",
        "train.parts is empty",
        "reward.consistency_weight=1.0 with",
        "data.train='a'",
    ):
        assert told in str(caught.value), told


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("train: {warmup_steps: 200, steps: many}", []),
        ("train: {warmup_steps: 200, stepz: 300}", []),
        ("train: {warmup_steps: 200}\ntrian: {steps: 300}", []),
        ("train: {warmup_steps: 200}", ["steps=300"]),
        ("train: {warmup_steps: 200}", ["train.steps=[1"]),
        ("train: {warmup_steps: 200}\ndefaults: none.yaml", []),
    ],
)
def test_what_depends_on_a_wrong_setting_is_not_judged(tmp_path, text, overrides):
    """The value that is compared is not what the user meant."""
    with pytest.raises(ValueError, match="^(?!.*mistakes)") as caught:
        load_recipe(write(tmp_path, text), overrides, check=lambda _: ["train.steps=100 is too few"])
    assert "is more than" not in str(caught.value)
    assert "too few" not in str(caught.value)


def test_a_recipe_of_another_stage_has_its_mistakes_told_too(tmp_path):
    with pytest.raises(ValueError, match=r"(?s)2 mistakes.*is a recipe of the align stage.*train.steps=0 is out"):
        load_recipe_as(GrpoRecipe, write(tmp_path, "train: {steps: 0}", stage="align"))


@pytest.mark.parametrize("stage", STAGES)
def test_recipes_that_were_saved_once_are_read_for_ever(stage):
    """One of each stage, as schema 1 wrote it. Never change these files: give a new name its line in `RENAMES`."""
    recipe = load_recipe(SAVED / f"{stage.value}.yaml", saved=True)
    assert type(recipe) is STAGES[stage]
    assert (recipe.run.seed, recipe.run.output_dir, recipe.train.prompts_per_step) == (4321, f"runs/{stage.value}", 17)
    # They had padded rows, which are gone.
    assert (recipe.train.packing, recipe.train.tokens_per_microbatch) == (Packing.shared, 8192)


def test_own_reward_functions_are_read_and_saved(tmp_path):
    text = "reward:\n  functions:\n  - {path: reward.py, name: near, weight: 2}\n  - {path: reward.py, name: short}\n"
    recipe = load_recipe(write(tmp_path, text))
    assert [(own.path, own.name, own.weight) for own in recipe.reward.functions] == [
        ("reward.py", "near", 2.0), ("reward.py", "short", 1.0),
    ]  # fmt: skip
    assert load_recipe(write(tmp_path, recipe_yaml(recipe)), saved=True) == recipe
    assert load_recipe(write(tmp_path, text), ["reward.functions=[]"]).reward.functions == ()


def test_several_data_sets_are_a_list_with_weights(tmp_path):
    path = write(tmp_path, "data: {train: [{path: a, weight: 3}, {path: b}]}\n")
    recipe = load_recipe(path)
    assert [(source.path, source.weight) for source in recipe.data.sources] == [("a", 3.0), ("b", 1.0)]
    assert recipe.data.train_text == "a x 3, b x 1"
    saved = tmp_path / "saved.yaml"
    saved.write_text(recipe_yaml(recipe))
    assert load_recipe(saved, saved=True).data == recipe.data
    # A path stays text, whatever YAML would make of it.
    assert load_recipe(path, ["data.train=2026"]).data.train == "2026"
    assert load_recipe(path, ["data.train=[{path: c}]"]).data.train_text == "c x 1"
    assert load_recipe(path, ["data.train="]).data.sources == ()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[{path: a}, {path: b, weight: 0}]", "data.train[1].weight"),
        ("[{path: a}, {path: b, weight: .nan}]", "data.train[1].weight"),
        ("[{path: a}, {path: b, weight: 1.0e+300}]", "data.train[1].weight"),
        ("[{path: a, weigth: 2}]", "data.train[0].weigth"),
        ("[{weight: 2}]", "data.train[0].path"),
        ("[a, b]", "data.train="),
        ("7", "data.train=7 is not accepted; expected text, or a list, each {path, weight}"),
    ],
)
def test_a_bad_entry_of_a_mixture_is_named(tmp_path, text, told):
    with pytest.raises(ValueError, match=r"\{path, weight\}") as caught:
        load_recipe(write(tmp_path, f"data: {{train: {text}}}\n"))
    assert told in str(caught.value)
