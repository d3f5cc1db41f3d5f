"""parts: export and apply say what they wrote, in the layout and dtype asked for."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from checkpoint_tools import parts
from megatron_r1v2.checkpoint.hf.folders import read_json


def test_parts_go_out_and_over_a_base(made, tmp_path, capsys):
    adapter, whole = str(tmp_path / "adapter"), str(tmp_path / "whole")
    parts.main(["export", "--checkpoint", str(made / "run"), "--output", adapter, "--quiet"])
    assert capsys.readouterr().out == f"wrote {adapter} (adapter after step 7, trained on {made / 'hf'})\n"
    arguments = ["--parts", adapter, "--base", str(made / "hf"), "--output", whole, "--quiet"]
    parts.main(["apply", *arguments, "--layout", "chat", "--dtype", "bf16"])
    assert capsys.readouterr().out == f"wrote {whole} (adapter from {adapter}, the rest from {made / 'hf'})\n"
    assert read_json(tmp_path / "whole" / "config.json")["model_type"] == "internvl_chat"
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
