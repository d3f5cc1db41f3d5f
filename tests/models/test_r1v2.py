"""The whole model: logits and gradients of transformers, where the images go, what is frozen."""

import pytest
import torch

from megatron_r1v2.config.schema import Part
from megatron_r1v2.models.r1v2 import build_r1v2, freeze_all_but
from megatron_r1v2.models.settings import ComputeSettings
from megatron_r1v2.models.shared_attention import PackedRowParams, SharedGroup, SharedRowParams
from tests.device_reads import CountReads
from tests.models.parity import MEAN, STD, difference, gradient_differences, model_pair, random_tiles

VARIANTS = {"300m": {"family": "300m"}, "6b": {"family": "6b"}, "tied": {"tied": True}}


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory, context):
    return model_pair(tmp_path_factory.mktemp("whole"), context, **VARIANTS[request.param])


@pytest.fixture
def ours(pair):
    model = pair[0]
    model.zero_grad(set_to_none=True)
    model.requires_grad_(True)
    return model


def token_rows(image_token_id: int) -> torch.Tensor:
    """Return a row with two tiles of 16 tokens and a row with one."""
    token_ids_BS = torch.randint(0, 250, (2, 48), generator=torch.Generator().manual_seed(0))
    token_ids_BS[0, 3:35] = image_token_id
    token_ids_BS[1, 5:21] = image_token_id
    return token_ids_BS


def positions(token_ids_BS: torch.Tensor) -> torch.Tensor:
    return torch.arange(token_ids_BS.shape[1]).expand_as(token_ids_BS)


def test_logits_and_gradients_are_those_of_transformers(ours, pair):
    _, theirs = pair
    theirs.zero_grad(set_to_none=True)
    tiles_TCHW, token_ids_BS = random_tiles(3), token_rows(theirs.config.image_token_id)
    got_BSV = ours(token_ids_BS, positions(token_ids_BS), tiles_TCHW=tiles_TCHW)
    expected_BSV = theirs(input_ids=token_ids_BS, pixel_values=(tiles_TCHW / 255 - MEAN) / STD).logits
    assert difference(got_BSV, expected_BSV) < 1e-5
    direction_BSV = torch.randn(got_BSV.shape, generator=torch.Generator().manual_seed(1))
    (got_BSV * direction_BSV).sum().backward()
    (expected_BSV * direction_BSV).sum().backward()
    differences = gradient_differences(ours, theirs, ["vision", "adapter", "language"])
    assert max(differences.values()) < 1e-4, differences


def test_text_alone_needs_no_tiles(ours, pair):
    _, theirs = pair
    token_ids_BS = torch.randint(0, 250, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected_BSV = theirs(input_ids=token_ids_BS).logits
        for tiles_TCHW in (None, torch.zeros(0, 3, 32, 32, dtype=torch.uint8)):
            got_BSV = ours(token_ids_BS, positions(token_ids_BS), tiles_TCHW=tiles_TCHW)
            assert difference(got_BSV, expected_BSV) < 1e-5


def test_rows_share_tiles_through_the_index_and_features_stand_for_tiles(ours):
    token_ids_BS = token_rows(ours.architecture.image_token_id)
    tiles_TCHW = random_tiles(2)
    index = torch.tensor([1, 0, 1])
    with torch.no_grad():
        written_out = ours(token_ids_BS, positions(token_ids_BS), tiles_TCHW=tiles_TCHW[index])
        shared = ours(token_ids_BS, positions(token_ids_BS), tiles_TCHW=tiles_TCHW, tile_index=index)
        features_TFK = ours.encode_tiles(tiles_TCHW)
        cached = ours(token_ids_BS, positions(token_ids_BS), features_TFK=features_TFK, tile_index=index)
        swapped = ours(token_ids_BS, positions(token_ids_BS), features_TFK=features_TFK, tile_index=1 - index)
    assert features_TFK.shape == (2, 16, ours.architecture.adapter_input_size)
    assert difference(shared, written_out) < 1e-5
    assert difference(cached, written_out) < 1e-5
    assert difference(swapped, written_out) > 1e-3


@pytest.mark.parametrize(("tiles", "embeddings"), [(0, 0), (2, 32), (4, 64)])
def test_a_mismatch_of_image_tokens_names_both_numbers(ours, tiles, embeddings):
    token_ids_BS = token_rows(ours.architecture.image_token_id)
    with pytest.raises(ValueError, match=rf"48 <IMG_CONTEXT> tokens .* {embeddings} embeddings \(16 a tile\)"):
        ours(token_ids_BS, positions(token_ids_BS), tiles_TCHW=random_tiles(tiles))


def test_the_image_token_in_a_response_is_a_word_like_any_other(ours):
    image_token_id = ours.architecture.image_token_id
    token_ids_BS = token_rows(image_token_id)
    image_mask_BS = token_ids_BS == image_token_id
    tiles_TCHW = random_tiles(3)
    with_word_BS = token_ids_BS.clone()
    with_word_BS[0, 40] = image_token_id
    with pytest.raises(ValueError, match="49 <IMG_CONTEXT> tokens .* 48 embeddings"):
        ours(with_word_BS, positions(token_ids_BS), tiles_TCHW=tiles_TCHW)
    got = ours(with_word_BS, positions(token_ids_BS), tiles_TCHW=tiles_TCHW, image_mask_BS=image_mask_BS)
    got[0, 40:].sum().backward()
    table = ours.language.embedding.word_embeddings.weight
    assert table.grad[image_token_id].abs().max() > 0
    unused = 280  # a word with the same embedding says the same
    with torch.no_grad():
        table[unused] = table[image_token_id]
        with_word_BS[0, 40] = unused
        same = ours(with_word_BS, positions(token_ids_BS), tiles_TCHW=tiles_TCHW, image_mask_BS=image_mask_BS)
    others = torch.arange(got.shape[-1]) != unused  # a tied output has changed there
    assert difference(same[..., others], got[..., others]) < 1e-5


def test_packed_rows_are_separate_rows(ours):
    """Each sequence of a packed row begins at position 0 and sees itself only."""
    image_token_id = ours.architecture.image_token_id
    rows = token_rows(image_token_id)
    lengths, tiles_TCHW = (44, 29, 10), random_tiles(3)
    text = torch.randint(0, 250, (1, 10), generator=torch.Generator().manual_seed(3))
    pieces = [rows[:1, :44], rows[1:, :29], text]
    packed_BS = torch.cat(pieces, dim=1)
    position_ids_BS = torch.cat([torch.arange(length) for length in lengths])[None]
    packing = PackedRowParams(
        qkv_format="sbhd",
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        positions_S=position_ids_BS[0],
        bounds=(0, 44, 73, 83),
    )
    with torch.no_grad():
        together = ours(packed_BS, position_ids_BS, tiles_TCHW=tiles_TCHW, packed_seq_params=packing)
        alone = [
            ours(pieces[0], positions(pieces[0]), tiles_TCHW=tiles_TCHW[:2]),
            ours(pieces[1], positions(pieces[1]), tiles_TCHW=tiles_TCHW[2:]),
            ours(pieces[2], positions(pieces[2])),
        ]
    assert difference(together, torch.cat(alone, dim=1)) < 1e-5


def test_rows_of_several_sequences_read_no_bounds(ours):
    """On a GPU the host would wait for the device in each layer."""
    positions_S = torch.cat([torch.arange(6), torch.arange(4)])
    lengths = {"qkv_format": "sbhd", "max_seqlen_q": 6, "max_seqlen_kv": 6, "positions_S": positions_S}
    rows = {
        "packed": PackedRowParams(**lengths, bounds=(0, 6, 10)),
        "shared": SharedRowParams(
            **lengths, groups=(SharedGroup(0, 4, (6,)), SharedGroup(6, 10)), responses=torch.tensor([4, 5])
        ),
    }
    for name, row in rows.items():
        with CountReads() as reads:
            ours.language(torch.zeros(1, 10).long(), positions_S[None], None, packed_seq_params=row).sum().backward()
        assert reads.ours + reads.theirs == {}, name


@pytest.mark.parametrize(
    "parts", [("adapter",), ("adapter", "vision"), ("language",), ("vision", "adapter", "language")]
)
def test_only_the_named_parts_get_gradients(ours, parts):
    names = freeze_all_but(ours, [Part(part) for part in parts])
    assert {name.split(".")[0] for name in names} == set(parts)
    token_ids_BS = token_rows(ours.architecture.image_token_id)
    ours(token_ids_BS, positions(token_ids_BS), tiles_TCHW=random_tiles(3)).square().sum().backward()
    got = {name for name, parameter in ours.named_parameters() if parameter.grad is not None}
    assert got == set(names)
    assert ours.encode_tiles(random_tiles(1)).requires_grad == ("vision" in parts)
    with torch.no_grad():
        assert not ours.encode_tiles(random_tiles(1)).requires_grad


def test_bf16_is_a_dtype_of_every_parameter(ours, context):
    settings = ComputeSettings(dtype=torch.bfloat16)
    model = build_r1v2(ours.architecture, settings, groups=context.groups, device=context.device)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model.load_state_dict(ours.state_dict())
    token_ids_BS = token_rows(ours.architecture.image_token_id)
    with torch.no_grad():
        rounded = model(token_ids_BS, positions(token_ids_BS), tiles_TCHW=random_tiles(3))
        expected = ours(token_ids_BS, positions(token_ids_BS), tiles_TCHW=random_tiles(3))
    assert difference(rounded.float(), expected) < 0.05
