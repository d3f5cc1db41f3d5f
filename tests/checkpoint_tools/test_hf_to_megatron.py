"""hf_to_megatron: the checkpoint that it writes is complete, and in the dtype asked for."""

from __future__ import annotations

import pytest

from checkpoint_tools import hf_to_megatron
from megatron_r1v2.checkpoint.megatron.run_folder import load_state, resolve_checkpoint
from megatron_r1v2.checkpoint.sources import CheckpointSpec


def test_the_checkpoint_is_whole_and_has_the_dtype(made, tmp_path, capsys):
    arguments = ["--hf", str(made / "chat"), "--output", str(tmp_path / "out"), "--quiet"]
    hf_to_megatron.main([*arguments, "--dtype", "fp16"])
    assert capsys.readouterr().out == f"wrote {tmp_path / 'out'}\n"
    checkpoint = resolve_checkpoint(tmp_path / "out")
    assert load_state(checkpoint)["parts"] == ["adapter", "language", "vision"]
    with CheckpointSpec(checkpoint).open() as source:
        assert str(source.meta("adapter.norm.weight").dtype) == "torch.float16"
    with pytest.raises(SystemExit) as stopped:
        hf_to_megatron.main(arguments)
    assert stopped.value.code == 1
    assert "pass --overwrite to replace it" in capsys.readouterr().err
