"""The peak of a forward, or forward and backward, pass on one rank, which decides whether it fits."""

from __future__ import annotations

from megatron_r1v2.config.choices import Part, Recompute
from megatron_r1v2.generation.features import TILES_PER_PASS
from megatron_r1v2.planning.activations import ActivationModel, MicrobatchShape


def training_peak(model: ActivationModel, batch: MicrobatchShape, *, stage: int, microbatches: int) -> int:
    """Compute the peak of forward and backward passes under the 1F1B schedule.

    Args:
        batch: the largest microbatch.
        stage: pipeline stage, from 0.
        microbatches: number of microbatches of one update on this rank.

    Returns:
        Bytes on top of parameters, DDP buffers and optimizer state.
    """
    if not model.has_graph(batch):
        return log_probs_peak(model, batch, stage=stage)
    # 1F1B: a stage starts one microbatch for each stage from itself to the end before its first backward pass.
    in_flight = min(model.layout.pipeline - stage, microbatches)
    kept = _kept_for_backward(model, batch, stage)
    layers = model.layout.layers_of_stage(model.architecture, stage)
    layer = model.language_layer(batch)
    full = model.recompute is Recompute.full
    gradient = model.hidden(batch)
    end = model.language_layer_end(batch)
    if full:
        # A recomputed layer has its input already.
        again = layer.saved - (gradient if model.element_bytes == 4 else 0)
        one_layer = again + max(layer.backward, end) + gradient
    else:
        # The embeddings of all tokens lie beside the forward pass.
        tokens = model.layout.tensor if model.layout.sequence else 1
        one_layer = max(layer.backward + gradient, end + (tokens * model.hidden(batch) if stage == 0 else 0))
    moments = [kept + one_layer if layers else kept]
    if stage == model.layout.pipeline - 1:
        head = model.head(batch)
        moments.append(kept + head.saved + head.backward)
    if stage == 0:
        moments.append(_front_backward(model, batch))
        if not batch.is_encoded:
            moments.append((in_flight - 1) * kept + vision_peak(model, batch.tiles))
    return (in_flight - 1) * kept + max(moments)


def log_probs_peak(model: ActivationModel, batch: MicrobatchShape, *, stage: int) -> int:
    """Compute the peak of a forward pass without a graph, in bytes on top of the model state."""
    rotary = batch.tokens * model.architecture.language.head_size * 4
    moments = [model.language_layer(batch).forward + rotary]
    if model.layout.pipeline > 1:
        moments[0] += model.hidden(batch)  # the stage's input, or the output of the microbatch before
    if stage == model.layout.pipeline - 1:
        moments.append(model.head(batch).forward + model.hidden(batch))
    if stage == 0 and batch.tiles:
        # Features and embeddings of the images lie beside the layers, until the model returns.
        sizes = model.architecture
        of_token = (sizes.adapter_input_size + sizes.language.hidden_size) * model.element_bytes
        moments[0] += batch.tiles * sizes.tokens_per_tile * of_token
        moments.append(model.adapter(batch.tiles).forward)
        if not batch.is_encoded:
            moments.append(vision_peak(model, batch.tiles))
    return max(moments)


def vision_peak(model: ActivationModel, tiles: int) -> int:
    """Compute the peak of the vision tower without a graph, its output features included.

    Args:
        tiles: number of tiles of one call; a frozen tower encodes at most `TILES_PER_PASS` of them at once.
    """
    if not tiles:
        return 0
    per_tile = model.architecture.tokens_per_tile * model.architecture.adapter_input_size * model.element_bytes
    at_once = tiles if model.trains_vision else min(tiles, TILES_PER_PASS)
    pixels = tiles * 3 * model.architecture.vision.image_size**2
    # A pass runs beside the features of those before it; then they are put together, and copied for each prompt.
    passes = model.vision_front(at_once) + model.vision_layer(at_once).forward + (tiles - at_once) * per_tile
    return pixels + max(passes, 2 * tiles * per_tile)


def _kept_for_backward(model: ActivationModel, batch: MicrobatchShape, stage: int) -> int:
    """Return the bytes of one microbatch on a stage between its forward and its backward pass, without the head."""
    layers = model.layout.layers_of_stage(model.architecture, stage)
    hidden = model.hidden(batch)
    if model.recompute is Recompute.full:
        rotary = batch.tokens * model.architecture.language.head_size * 4
        kept = layers * hidden + rotary
        if stage == 0 and model.layout.sequence:
            # The first layer's input is a view of the embeddings of all ranks' tokens.
            kept += (model.layout.tensor - 1) * hidden
    else:
        kept = layers * model.language_layer(batch).saved
    if model.layout.pipeline > 1:
        kept += 2 * hidden  # what came from the stage before, what goes to the next
    if stage == 0:
        kept += _front_saved(model, batch)
    return kept


def _front_saved(model: ActivationModel, batch: MicrobatchShape) -> int:
    """Return the bytes that vision tower and adapter keep for the backward pass."""
    kept = model.adapter(batch.tiles).saved
    if model.trains_vision:
        vision = model.architecture.vision
        one_hidden = batch.tiles * (vision.num_patches + 1) * vision.hidden_size * model.element_bytes
        full = model.recompute is Recompute.full
        kept += vision.num_layers * (one_hidden if full else model.vision_layer(batch.tiles).saved)
    return kept


def _front_backward(model: ActivationModel, batch: MicrobatchShape) -> int:
    """Return the peak while adapter and vision tower run backward, after the language model."""
    front = _front_saved(model, batch)
    moments = [front + model.adapter(batch.tiles).backward]
    if model.trains_vision:
        block = model.vision_layer(batch.tiles)
        again = block.saved if model.recompute is Recompute.full else 0
        moments.append(front - model.adapter(batch.tiles).saved + again + block.backward)
    if Part.language in model.parts:
        language = model.architecture.language
        # The embedding's gradient in the dtype of the weights, before it is added to the DDP buffer.
        weight = language.vocab_size // model.layout.tensor * language.hidden_size * model.element_bytes
        moments.append(front + weight)
    return max(moments)
