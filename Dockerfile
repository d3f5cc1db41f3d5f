# The container of the 38B runs: NVIDIA's PyTorch image, whose torch, TransformerEngine, flash-attn and apex are built
# for each other and stay as they are. Build from the top folder: docker build -t megatron_r1v2 .
FROM nvcr.io/nvidia/pytorch:25.12-py3

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /workspace/megatron_r1v2

# setup.py alone first: its requirements are the slow layer, and they change less often than the sources.
# The base image's own constraint file (PIP_CONSTRAINT) keeps pip from replacing what it brought.
COPY setup.py pyproject.toml README.md ./
RUN mkdir -p megatron_r1v2 checkpoint_tools \
    && touch megatron_r1v2/__init__.py checkpoint_tools/__init__.py \
    && pip install --no-cache-dir --no-build-isolation -e .

# megatron-core 0.16.1 works with TransformerEngine 2.9 to 2.11: fail here rather than in a job.
RUN python -c "import importlib.metadata as m; v = m.version('transformer_engine'); \
assert (2, 9) <= tuple(map(int, v.split('+')[0].split('.')[:2])) < (2, 12), f'TransformerEngine {v}, need 2.9 to 2.11'"

COPY . .

# Runs write below the working folder, or wherever run.output_dir of a mounted recipe points.
RUN useradd --create-home --uid 10001 r1v2 && chown -R r1v2:r1v2 /workspace/megatron_r1v2
USER 10001
