"""The whole model: vision tower and adapter on the first pipeline stage, the language model over all stages.

A reward model is the same with a scalar head on the last stage in place of the language model's output layer.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core.enums import ModelType
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule

from megatron_r1v2.config.schema import Part
from megatron_r1v2.models.adapter import Adapter
from megatron_r1v2.models.architecture import R1V2Architecture
from megatron_r1v2.models.language import build_language_model, language_transformer_config
from megatron_r1v2.models.score_head import ScoreHead
from megatron_r1v2.models.settings import ComputeSettings
from megatron_r1v2.models.vision import VisionTower, pixel_shuffle, vision_transformer_config


class R1V2Model(MegatronModule):
    """InternViT, adapter and reasoning LLM, as far as they live on this rank."""

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
            architecture: the sizes.
            settings: layout and numerics.
            groups: process groups.
            pre_process: this stage holds vision tower, adapter and embedding.
            post_process: this stage holds the output layer or the score head.
            score_seed: what a score head is drawn from; None: a language model with its output layer.
        """
        super().__init__(config=language_transformer_config(architecture.language, settings))
        self.architecture = architecture
        self.groups = groups
        self.pre_process = pre_process
        self.post_process = post_process
        self.model_type = ModelType.encoder_or_decoder
        self.is_reward_model = score_seed is not None
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
        """Return the parts that the model has, on this stage or another."""
        return [part for part in Part if part is not Part.score or self.is_reward_model]

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        """Return the weight that embedding and output layer share; megatron-core sums its gradient over stages."""
        return self.language.shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor: torch.Tensor | list[torch.Tensor]) -> None:
        """Take the hidden states of the stage before; called by megatron-core's schedules."""
        self.language.set_input_tensor(input_tensor)

    def encode_tiles(self, tiles_TCHW: torch.Tensor) -> torch.Tensor:
        """Compute the features of tiles up to the adapter; without a graph when the vision tower is frozen.

        Args:
            tiles_TCHW: uint8 [T, 3, height, width]; first pipeline stage only.

        Returns:
            [T, F, K].
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
        """Turn features into embeddings of the language model.

        Args:
            features_TFK: [T, F, K], from `encode_tiles`.
            tile_index: int64 [tiles of all rows]: which tile each is, when rows share tiles; None: in order.

        Returns:
            [tiles of all rows * F, H], in the order of the `<IMG_CONTEXT>` tokens.
        """
        assert self.adapter is not None, "the adapter lives on the first pipeline stage"
        embeddings_TFH = self.adapter(features_TFK)
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
        """Embed tokens at full length, put the images in, then scatter to sequence parallel.

        Args:
            token_ids_BS: int64 [B, S].
            position_ids_BS: int64 [B, S].
            image_embeddings_FH: [image tokens of all rows, H] in row order; None where there is no image.
            image_mask_BS: bool [B, S], where the embeddings go; None: at every `<IMG_CONTEXT>` token. A response may
                contain that token, which is then a word like any other.

        Returns:
            [S, B, H], or this rank's part of S under sequence parallelism.

        Raises:
            ValueError: the number of `<IMG_CONTEXT>` tokens and of embeddings differ.
        """
        hidden_SBH = self.language.embedding(input_ids=token_ids_BS, position_ids=position_ids_BS)
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
            hidden_BSH = hidden_SBH.transpose(0, 1)
            hidden_BSH = hidden_BSH.masked_scatter(is_image_BS.unsqueeze(-1), image_embeddings_FH.to(hidden_BSH.dtype))
            hidden_SBH = hidden_BSH.transpose(0, 1).contiguous()
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
            position_ids_BS: int64 [B, S].
            tiles_TCHW: uint8 [T, 3, height, width]; used on the first stage when `features_TFK` is not given.
            features_TFK: [T, F, K], what `encode_tiles` gave for these tiles.
            tile_index: int64 [tiles of all rows]: which of the T tiles each is, when rows share them; None: in order.
            image_mask_BS: bool [B, S], see `embed`.
            packed_seq_params: where sequences begin and end when B = 1 packs several.

        Returns:
            Logits [B, S, V / TP] on the last stage, or float32 scores [B, S] of a reward model; on other stages hidden
            states [S, B, H] for the next one.
        """
        hidden_SBH = None
        if self.pre_process:
            if features_TFK is None and tiles_TCHW is not None and tiles_TCHW.shape[0]:
                features_TFK = self.encode_tiles(tiles_TCHW)
            embeddings_FH = None
            if features_TFK is not None and features_TFK.shape[0]:
                embeddings_FH = self.adapt(features_TFK, tile_index)
            hidden_SBH = self.embed(token_ids_BS, position_ids_BS, embeddings_FH, image_mask_BS)
        output = self.language(
            input_ids=token_ids_BS,
            position_ids=position_ids_BS,
            attention_mask=None,
            decoder_input=hidden_SBH,
            packed_seq_params=packed_seq_params,
        )
        return output if self.score is None else self.score(output)


def build_r1v2(
    architecture: R1V2Architecture,
    settings: ComputeSettings,
    *,
    groups: ProcessGroupCollection,
    device: torch.device,
    score_seed: int | None = None,
) -> R1V2Model:
    """Build this rank's part of the model on its device and in its dtype, with random weights.

    Args:
        architecture: the sizes.
        settings: layout and numerics.
        groups: process groups; pp decides what this stage holds.
        device: where the weights live.
        score_seed: what the head of a reward model is drawn from; None: a language model with its output layer.

    Returns:
        The model, every parameter trainable.
    """
    stage, stages = groups.pp.rank(), groups.pp.size()
    # Nothing is differentiated here, and where it could be, TransformerEngine keeps unrounded copies of 8-bit weights.
    with torch.no_grad():
        model = R1V2Model(
            architecture,
            settings,
            groups=groups,
            pre_process=stage == 0,
            post_process=stage == stages - 1,
            score_seed=score_seed,
        )
    return model.to(device=device, dtype=settings.dtype)


def freeze_all_but(model: R1V2Model, parts: Iterable[Part]) -> list[str]:
    """Freeze what does not train; must come before megatron-core's DDP, which gives buffers to what trains.

    Args:
        model: this rank's part.
        parts: vision, adapter, language, score.

    Returns:
        Names of the parameters on this rank that train.
    """
    trained = {Part(part).value for part in parts}
    names = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".", 1)[0] in trained)
        if parameter.requires_grad:
            names.append(name)
    return names
