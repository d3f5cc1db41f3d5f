"""Names of phases and of what holds memory, put on by the functions that make it."""

import gc
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from megatron.core.utils import GlobalMemoryBuffer

from megatron_r1v2.generation import phase as generation_phase
from megatron_r1v2.generation.engine import RolloutEngine
from megatron_r1v2.generation.features import FeatureCache
from megatron_r1v2.monitoring.recorder import Recorder
from megatron_r1v2.rehearsal import labels
from megatron_r1v2.rehearsal.ledger import (
    ACTIVATIONS,
    BUFFERS,
    GRADIENTS,
    IMAGE_FEATURES,
    KV_CACHE,
    OPTIMIZER,
    PARAMETERS,
)
from megatron_r1v2.rehearsal.watch import Watch
from megatron_r1v2.stages import loaded_model, session
from megatron_r1v2.stages.pairs import PairMaker
from megatron_r1v2.training.reference import ReferenceWeights
from megatron_r1v2.training.store import CheckpointStore


def ones(*_):
    return torch.ones(10)


class Reference:
    """Weights of a reference."""

    def __init__(self):
        self.kept = ones()

    in_place_of = None


def test_what_is_made_is_named_after_the_function_that_makes_it(undone):
    undone.setattr(loaded_model, "build_r1v2", ones)
    undone.setattr(session, "build_optimizer", ones)
    undone.setattr(labels, "ReferenceWeights", Reference)
    undone.setattr(GlobalMemoryBuffer, "get_tensor", ones)
    undone.setattr(
        session,
        "wrap_with_ddp",
        lambda *_: SimpleNamespace(buffers=[SimpleNamespace(param_data=ones(), grad_data=torch.ones(20))]),
    )
    undone.setattr(
        generation_phase,
        "make_context",
        lambda *_: SimpleNamespace(memory_buffer=torch.ones(30), block_table=torch.ones(2)),
    )
    undone.setattr(FeatureCache, "_keep", lambda *_: None)
    undone.setattr(RolloutEngine, "_images", lambda *_: {"a": SimpleNamespace(embeddings_FH=torch.ones(4))})
    watch = Watch("cpu")
    labels.install(watch)
    with watch, watch.phase("all"):
        kept = [
            loaded_model.build_r1v2(),
            session.build_optimizer(),
            session.ReferenceWeights(),
            GlobalMemoryBuffer.get_tensor(None),
            session.wrap_with_ddp(),
            generation_phase.make_context(),
            RolloutEngine._images(None),
            features := torch.ones(5),
        ]
        FeatureCache._keep(None, "key", features)
        held = dict(watch.ledger.by_category)
    assert held == {
        PARAMETERS: 80,
        OPTIMIZER: 40,
        BUFFERS: 80 + 8,
        GRADIENTS: 80,
        KV_CACHE: 120,
        IMAGE_FEATURES: 16 + 20,
        ACTIVATIONS: 0,
    }
    del kept, features
    gc.collect()


def test_weights_of_the_policy_are_buffers_while_the_reference_is_in_the_model(undone):
    seen = []

    @contextmanager
    def in_place_of(_, model):
        kept = ones()
        yield
        del kept

    undone.setattr(ReferenceWeights, "in_place_of", in_place_of)
    watch = Watch("cpu")
    labels.install(watch)
    with watch, watch.phase("update"):
        with ReferenceWeights.in_place_of(None, None):
            inside = torch.ones(3)
            seen.append(dict(watch.ledger.by_category))
        gc.collect()
        after = watch.ledger.by_category[BUFFERS]
    assert seen == [{BUFFERS: 40, ACTIVATIONS: 12}]
    assert after == 0
    del inside


def test_phases_are_those_of_the_recorder_and_of_the_set_up(undone):
    @contextmanager
    def timed(*_):
        yield

    watch = Watch("cpu")
    phase = []

    def note(*_, **__):
        phase.append(watch.ledger.current_phase)

    undone.setattr(Recorder, "timed", timed)
    for owner, name in (
        (loaded_model, "load_model"),
        (session, "_build_policy"),
        (CheckpointStore, "load"),
        (PairMaker, "_respond"),
        (PairMaker, "_continue_without_images"),
    ):
        undone.setattr(owner, name, note)
    labels.install(watch)
    with watch, watch.phase("start"):
        with Recorder.timed(None, "update"):
            note()
            CheckpointStore.load(None)
        loaded_model.load_model()
        session._build_policy()
        PairMaker._respond(None)
        PairMaker._continue_without_images(None)
    assert phase == ["update", "load checkpoint", "load", "set-up", "generate", "continue"]
