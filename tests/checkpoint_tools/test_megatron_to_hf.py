"""megatron_to_hf: a run becomes a folder of its trained parts and its base."""

from __future__ import annotations

from safetensors.torch import load_file

from checkpoint_tools import megatron_to_hf
from megatron_r1v2.checkpoint.hf.folders import read_json


def test_it_says_which_parts_come_from_where(made, tmp_path, capsys):
    arguments = ["--checkpoint", str(made / "run"), "--quiet", "--layout", "chat", "--shard-size", "200KB"]
    megatron_to_hf.main([*arguments, "--output", str(tmp_path / "out"), "--dtype", "fp32"])
    told = capsys.readouterr().out
    assert told.startswith(f"wrote {tmp_path / 'out'} (adapter from {made / 'run' / 'checkpoints'}")
    assert f"the rest from {made / 'hf'}" in told
    assert read_json(tmp_path / "out" / "config.json")["model_type"] == "internvl_chat"
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    expected = load_file(made / "chat" / "model.safetensors")
    assert {name for path in files for name in load_file(path)} == set(expected)
    assert len(files) > 1
