"""The common part of tests/planning/: the 38B recipe on its cluster, and a model small enough to count by hand."""

from functools import cache
from pathlib import Path

from megatron_r1v2.checkpoint.hf.architecture import r1v2_architecture
from megatron_r1v2.config.choices import Fp8, Recompute, StageName
from megatron_r1v2.config.load import load_recipe
from megatron_r1v2.models.architecture import LanguageArchitecture, R1V2Architecture, VisionArchitecture
from megatron_r1v2.planning.hardware import HARDWARE
from megatron_r1v2.planning.known_models import KNOWN_MODELS
from megatron_r1v2.planning.plan import Cluster, make_plan
from megatron_r1v2.planning.workload import Workload
from megatron_r1v2.stages.model_fit import fit_mistakes

RECIPE = Path(__file__).parents[2] / "examples" / "r1v2_38b" / "grpo.yaml"
HF_CONFIG = KNOWN_MODELS["r1v2-38b"]
ARCHITECTURE = r1v2_architecture(HF_CONFIG)

# One tile: 4 patches and a class token, 1 image token of 32 channels.
SMALL = R1V2Architecture(
    vision=VisionArchitecture(
        hidden_size=8,
        num_layers=2,
        num_heads=2,
        ffn_size=16,
        image_size=4,
        patch_size=2,
        norm="rms_norm",
        norm_epsilon=1e-6,
        qkv_bias=False,
        qk_norm=True,
    ),
    language=LanguageArchitecture(
        model_type="qwen2",
        hidden_size=16,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_size=4,
        ffn_size=32,
        vocab_size=64,
        max_positions=128,
        rope_theta=1e6,
        norm_epsilon=1e-6,
        qkv_bias=True,
        qk_norm=False,
        tied_embeddings=False,
    ),
    image_token_id=63,
    downsample_ratio=0.5,
)


def small_work(**changes):
    """Return a GRPO workload of fp32 rows of 10 + 7 tokens and two tiles for `SMALL`."""
    values = {
        "stage": StageName.grpo,
        "parts": ("adapter",),
        "element_bytes": 4,
        "fp8": Fp8.none,
        "fp8_weights": False,
        "recompute": Recompute.none,
        "packed_tokens": 48,
        "shares_prompts": False,
        "prompts_per_step": 2,
        "responses_per_prompt": 2,
        "updates_per_step": 1,
        "prompt_tokens": 10,
        "response_tokens": 7,
        "tiles": 2,
        "kv_cache_gib": 1.0,
        "max_requests": 2,
        "max_tokens_per_step": 32,
        "cuda_graphs": False,
        "feature_cache_gib": 1.0,
        "buffer_capacity": 3,
        "target_effective_fraction": 0.5,
        "has_reference": False,
    }
    return Workload(**(values | changes))


def cluster(gpus=8, memory=80.0):
    return Cluster(gpus, 8, memory, 4.0, HARDWARE["h100"])


@cache
def plan_of(*overrides, gpus=8, memory=80.0):
    """Plan the recipe for the 38B model, for all tests that want this plan at once."""
    return plan_for(HF_CONFIG, *overrides, gpus=gpus, memory=memory)


def plan_for(hf, *overrides, gpus=8, memory=80.0):
    """Plan the recipe for a model that it fits; its mistakes are told as the command tells them."""

    def check(recipe):
        return fit_mistakes(recipe, r1v2_architecture(hf).language)

    return make_plan(load_recipe(RECIPE, (*BEFORE, *overrides), check=check), hf, cluster(gpus, memory))


BEFORE = ("generation.kv_cache_gib=20.0", "generation.cuda_graphs=false")
"""Settings that the expected numbers were made with, in place of "auto"."""


def workload(*overrides):
    return Workload.from_recipe(load_recipe(RECIPE, (*BEFORE, *overrides)), ARCHITECTURE, gpu_bytes=cluster().limit)


def check_planned(compared):
    """Check that the planner says of every phase what its rehearsal takes, within 5 %."""
    wrong = [each.terms for each in compared if abs(each.deviation) > 0.05]
    assert not wrong, "more than 5 % apart, MiB rehearsed/planned:\n" + "\n".join(wrong)
