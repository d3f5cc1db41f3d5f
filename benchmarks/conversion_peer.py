"""One conversion of a language model by mbridge, for benchmarks/conversion.py.

    PYTHONPATH=FOLDER_OF_MBRIDGE:. python -m benchmarks.conversion_peer import HF_FOLDER OUTPUT
    PYTHONPATH=FOLDER_OF_MBRIDGE:. python -m benchmarks.conversion_peer export MEGATRON_FOLDER OUTPUT HF_FOLDER

mbridge builds the model, fills it and lets dist_checkpointing save it, in its memory-efficient mode and without
drawing initial weights first. It supports TransformerEngine's layers only, which need CUDA: here it gets
megatron-core's own layers and the two names in which they differ. It reads rope_theta from a place that transformers 5
no longer fills, so we set it. Nothing else of it is changed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from mbridge import AutoBridge
from megatron.core import dist_checkpointing
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

from megatron_r1v2.config.schema import ParallelConfig
from megatron_r1v2.parallel.groups import initialize, shut_down

_NORMS = {
    "input_layernorm.weight": ["model.layers.{layer_number}.input_layernorm.weight"],
    "pre_mlp_layernorm.weight": ["model.layers.{layer_number}.post_attention_layernorm.weight"],
}


def main(way: str, source: Path, output: Path, hf: Path) -> None:
    """Convert one checkpoint into a new folder."""
    initialize(ParallelConfig(), seed=0)
    bridge = AutoBridge.from_pretrained(str(hf))
    bridge._OTHER_MAPPING = bridge._MLP_MAPPING = {**_NORMS, **bridge._MLP_MAPPING}
    bridge.hf_config.rope_theta = 1e6
    bridge.set_extra_args(perform_initialization=False, masked_softmax_fusion=False, persist_layer_norm=False)
    bridge._get_transformer_layer_spec = lambda vp_stage=None: get_gpt_decoder_block_spec(
        bridge.config, use_transformer_engine=False
    )
    bridge.has_vp_stage = True
    models = bridge.get_model(use_cpu_initialization=True, wrap_with_ddp=False, bf16=True)
    output.mkdir(parents=True)
    with torch.no_grad():
        if way == "import":
            bridge.load_weights(models, str(source), memory_efficient=True)
            dist_checkpointing.save(models[0].sharded_state_dict(), str(output))
        else:
            loaded = dist_checkpointing.load(models[0].sharded_state_dict(), str(source))
            models[0].load_state_dict(loaded, strict=False)
            bridge.safetensor_io = bridge._get_safetensor_io(str(hf))
            bridge.save_weights(models, str(output), memory_efficient=True)
    shut_down()


if __name__ == "__main__":
    main(
        sys.argv[1],
        Path(sys.argv[2]),
        Path(sys.argv[3]),
        Path(sys.argv[-1] if sys.argv[1] == "export" else sys.argv[2]),
    )
