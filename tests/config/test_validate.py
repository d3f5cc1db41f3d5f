"""The checks at the start of a command: files, libraries and devices."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from megatron_r1v2.config.choices import Layers
from megatron_r1v2.config.recipes import AlignRecipe, EvaluateRecipe, GrpoRecipe, PairsRecipe, ServeRecipe
from megatron_r1v2.config.schema import EvaluationConfig
from megatron_r1v2.config.validate import download_hint, model_is_served, read_hf_config, start_mistakes


def recipe_with(kind=GrpoRecipe, **values):
    """Return the defaults of a stage with `section__key=value` changed."""
    recipe = kind()
    for name, value in values.items():
        section, key = name.split("__")
        recipe = recipe.changed(**{section: getattr(recipe, section).changed(**{key: value})})
    return recipe


def told(kind=GrpoRecipe, **values):
    return list(start_mistakes(recipe_with(kind, **values)))


def test_each_stage_needs_its_files(tmp_path):
    here = str(tmp_path)
    assert told() == [
        "model.hf_path is not set; the grpo stage needs it: give the path of an existing folder",
        "data.train is not set; the grpo stage needs it: give the path of an existing folder",
    ]
    (missing,) = told(EvaluateRecipe, model__hf_path=here)
    assert missing.startswith("evaluation.data is not set; the evaluate stage needs it")
    assert told(AlignRecipe, model__hf_path=here, data__train=here) == []


def test_the_base_of_a_checkpoint_is_told(tmp_path):
    (tmp_path / "run" / "checkpoints" / "step-00000002").mkdir(parents=True)
    checkpoints = [tmp_path / "run", tmp_path / "run/checkpoints", tmp_path / "run/checkpoints/step-00000002"]
    told_of = [told(EvaluateRecipe, model__checkpoint=str(folder), evaluation__data=".") for folder in checkpoints]
    assert [len(texts) for texts in told_of] == [1, 1, 1]
    assert not any("model.hf_path=models/base" in texts[0] for texts in told_of)
    (tmp_path / "run" / "recipe.yaml").write_text("model: {hf_path: models/base}\n")
    for folder in checkpoints:
        (message,) = told(EvaluateRecipe, model__checkpoint=str(folder), evaluation__data=".")
        assert message.endswith(f"; the run of model.checkpoint={str(folder)!r} has model.hf_path=models/base")


def test_every_folder_that_is_missing_is_told():
    gone = {"model__hf_path": "a", "model__checkpoint": "b", "data__train": "c", "data__validation": "d"}
    named = [text.partition(" is not a folder; give the path of an existing one")[0] for text in told(**gone)]
    assert named == ["model.hf_path='a'", "model.checkpoint='b'", "data.train='c'", "data.validation='d'"]


def test_a_name_on_the_hub_gets_the_command_that_downloads_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (message,) = told(model__hf_path="Skywork/Skywork-R1V2-38B", data__train=str(tmp_path))
    assert "`hf download Skywork/Skywork-R1V2-38B --local-dir Skywork-R1V2-38B`" in message
    assert [download_hint(path) for path in ("gone", "/gone/too", "./a/b", "a/b/c", tmp_path)] == [""] * 5
    (tmp_path / "runs" / "base").mkdir(parents=True)
    assert download_hint("runs/base") == ""
    for address in ("https://huggingface.co/a/b", Path("https://huggingface.co/a/b")):
        assert "`hf download a/b --local-dir b`" in download_hint(address)
    assert "`hf download OWNER/R1V2-38B --local-dir checkpoints/R1V2-38B`" in download_hint("checkpoints/R1V2-38B")
    for name in ("Skywork/Skywork-R1V2-38B", "OpenGVLab/InternVL3-38B", "Qwen/QwQ-32B"):
        folder = f"checkpoints/{name.split('/')[1]}"
        assert download_hint(folder).endswith(f"`hf download {name} --local-dir {folder}`"), "whose owner is known"
    made = "to make it from its parts `python -m checkpoint_tools.reassemble`"
    assert made in download_hint("checkpoints/r1v2-38b-hf"), "the folder of grpo.yaml, which is on no hub"


def test_a_folder_that_is_not_read_need_not_exist(tmp_path):
    here = str(tmp_path)
    assert told(ServeRecipe, model__hf_path=here, data__train="gone") == []
    assert told(EvaluateRecipe, model__hf_path=here, evaluation__data=here, data__train="gone") == []


def test_a_served_model_needs_no_files_here(tmp_path):
    served = EvaluationConfig(endpoint_url="http://127.0.0.1:8000/v1", endpoint_model="served", data=str(tmp_path))
    recipe = recipe_with(EvaluateRecipe, model__hf_path="gone", data__train="gone").changed(evaluation=served)
    assert model_is_served(recipe)
    assert not model_is_served(EvaluateRecipe())
    assert list(start_mistakes(recipe)) == []
    (missing,) = start_mistakes(recipe.changed(evaluation=served.changed(data="gone")))
    assert missing.startswith("evaluation.data='gone' is not a folder")


def test_pairs_need_a_place_that_is_free(tmp_path):
    here = str(tmp_path)
    paths = {"model__hf_path": here, "data__train": here}
    assert told(PairsRecipe, **paths, run__output_dir=str(tmp_path / "new")) == []
    (taken,) = told(PairsRecipe, **paths, run__output_dir=here)
    assert "exists already; choose another folder or delete it first" in taken


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_graphs_need_a_cuda_device(tmp_path):
    (missing,) = told(model__hf_path=str(tmp_path), data__train=str(tmp_path), generation__cuda_graphs=True)
    assert missing.startswith("generation.cuda_graphs=true needs a CUDA device and there is none")


def test_transformer_engine_must_be_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    (missing,) = told(model__hf_path=str(tmp_path), data__train=str(tmp_path), model__layers=Layers.te)
    assert missing.startswith("model.layers=te needs TransformerEngine, which is not installed")


def test_own_reward_functions_need_their_files(tmp_path):
    path = tmp_path / "reward.py"
    settings = {
        "model__hf_path": str(tmp_path),
        "data__train": str(tmp_path),
        "reward__functions": [{"path": str(path), "name": "f"}],
    }
    (missing,) = told(**settings)
    assert re.match(r"reward.functions\[0\].path='.*reward.py' is not a file", missing)
    path.touch()
    assert told(**settings) == []


def test_a_config_json_is_read_or_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json; give the folder of a whole model"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="is not valid JSON"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"is not valid JSON of a model \(a list\)"):
        read_hf_config(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps({"a": 1}), encoding="utf-8")
    assert read_hf_config(tmp_path) == {"a": 1}


def test_each_entry_of_a_mixture_must_be_a_folder_and_there_once(tmp_path):
    here = str(tmp_path)
    mixture = [{"path": here}, {"path": "gone", "weight": 2}, {"path": here}]
    assert told(model__hf_path=here, data__train=mixture) == [
        "data.train[1].path='gone' is not a folder; give the path of an existing one",
        f"data.train[2].path={here!r} is in the list twice; give it once, with a larger weight",
    ]
    (twice,) = told(model__hf_path=here, data__train=[{"path": here}, {"path": f"{here}/../{tmp_path.name}"}])
    assert "is in the list twice" in twice, "another spelling of the same folder"
    (empty,) = told(model__hf_path=here, data__train=[])
    assert empty.startswith("data.train is an empty list: give the path")
