"""hf_to_hf: the options of the command line reach the folder that it writes."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from checkpoint_tools import hf_to_hf
from megatron_r1v2.checkpoint.hf.folders import read_json


def test_layout_dtype_and_size_of_files_are_those_asked_for(made, tmp_path, capsys):
    arguments = ["--hf", str(made / "hf"), "--output", str(tmp_path / "out"), "--quiet"]
    hf_to_hf.main([*arguments, "--layout", "chat", "--dtype", "bf16", "--shard-size", "200KB"])
    assert capsys.readouterr().out == f"wrote {tmp_path / 'out'} in the layout chat\n"
    assert read_json(tmp_path / "out" / "config.json")["model_type"] == "internvl_chat"
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    tensors = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert "mlp1.1.weight" in tensors
