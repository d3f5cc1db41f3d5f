"""The whole model: vision tower and adapter on the first pipeline stage, the language model over all stages.

A reward model has a scalar head on the last stage in place of the language model's output layer.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core.enums import ModelType
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule

from megatron_r1v2.config.choices import Part
from megatron_r1v2.models.adapter import Adapter
from megatron_r1v2.models.architecture import R1V2Architecture
from megatron_r1v2.models.language import build_language_model, language_transformer_config
from megatron_r1v2.models.score_head import ScoreHead
from megatron_r1v2.models.settings import ComputeSettings
from megatron_r1v2.models.shared_attention import SharedRowParams
from megatron_r1v2.models.vision import VisionTower, pixel_shuffle, vision_transformer_config


class R1V2Model(MegatronModule):
    """InternViT, adapter and reasoning LLM: the parts that live on this rank."""

    def __init__(
        self,
        architecture: R1V2Architecture,
        settings: ComputeSettings,
        *,
        groups: ProcessGroupCollection,
        pre_process: bool,
        post_process: bool,
        score_seed: int | None = None,
    ) -> None:
        """Build this rank's part, with random weights.

        Args:
            pre_process: this stage holds vision tower, adapter and embedding.
            post_process: this stage holds the output layer or the score head.
            score_seed: the seed of a reward model's head; None: a language model with its output layer.
        """
        super().__init__(config=language_transformer_config(architecture.language, settings))
        self.architecture = architecture
        self.groups = groups
        self.is_reward_model = score_seed is not None
        self.pre_process = pre_process
        self.post_process = post_process
        # megatron-core's schedules and its sum of tied gradients over stages read these two.
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = architecture.language.tied_embeddings and not self.is_reward_model
        self.vision: VisionTower | None = None
        self.adapter: Adapter | None = None
        if pre_process:
            vision_config = vision_transformer_config(architecture.vision, settings)
            self.vision = VisionTower(vision_config, architecture.vision, groups=groups)
            self.adapter = Adapter(
                vision_config,
                input_size=architecture.adapter_input_size,
                output_size=architecture.language.hidden_size,
                groups=groups,
            )
        self.language = build_language_model(
            architecture.language,
            self.config,
            layers=settings.layers,
            groups=groups,
            pre_process=pre_process,
            post_process=post_process,
            output_layer=not self.is_reward_model,
        )
        self.score: ScoreHead | None = None
        if post_process and score_seed is not None:
            hidden_size = architecture.language.hidden_size
            self.score = ScoreHead(self.config, hidden_size, groups=groups, seed=score_seed)

    @property
    def parts(self) -> list[Part]:
        """Return the parts of the whole model, on all stages."""
        return [part for part in Part if part is not Part.score or self.is_reward_model]

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        """Return the weight that embedding and output layer share; megatron-core sums its gradient over stages."""
        weight: torch.Tensor | None = self.language.shared_embedding_or_output_weight()
        return weight

    def set_input_tensor(self, input_tensor: torch.Tensor | list[torch.Tensor] | list[None]) -> None:
        """Take the hidden states of the previous stage; megatron-core's schedules call this."""
        self.language.set_input_tensor(input_tensor)

    def encode_tiles(self, tiles_TCHW: torch.Tensor) -> torch.Tensor:
        """Compute the features of tiles up to the adapter.

        Args:
            tiles_TCHW: uint8 [T, 3, height, width]; first pipeline stage only.

        Returns:
            [T, F, K], without a graph if the vision tower is frozen.
        """
        assert self.vision is not None, "the vision tower lives on the first pipeline stage"
        trained = torch.is_grad_enabled() and any(weight.requires_grad for weight in self.vision.parameters())
        with torch.set_grad_enabled(trained):
            return pixel_shuffle(
                self.vision(tiles_TCHW),
                ratio=self.architecture.downsample_ratio,
                version=self.architecture.pixel_shuffle,
            )

    def adapt(self, features_TFK: torch.Tensor, tile_index: torch.Tensor | None = None) -> torch.Tensor:
        """Project features to embeddings of the language model.

        Args:
            features_TFK: [T, F, K], from `encode_tiles`.
            tile_index: int64 [tiles of all rows], the index of each in T, if rows share tiles; None: in order.

        Returns:
            [tiles of all rows * F, H], in the order of the `<IMG_CONTEXT>` tokens.
        """
        assert self.adapter is not None, "the adapter lives on the first pipeline stage"
        embeddings_TFH: torch.Tensor = self.adapter(features_TFK)
        # After the projection, so that the responses to a prompt share its cost.
        if tile_index is not None:
            embeddings_TFH = embeddings_TFH[tile_index]
        return embeddings_TFH.flatten(0, 1)

    def embed(
        self,
        token_ids_BS: torch.Tensor,
        position_ids_BS: torch.Tensor,
        image_embeddings_FH: torch.Tensor | None,
        image_mask_BS: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embed tokens and put the image embeddings in; under sequence parallelism then split the sequence.

        Args:
            image_embeddings_FH: [image tokens of all rows, H] in row order; None without images.
            image_mask_BS: bool [B, S], the places of the embeddings; None: every `<IMG_CONTEXT>` token. A response may
                contain that token too, as an ordinary word.

        Returns:
            [S, B, H], or this rank's part of S under sequence parallelism.

        Raises:
            ValueError: the number of `<IMG_CONTEXT>` tokens and of embeddings differ.
        """
        hidden_SBH: torch.Tensor = self.language.embedding(input_ids=token_ids_BS, position_ids=position_ids_BS)
        is_image_BS = token_ids_BS == self.architecture.image_token_id if image_mask_BS is None else image_mask_BS
        num_tokens = int(is_image_BS.sum())
        num_embeddings = 0 if image_embeddings_FH is None else image_embeddings_FH.shape[0]
        if num_tokens != num_embeddings:
            raise ValueError(
                f"the batch has {num_tokens} <IMG_CONTEXT> tokens (id {self.architecture.image_token_id}) but its "
                f"tiles give {num_embeddings} embeddings ({self.architecture.tokens_per_tile} a tile); "
                "the prompt was tokenized for other images, or a text contains the token itself"
            )
        if image_embeddings_FH is not None and num_tokens:
            # Batch-first, since masked_scatter fills in memory order and the embeddings come row by row.
            hidden_BSH = hidden_SBH.transpose(0, 1)
            hidden_BSH = hidden_BSH.masked_scatter(is_image_BS.unsqueeze(-1), image_embeddings_FH.to(hidden_BSH.dtype))
            hidden_SBH = hidden_BSH.transpose(0, 1).contiguous()
        # Now, and not in the embedding: an image may cross the border between two ranks. A scatter, since the gradients
        # of a reduce-scatter divided by TP would be too small by TP.
        if self.config.sequence_parallel:
            hidden_SBH = scatter_to_sequence_parallel_region(hidden_SBH, group=self.groups.tp)
        return hidden_SBH

    def forward(
        self,
        token_ids_BS: torch.Tensor,
        position_ids_BS: torch.Tensor,
        *,
        tiles_TCHW: torch.Tensor | None = None,
        features_TFK: torch.Tensor | None = None,
        tile_index: torch.Tensor | None = None,
        image_mask_BS: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Run this stage on a microbatch.

        Args:
            token_ids_BS: int64 [B, S], padded on the right.
            tiles_TCHW: uint8 [T, 3, height, width]; read on the first stage if `features_TFK` is None.
            features_TFK: [T, F, K], the result of `encode_tiles` for these tiles.
            tile_index: see `adapt`.
            image_mask_BS: bool [B, S], see `embed`.
            packed_seq_params: the bounds of the sequences, if one row packs several, or the groups of a shared row.

        Returns:
            Logits [B, S, V / TP] on the last stage, or float32 scores [B, S] of a reward model, in both of a shared row
            those of its responses [1, R]; on other stages hidden states [S, B, H] for the next one.
        """
        hidden_SBH = None
        if self.pre_process:
            if features_TFK is None and tiles_TCHW is not None and tiles_TCHW.shape[0]:
                features_TFK = self.encode_tiles(tiles_TCHW)
            embeddings_FH = None
            if features_TFK is not None and features_TFK.shape[0]:
                embeddings_FH = self.adapt(features_TFK, tile_index)
            hidden_SBH = self.embed(token_ids_BS, position_ids_BS, embeddings_FH, image_mask_BS)
        output: torch.Tensor = self.language(
            input_ids=token_ids_BS,
            position_ids=position_ids_BS,
            # Causal attention over rows padded on the right needs none.
            attention_mask=None,
            decoder_input=hidden_SBH,
            packed_seq_params=packed_seq_params,
        )
        if self.score is None:
            return output
        scores_BS: torch.Tensor = self.score(output)
        if isinstance(packed_seq_params, SharedRowParams):
            assert packed_seq_params.responses is not None
            return scores_BS.index_select(1, packed_seq_params.responses)
        return scores_BS


def build_r1v2(
    architecture: R1V2Architecture,
    settings: ComputeSettings,
    *,
    groups: ProcessGroupCollection,
    device: torch.device,
    score_seed: int | None = None,
) -> R1V2Model:
    """Build this rank's part of the model on its device and in its dtype, with random weights that all train.

    Args:
        groups: process groups; pp decides which layers this stage holds.
        score_seed: the seed of a reward model's head; None: a language model with its output layer.
    """
    stage, stages = groups.pp.rank(), groups.pp.size()
    # With gradients enabled, TransformerEngine would keep unrounded copies of 8-bit weights.
    with torch.no_grad():
        model = R1V2Model(
            architecture,
            settings,
            groups=groups,
            pre_process=stage == 0,
            post_process=stage == stages - 1,
            score_seed=score_seed,
        )
    return model.to(device=device, dtype=settings.dtype)  # type: ignore[no-any-return]  # megatron-core has no types


def freeze_all_but(model: R1V2Model, parts: Iterable[Part]) -> list[str]:
    """Freeze all parameters but those of the parts that train; return the names of those on this rank.

    Call it before megatron-core's DDP and optimizer, which allocate gradients and states for all that is not frozen.
    """
    trained = {Part(part).value for part in parts}
    names = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".", 1)[0] in trained)
        if parameter.requires_grad:
            names.append(name)
    return names
