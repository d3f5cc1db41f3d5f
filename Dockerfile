# The container of the 38B runs: NVIDIA's PyTorch image, whose torch, TransformerEngine, flash-attn and apex are built
# for each other and stay as they are. From the top folder, build it, make it a file for SLURM's pyxis (or push it, and give
# R1V2_CONTAINER docker://REGISTRY#PATH/megatron_r1v2:latest), and check it on a GPU:
#   docker build -t megatron_r1v2 .
#   enroot import -o "$PWD/megatron_r1v2.sqsh" dockerd://megatron_r1v2
#   srun --gpus=1 --container-image="$PWD/megatron_r1v2.sqsh" --container-workdir=/workspace/megatron_r1v2 \
#     python -m pytest -m gpu tests/gpu -p no:cacheprovider
#   R1V2_CONTAINER="$PWD/megatron_r1v2.sqsh" sbatch slurm/grpo_38b.sh
# The image has CUDA 13.1: nodes need NVIDIA's driver 580 or newer (older data-centre drivers: the forward compatibility
# package that the image brings). With docker alone the check is: docker run --rm --gpus all --ipc=host megatron_r1v2 -m pytest -m gpu tests/gpu
FROM nvcr.io/nvidia/pytorch:25.12-py3

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /workspace/megatron_r1v2

# What the base brought, before anything is installed: pip's constraints, and what the last lines compare with.
COPY container/base_versions.py container/
RUN python container/base_versions.py record /etc/base-versions.txt

# setup.py alone first: its requirements are the slow layer, and they change less often than the sources. What the base
# image has stays at its version (its own constraint file, PIP_CONSTRAINT, holds more than ours); the rest has those of
# the lock file, with which all tests run. With the extras of `r1v2 serve` and of benchmarks.
COPY setup.py pyproject.toml README.md requirements.lock ./
# hadolint ignore=DL3013
RUN mkdir -p megatron_r1v2 checkpoint_tools \
    && touch megatron_r1v2/__init__.py checkpoint_tools/__init__.py \
    && python container/base_versions.py constrain /etc/base-versions.txt requirements.lock > /etc/r1v2-constraints.txt \
    && PIP_CONSTRAINT=/etc/r1v2-constraints.txt \
       pip install --no-cache-dir --no-build-isolation -e ".[serve,evaluation]" pytest pytest-timeout \
    && python container/base_versions.py compare /etc/base-versions.txt

# megatron-core 0.16.1 works with TransformerEngine 2.9 to 2.11: fail here rather than in a job.
RUN python -c "import importlib.metadata as m; v = m.version('transformer_engine'); \
assert (2, 9) <= tuple(map(int, v.split('+')[0].split('.')[:2])) < (2, 12), f'TransformerEngine {v}, need 2.9 to 2.11'"

COPY . .

# Runs write below the working folder, or wherever run.output_dir of a mounted recipe points.
RUN useradd --create-home --uid 10001 r1v2 && chown -R r1v2:r1v2 /workspace/megatron_r1v2
USER 10001

# docker run IMAGE -m megatron_r1v2 grpo recipe.yaml; under SLURM, pyxis starts what the script says instead.
ENTRYPOINT ["python"]
CMD ["-m", "megatron_r1v2"]
