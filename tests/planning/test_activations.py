"""Bytes of a block, tensor by tensor, of a model small enough to count them by hand.

Rows of 8 tokens; the letters of the sums: n tokens, w bytes of an element. test_passes.py holds the same numbers
against measured ones.
"""

from dataclasses import replace

import pytest

from megatron_r1v2.config.choices import Part, Recompute
from megatron_r1v2.planning.activations import ActivationModel, MicrobatchShape
from megatron_r1v2.planning.parameters import Layout
from tests.planning.plans import SMALL

BATCH = MicrobatchShape(rows=2, tokens=8, tiles=1)  # n = 16
ADAPTER, LANGUAGE, VISION = (Part.adapter,), (Part.language,), (Part.vision,)


def model(parts=ADAPTER, *, element_bytes=4, recompute=Recompute.none, architecture=SMALL, **layout):
    return ActivationModel(architecture, Layout(**layout), parts, element_bytes, recompute)


def test_hidden_states_are_split_by_sequence_parallelism_only():
    hidden = 16 * 16 * 4
    assert model().hidden(BATCH) == model(tensor=2).hidden(BATCH) == hidden
    assert model(tensor=2, sequence=True).hidden(BATCH) == hidden // 2
    assert model(element_bytes=2).hidden(BATCH) == hidden // 2


def test_text_alone_has_a_graph_only_where_the_language_model_trains():
    text = replace(BATCH, tiles=0)
    assert [model(parts).has_graph(text) for parts in (ADAPTER, VISION, LANGUAGE)] == [False, False, True]
    assert model().has_graph(BATCH)


def test_a_frozen_decoder_layer_in_fp32():
    block = model().language_layer(BATCH)
    norms = 2 * 1024  # two inputs of n x 16 channels x w
    rotary = 4 * 8 * 4 * 4
    qkv = 16 * 4 * (16 + 2 * 8)  # heads of queries, keys and values
    rotated = 16 * 4 * (16 + 8)
    attention = 1024 + 16 * 4 * 4  # the output and one number a query and head
    mlp = 4 * (16 * 4 * 32)
    assert block.saved == norms + rotary + qkv + rotated + attention + mlp == 15_616
    assert block.forward == 5 * 2048 + 3 * 1024 + 1024
    assert block.backward == 3 * 2048
    assert model().language_layer_end(BATCH) == 1024 + 2 * 1024 + 2048, "fc2's output twice, the sum, fc2's input"


def test_a_trained_decoder_layer_keeps_the_inputs_of_its_matrices():
    block = model(LANGUAGE).language_layer(BATCH)
    # Both norms keep their results too, the MLP the input of fc2, and qkv and fc1 theirs.
    assert block.saved == 15_616 + 2 * 1024 + 2048 + 2 * 1024
    assert block.backward == 2048 + 32 * 16 * 4 + 1024  # a gradient of fc2's weight beside its input's and its output's
    assert model(LANGUAGE).language_layer_end(BATCH) == 3 * 1024


def test_selective_recomputation_drops_the_output_of_attention():
    none, selective = (
        model(recompute=kind).language_layer(BATCH).saved for kind in (Recompute.none, Recompute.selective)
    )
    assert none - selective == 1024 + 256
    trained = [
        model(LANGUAGE, recompute=kind).language_layer(BATCH).saved for kind in (Recompute.none, Recompute.selective)
    ]
    assert trained[0] - trained[1] == 256, "the projection's weight gradient needs the output"


def test_bf16_norms_keep_two_float32_copies():
    block = model(element_bytes=2).language_layer(BATCH)
    # Everything but the norms and the float32 number of each query and head halves.
    assert block.saved == 2 * (2 * 1024) + 256 + (15_616 - 2048 - 256) // 2


def test_a_rank_without_a_key_head_of_its_own_gathers_its_group():
    block = model(tensor=4).language_layer(BATCH)
    qkv = 16 * 4 * (2 * 4 + 2 * 4)  # the two query heads of its group, one head of keys and of values
    attention = 256 + 16 * 1 * 4
    assert block.saved == 2048 + 512 + qkv + 16 * 4 * (4 + 4) + attention + 4 * (16 * 4 * 8)


def test_norms_of_queries_and_keys_keep_their_inputs():
    qwen3 = replace(SMALL, language=replace(SMALL.language, qk_norm=True))
    queries, both = 16 * 4 * 16, 16 * 4 * (16 + 8)
    frozen, trained = model(architecture=qwen3), model(LANGUAGE, architecture=qwen3)
    assert frozen.language_layer(BATCH).saved == 15_616 + queries
    assert trained.language_layer(BATCH).saved == model(LANGUAGE).language_layer(BATCH).saved + queries + both
    half = model(element_bytes=2, architecture=qwen3).language_layer(BATCH).saved
    assert half - model(element_bytes=2).language_layer(BATCH).saved == 4 * both // 2


def test_a_layer_of_the_vision_tower():
    # One tile: m = 5. Hidden states 160 bytes, all heads 160, the MLP's middle 320.
    block = model(VISION).vision_layer(1)
    plain = 2 * 160 + 2 * 160 + 2 * 320 + (3 + 1) * 160 + 5 * 2 * 4
    assert block.saved == 2 * (160 + 160) + plain + 2 * (160 + 160 + 160) == 3_560
    # The layer's input and the norm's output; three projections, normed queries, and of the keys three while they are.
    assert block.forward == 2 * 160 + 7 * 160
    assert model(VISION, element_bytes=2).vision_layer(1).forward == 2 * 80 + 9 * 80, "two of the keys in float32"
    # Float32 pixels of 4 x 4, four patches, and twice those with the class token.
    assert model(VISION).vision_front(1) == 3 * 16 * 4 + (4 + 5 + 5) * 8 * 4
    assert block.backward == 2 * 320 + 2 * 160 + 160
    family_300m = replace(SMALL, vision=replace(SMALL.vision, norm="layer_norm", qk_norm=False))
    assert model(VISION, architecture=family_300m).vision_layer(1).saved == 2 * 160 + plain
    broad = replace(family_300m, vision=replace(family_300m.vision, ffn_size=32))
    assert model(VISION, architecture=broad).vision_layer(1).forward == 3 * 160 + 2 * 640, "before and after GELU"
    assert model(VISION).vision_layer(3).saved == 3 * 3_560


def test_zero_heads_of_the_vision_tower_cost_their_part():
    two, four = (model(VISION, tensor=tensor).vision_layer(1).saved for tensor in (2, 4))
    # One head a rank either way, of 80 bytes a tensor and 20 of sums; the MLP halves once more.
    assert two - four == 2 * (160 - 80)


@pytest.mark.parametrize(
    ("parts", "saved"),
    [(ADAPTER, 2 * 128 + 2 * 64), (VISION, 128 + 64), (LANGUAGE, 0)],
    ids=["trained", "passed through", "frozen"],
)
def test_the_adapter(parts, saved):
    # An image token of 32 channels a tile, and 16 after it.
    block = model(parts).adapter(1)
    assert block.saved == saved
    assert (block.forward, block.backward) == (2 * 128 + 2 * 64 + 64, 2 * 128)


def test_the_head_keeps_a_float32_softmax():
    logits = 16 * 64
    frozen = model().head(BATCH)
    assert frozen.saved == 1024 + 4 * logits
    assert (frozen.forward, frozen.backward) == (4 * logits + 4 * logits, 4 * logits)
    measured = replace(model(), measures_entropy=True).head(BATCH)
    assert (measured.saved, measured.backward) == (frozen.saved, 4 * 4 * logits), (
        "logits and four of all positions, in place of the softmax"
    )
    long = replace(BATCH, rows=1, tokens=1024 + 768)  # positions in two parts
    measured = replace(model(), measures_entropy=True).head(long)
    first, second = 1024 * 64 * 4, 768 * 64 * 4
    assert measured.backward == 2 * first + 3 * second, "of the first part shifted and exponentials"
    half = replace(model(element_bytes=2), measures_entropy=True).head(long)
    assert half.backward == (first + second) // 2 + 3 * first + 2 * second - (first + second)
    trained = model(LANGUAGE).head(BATCH)
    assert trained.saved == 1024 + 1024 + 1024 + 4 * logits
    assert trained.backward == 64 * 16 * 4 + 1024, "the weight's gradient and the gathered input"
    half = model(element_bytes=2).head(BATCH)
    assert half.saved == 2 * 1024 + 4 * logits
    assert half.backward == 6 * logits
    assert model(element_bytes=2, tensor=2).head(BATCH).backward == 3 * logits
    both = model(LANGUAGE, tensor=2).head(BATCH).backward
    assert both == 64 // 2 * 16 * 4 + 2 * 1024, "half of the weight's gradient, the gathered input and its gradient"


def test_the_head_of_a_reward_model_keeps_hidden_states_in_float32():
    # 16 tokens of 16 channels.
    block = model([*ADAPTER, Part.score], element_bytes=2).head(BATCH)
    norm = 2 * 1024  # two copies in float32
    assert (block.saved, block.forward, block.backward) == (norm + 1024, norm + 1024, 1024 + 512)
    assert model([Part.score]).has_graph(replace(BATCH, tiles=0))
