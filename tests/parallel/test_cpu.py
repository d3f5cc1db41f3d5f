"""Each replacement for CUDA is needed by a megatron-core call that the project makes, and none is missing."""

from __future__ import annotations

import concurrent.futures
import logging
import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from transformers import AutoModel, Qwen2_5_VLConfig, Qwen2_5_VLModel, Qwen2Config, Qwen2Model

from megatron_r1v2.config.schema import GenerationConfig, ParallelConfig
from megatron_r1v2.generation.engine import RolloutEngine, Sampling
from megatron_r1v2.generation.features import FeatureCache
from megatron_r1v2.models.architecture import LanguageArchitecture, R1V2Architecture, VisionArchitecture
from megatron_r1v2.models.r1v2 import R1V2Model, build_r1v2
from megatron_r1v2.models.settings import ComputeSettings
from megatron_r1v2.parallel import cpu, groups
from megatron_r1v2.parallel.groups import ParallelContext
from megatron_r1v2.types import Prompt
from tests.ranks import free_port, run_ranks
from tests.tiny_hf import tiny_hf_model

VISION = VisionArchitecture(32, 1, 4, 64, 32, 4, "layer_norm", 1e-6, True, False)
BY_NAME = {replacement.name: replacement for replacement in cpu.REPLACEMENTS}
ONLY_BETWEEN_STAGES = "torch.Tensor.cuda"


def architecture(*, tied: bool) -> R1V2Architecture:
    language = LanguageArchitecture("qwen2", 32, 2, 4, 2, 8, 64, 61, 4096, 1e4, 1e-6, True, False, tied)
    return R1V2Architecture(VISION, language, image_token_id=7, downsample_ratio=0.5)


def build(context: ParallelContext) -> R1V2Model:
    tensor_parallel.model_parallel_cuda_manual_seed(5)
    settings = ComputeSettings()
    return build_r1v2(architecture(tied=False), settings, groups=context.groups, device=context.device)


def initialize(context: ParallelContext) -> None:
    """Initialise weights: a seed decides them, and the tracker leaves the default generator alone."""
    one = build(context)
    torch.rand(3)  # elsewhere in the program
    before = torch.get_rng_state()
    with tensor_parallel.get_cuda_rng_tracker().fork():
        torch.rand(3)
    assert torch.equal(before, torch.get_rng_state())
    other = build(context)
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


def train_and_save(context: ParallelContext, folder: Path | None) -> None:
    """Take a step with megatron-core's DDP, distributed optimizer, clipping and schedule; save what it made."""
    model = build(context).language
    config = model.config
    config.calculate_per_token_loss = True
    ddp = DistributedDataParallel(config, DistributedDataParallelConfig(use_distributed_optimizer=True), model)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-2, use_distributed_optimizer=True, clip_grad=1e-3), [ddp]
    )
    config.finalize_model_grads_func = finalize_model_grads
    before = [parameter.clone() for parameter in model.parameters()]

    def forward(_, module):
        logits = module(torch.zeros(1, 8, dtype=torch.int64), torch.arange(8)[None], None)
        return logits, lambda out: (out.square().sum(), torch.tensor(8, dtype=torch.int32), {})

    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=None,
        model=[ddp],
        num_microbatches=1,
        seq_length=8,
        micro_batch_size=1,
        forward_only=False,
    )
    optimizer.step()
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    if folder is not None:
        state = ddp.module.sharded_state_dict()
        metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
        dist_checkpointing.save(
            {"model": state, "optimizer": optimizer.sharded_state_dict(state, metadata=metadata)}, str(folder)
        )


def roll_out(context: ParallelContext) -> None:
    """Generate with the dynamic inference engine."""
    engine = RolloutEngine(
        build(context),
        context=context,
        settings=GenerationConfig(kv_cache_gib=0.001, max_requests=4, max_tokens_per_step=16),
        stop_ids=frozenset(),
        vocab_size=61,
        max_prompt_tokens=8,
        seed=1,
    )
    prompt = Prompt("p", (), (1, 2, 3), torch.zeros(0, 3, 32, 32, dtype=torch.uint8), "", "exact")
    rollouts = engine.generate(
        [prompt],
        Sampling(num_responses=1, policy_version=0, temperature=1.0, max_response_tokens=3),
        features=FeatureCache(0),
    )
    assert len(rollouts[0].token_ids) == 3


def everything(context: ParallelContext, folder: Path | None) -> None:
    initialize(context)
    roll_out(context)
    train_and_save(context, folder)


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_PORT", str(free_port()))
        yield groups.initialize(ParallelConfig(), seed=1)
    groups.shut_down()


def test_with_all_replacements_everything_runs(context, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="megatron.core.tensor_parallel.random"):
        everything(context, tmp_path)
    assert "RNG state" not in caplog.text
    assert list(tmp_path.glob("*.distcp"))


@pytest.mark.parametrize("name", sorted(BY_NAME.keys() - {ONLY_BETWEEN_STAGES}))
def test_without_one_replacement_something_breaks(context, tmp_path, name):
    BY_NAME[name].remove()
    try:
        with pytest.raises((AssertionError, RuntimeError, ValueError, TypeError, AttributeError)):
            everything(context, tmp_path)
    finally:
        BY_NAME[name].install()
    everything(context, None)  # so it was the removal, and not what an earlier failure left behind


def has_a_torch_beside_it_after_a_save(folder: Path) -> bool:
    """Save, and return whether the process that passes the results of the writers on has loaded torch."""
    train_and_save(groups.initialize(ParallelConfig(), seed=1), folder)
    (server,) = multiprocessing.active_children()
    return "libtorch" in Path(f"/proc/{server.pid}/maps").read_text()


def test_the_first_save_imports_torch_in_no_other_process(tmp_path):
    assert run_ranks(1, has_a_torch_beside_it_after_a_save, tmp_path) == [False]
    assert list(tmp_path.glob("*.distcp"))


def build_tied_stages(without: str) -> None:
    context = groups.initialize(ParallelConfig(pipeline=2), seed=1)
    BY_NAME[without].remove()
    settings = ComputeSettings(pipeline=2)
    build_r1v2(architecture(tied=True), settings, groups=context.groups, device=context.device)


def test_tied_embeddings_over_stages_need_a_replacement():
    with pytest.raises(AssertionError, match="not compiled with CUDA"):
        run_ranks(2, build_tied_stages, ONLY_BETWEEN_STAGES)


def test_installing_twice_changes_nothing_and_removing_restores(context):
    replacement = BY_NAME["torch.zeros"]
    installed = torch.zeros
    replacement.install()
    assert torch.zeros is installed
    replacement.remove()
    try:
        assert torch.zeros is installed.replaced_for_cpu
    finally:
        replacement.install()


def test_importing_installs_nothing():
    code = (
        "import torch; before = torch.zeros, torch.Tensor.cuda; "
        "from megatron_r1v2.parallel import cpu; assert before == (torch.zeros, torch.Tensor.cuda)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def buffers_of_loaded_models(folders: list[Path]) -> list[dict[str, torch.Tensor]]:
    """Load models of transformers with the replacements installed first of all, as an entry point does."""
    cpu.install_if_needed()
    with torch.device("meta"):
        assert all(made.is_meta for made in (torch.tensor([1.0]), torch.zeros(2), torch.empty_like(torch.empty(2))))
    assert torch.tensor([1.0]).device == torch.zeros(2).device == cpu.CPU
    return [{name: b.clone() for name, b in AutoModel.from_pretrained(folder).named_buffers()} for folder in folders]


def test_transformers_loads_models_as_without_the_replacements(tmp_path):
    text = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    seeing = {"hidden_size": 32, "depth": 1, "num_heads": 4, "intermediate_size": 64, "out_hidden_size": 32}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    made = {
        "qwen2": Qwen2Model(Qwen2Config(**text)),
        "qwen2_5_vl": Qwen2_5_VLModel(
            Qwen2_5_VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=seeing)
        ),
        "internvl": tiny_hf_model(tmp_path / "internvl").model,
    }
    for name in ("qwen2", "qwen2_5_vl"):
        made[name].save_pretrained(tmp_path / name)
    # What torch notes at the first use of a device context is noted once a process, so this needs a fresh one.
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        loaded = process.submit(buffers_of_loaded_models, [tmp_path / name for name in made]).result()
    for model, results in zip(made.values(), loaded, strict=True):
        expected = dict(model.named_buffers())
        assert any("inv_freq" in name for name in expected)
        assert results.keys() == expected.keys()
        for name, buffer in expected.items():
            assert torch.equal(results[name], buffer), name
