"""The kinds of checkpoint that a path can name."""

from __future__ import annotations

import pytest

from checkpoint_tools import parts
from megatron_r1v2.checkpoint.detection import open_checkpoint
from megatron_r1v2.checkpoint.sources import CheckpointSpec, HfSpec
from tests.checkpoint.damage import run


@pytest.mark.parametrize(
    ("name", "kind"),
    [("hf", "transformers"), ("chat", "chat"), ("megatron", "checkpoint"), ("run", "checkpoint")],
)
def test_folders_are_told_apart_and_open(made, name, kind):
    found, spec = open_checkpoint(made / name)
    assert found == kind
    assert isinstance(spec, CheckpointSpec if kind == "checkpoint" else HfSpec)
    with spec.open() as source:
        wanted = {"adapter"} if name == "run" else {"adapter", "language", "vision"}
        assert {ours.split(".")[0] for ours in source.names()} == wanted


def test_a_run_takes_its_base_from_the_recipe_unless_one_is_given(made):
    assert open_checkpoint(made / "run")[1].base == made / "hf"
    assert open_checkpoint(made / "run", made / "chat")[1].base == made / "chat"


def test_parts_need_a_base(made, tmp_path):
    run(parts, "export", "--checkpoint", made / "run", "--output", tmp_path / "adapter", "--quiet")
    with pytest.raises(ValueError, match="holds parts alone; give --base"):
        open_checkpoint(tmp_path / "adapter")
    kind, spec = open_checkpoint(tmp_path / "adapter", made / "hf")
    assert (kind, spec.parts) == ("parts", ("adapter",))


def test_an_empty_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="no finished checkpoint in"):
        open_checkpoint(tmp_path)
