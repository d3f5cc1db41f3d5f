"""Names for what the watch sees: the phases of a step, and what the storages hold that each part of the code makes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from megatron.core.utils import GlobalMemoryBuffer

from megatron_r1v2.generation import phase as generation_phase
from megatron_r1v2.generation.controller import PromptImages
from megatron_r1v2.generation.engine import RolloutEngine
from megatron_r1v2.generation.features import FeatureCache
from megatron_r1v2.models.r1v2 import R1V2Model
from megatron_r1v2.monitoring.recorder import Recorder
from megatron_r1v2.rehearsal.ledger import (
    BUFFERS,
    GRADIENTS,
    IMAGE_FEATURES,
    KV_CACHE,
    OPTIMIZER,
    PARAMETERS,
)
from megatron_r1v2.rehearsal.watch import Watch, original, replace
from megatron_r1v2.stages import loaded_model, loaded_reward_model, session
from megatron_r1v2.stages.pairs import PairMaker
from megatron_r1v2.training.reference import ReferenceWeights
from megatron_r1v2.training.store import CheckpointStore

Result = TypeVar("Result")
LOAD, SET_UP, LOAD_CHECKPOINT = "load", "set-up", "load checkpoint"
GENERATE, CONTINUE, EVALUATE = "generate", "continue", "evaluate"
_CONTINUING = "_continue_without_images"


def install(watch: Watch) -> None:
    """Let a watch know phases and categories; in a process of its own, where nothing is put back."""
    ledger = watch.ledger

    @contextmanager
    def timed(self: Recorder, phase: str) -> Iterator[None]:
        with watch.phase(phase), original_timed(self, phase):
            yield

    @contextmanager
    def in_place_of(self: ReferenceWeights, model: R1V2Model) -> Iterator[None]:
        manager = original_in_place_of(self, model)
        with ledger.holding(BUFFERS):  # the weights in training, while those of the reference are in the model
            manager.__enter__()
        try:
            yield
        finally:
            manager.__exit__(None, None, None)

    def wrap_with_ddp(*args: object) -> DistributedDataParallel:
        with ledger.holding(GRADIENTS):
            ddp: DistributedDataParallel = original_wrap(*args)
        ledger.assign([buffer.param_data for buffer in ddp.buffers if buffer.param_data is not None], PARAMETERS)
        return ddp

    def make_context(*args: object) -> DynamicInferenceContext:
        with ledger.holding(BUFFERS):
            context: DynamicInferenceContext = original_context(*args)
        ledger.assign([context.memory_buffer], KV_CACHE)
        return context

    def keep(self: FeatureCache, key: str, features_TFK: torch.Tensor) -> None:
        ledger.assign([features_TFK], IMAGE_FEATURES)
        original_keep(self, key, features_TFK)

    def images(self: RolloutEngine, *args: object) -> dict[str, PromptImages]:
        found: dict[str, PromptImages] = original_images(self, *args)
        ledger.assign([image.embeddings_FH for image in found.values()], IMAGE_FEATURES)
        return found

    original_timed, original_in_place_of = original(Recorder, "timed"), original(ReferenceWeights, "in_place_of")
    original_wrap, original_context = original(session, "wrap_with_ddp"), original(generation_phase, "make_context")
    original_keep, original_images = original(FeatureCache, "_keep"), original(RolloutEngine, "_images")
    for owner, name, function in (
        (Recorder, "timed", timed),
        (ReferenceWeights, "in_place_of", in_place_of),
        (session, "wrap_with_ddp", wrap_with_ddp),
        (generation_phase, "make_context", make_context),
        (FeatureCache, "_keep", keep),
        (RolloutEngine, "_images", images),
        (loaded_model, "load_model", _in(watch.phase, LOAD, original(loaded_model, "load_model"))),
        (loaded_reward_model, "load_model", _in(watch.phase, LOAD, original(loaded_reward_model, "load_model"))),
        (session, "_build_policy", _in(watch.phase, SET_UP, original(session, "_build_policy"))),
        (CheckpointStore, "load", _in(watch.phase_alone, LOAD_CHECKPOINT, original(CheckpointStore, "load"))),
        (PairMaker, "_respond", _in(watch.phase, GENERATE, original(PairMaker, "_respond"))),
        (PairMaker, _CONTINUING, _in(watch.phase, CONTINUE, original(PairMaker, _CONTINUING))),
        (loaded_model, "build_r1v2", _in(ledger.holding, PARAMETERS, original(loaded_model, "build_r1v2"))),
        (session, "build_optimizer", _in(ledger.holding, OPTIMIZER, original(session, "build_optimizer"))),
        (session, "ReferenceWeights", _in(ledger.holding, BUFFERS, ReferenceWeights)),
        # What sequence parallelism gathers into, kept by megatron-core for all layers.
        (GlobalMemoryBuffer, "get_tensor", _in(ledger.holding, BUFFERS, original(GlobalMemoryBuffer, "get_tensor"))),
    ):
        replace(owner, name, function)


def _in(block: Callable[..., object], name: str, function: Callable[..., Result]) -> Callable[..., Result]:
    """Make a function that runs in a block of the watch."""

    @functools.wraps(function, updated=())
    def call(*args: object, **kwargs: object) -> Result:
        with block(name):  # type: ignore[attr-defined]  # a context manager
            return function(*args, **kwargs)

    return call
