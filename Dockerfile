# The container of the 38B runs: NVIDIA's PyTorch image, whose torch, TransformerEngine, flash-attn and apex are built
# for each other and stay as they are. From the top folder, build it, make it a file for SLURM's pyxis (or push it, and give
# R1V2_CONTAINER docker://REGISTRY#PATH/megatron_r1v2:latest), and check it on a GPU:
#   docker build -t megatron_r1v2 .
#   enroot import -o "$PWD/megatron_r1v2.sqsh" dockerd://megatron_r1v2
#   srun --gpus=1 --container-image="$PWD/megatron_r1v2.sqsh" --container-workdir=/workspace/megatron_r1v2 \
#     python -m pytest -m gpu tests/gpu -p no:cacheprovider
#   R1V2_CONTAINER="$PWD/megatron_r1v2.sqsh" sbatch slurm/grpo_38b.sh
# With docker alone the check is: docker run --rm --gpus all --ipc=host megatron_r1v2 -m pytest -m gpu tests/gpu
FROM nvcr.io/nvidia/pytorch:25.12-py3

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /workspace/megatron_r1v2

# What the base brought, before anything is installed: pip's constraints, and what the last lines compare with.
COPY container/base_versions.py container/
RUN python container/base_versions.py record /etc/base-versions.txt

# setup.py alone first: its requirements are the slow layer, and they change less often than the sources. The base image's
# own constraint file (PIP_CONSTRAINT) holds more than ours; both are given.
COPY setup.py pyproject.toml README.md ./
RUN mkdir -p megatron_r1v2 checkpoint_tools \
    && touch megatron_r1v2/__init__.py checkpoint_tools/__init__.py \
    && PIP_CONSTRAINT="${PIP_CONSTRAINT:+$PIP_CONSTRAINT }/etc/base-versions.txt" \
       pip install --no-cache-dir --no-build-isolation -e . \
    && pip install --no-cache-dir "pytest>=8" "pytest-timeout>=2.3" \
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
