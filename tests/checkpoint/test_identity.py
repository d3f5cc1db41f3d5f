"""The identity of a model: the same however it is stored, another for every bit."""

from __future__ import annotations

import hashlib

import torch

from megatron_r1v2.checkpoint.identity import architecture_json, combined_digest, model_digest, tensor_identity
from megatron_r1v2.checkpoint.sources import CheckpointSpec, HfSpec


def test_dtype_shape_and_every_bit_count():
    tensor = torch.arange(6, dtype=torch.int32).reshape(2, 3)
    identity = tensor_identity(tensor)
    assert identity.sha256 == hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    assert str(identity) == f"int32 [2, 3] {identity.sha256[:12]}"
    others = [tensor.reshape(3, 2), tensor.view(torch.float32), tensor.clone().index_fill_(0, torch.tensor(1), 9)]
    assert identity not in [tensor_identity(other) for other in others]
    assert tensor_identity(tensor.T.contiguous().T) == identity


def test_the_order_of_tensors_does_not_count_and_their_names_do():
    a, b = tensor_identity(torch.zeros(1)), tensor_identity(torch.ones(1))
    assert combined_digest({"a": a, "b": b}) == combined_digest({"b": b, "a": a})
    assert combined_digest({"a": a, "b": b}) != combined_digest({"a": b, "b": a})


def test_a_model_has_one_digest_in_every_format(made):
    digests = set()
    for spec in (HfSpec(made / "hf"), HfSpec(made / "chat"), CheckpointSpec(made / "megatron")):
        with spec.open() as source:
            digests.add(model_digest(source, parts=("vision", "adapter"), workers=2))
            assert architecture_json(source.architecture) == architecture_json(
                source.architecture.__dict__
                | {part: vars(getattr(source.architecture, part)) for part in ("vision", "language")}
            )
    assert len(digests) == 1
    with HfSpec(made / "other").open() as other:
        assert model_digest(other, parts=("vision", "adapter"), workers=1) not in digests
