"""Bytes that a forward and backward pass allocates, tensor by tensor, for the local layers of models/.

Each function lists the tensors that autograd keeps of one block, and those that come on top while the block runs. The
lists were read off `saved_tensors_hooks` on the real model and hold for torch's flash-style SDPA (CPU and GPU): it
keeps queries, keys, the whole qkv projection (values are a view of it), the output and one float32 a query. Letters in
the names: n tokens of a microbatch, m patches and class tokens of its tiles, w bytes of an element.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from megatron_r1v2.config.choices import Part, Recompute
from megatron_r1v2.models.architecture import R1V2Architecture
from megatron_r1v2.models.log_probs import POSITIONS_AT_ONCE
from megatron_r1v2.planning.parameters import Layout, padded_vision_heads, padded_vocabulary


@dataclass(frozen=True)
class MicrobatchShape:
    """The size of one forward pass."""

    rows: int
    tokens: int
    """Tokens of a row, padding included."""
    tiles: int
    """Image tiles of all rows together; rows of one prompt share theirs."""
    outputs: int | None = None
    """Tokens of all rows that get logits; None: all of them."""
    is_encoded: bool = False
    """True where the features of the tiles are held, so that the tower does not run."""


@dataclass(frozen=True)
class Block:
    """Bytes of one layer, of the adapter or of the head."""

    saved: int
    """Kept from the forward to the backward pass."""
    forward: int
    """The most that is allocated at once in a forward pass without a graph."""
    backward: int
    """The most that is allocated on top of `saved` while the backward pass of this block runs."""


@dataclass(frozen=True)
class ActivationModel:
    """Sizes, layout and numerics, from which the bytes of activations follow."""

    architecture: R1V2Architecture
    layout: Layout
    parts: Collection[Part]
    element_bytes: int
    """w: 2 for bf16, 4 for fp32."""
    recompute: Recompute
    measures_entropy: bool = False
    """True where an update measures the entropy of its tokens."""

    @property
    def trains_language(self) -> bool:
        """Return whether weights of the language model have gradients."""
        return Part.language in self.parts

    @property
    def scores(self) -> bool:
        """Return whether the last stage has the head of a reward model in place of logits."""
        return Part.score in self.parts

    @property
    def trains_vision(self) -> bool:
        """Return whether the vision tower keeps a graph."""
        return Part.vision in self.parts

    def has_graph(self, batch: MicrobatchShape) -> bool:
        """Return whether the language model keeps a graph for this batch."""
        # Text alone has nothing to train where only adapter or vision do.
        return self.trains_language or self.scores or batch.tiles > 0

    def hidden(self, batch: MicrobatchShape) -> int:
        """Return the bytes of the hidden states between layers on one rank."""
        tokens = batch.rows * batch.tokens // (self.layout.tensor if self.layout.sequence else 1)
        return tokens * self.architecture.language.hidden_size * self.element_bytes

    def language_layer(self, batch: MicrobatchShape) -> Block:
        """Return the bytes of one decoder layer without recomputation."""
        language, tensor, w = self.architecture.language, self.layout.tensor, self.element_bytes
        n = batch.rows * batch.tokens
        hidden = self.hidden(batch)
        # Below one key-value head a rank, each rank gathers the heads of its whole group before it takes its own.
        kv = max(1, language.num_kv_heads // tensor) * language.head_size
        q = language.num_heads // tensor * language.head_size
        gathered_q = max(q, language.num_heads // language.num_kv_heads * language.head_size)
        qkv = n * w * ((gathered_q if tensor > language.num_kv_heads else q) + 2 * kv)
        ffn = n * w * language.ffn_size // tensor
        rope = 4 * batch.tokens * language.head_size * w
        saved = 2 * self._rms_norm(hidden, trained=self.trains_language) + rope
        saved += qkv + n * w * (q + kv) + self._core_attention_output(batch)
        # SwiGLU: fc1's output (both halves), the linear half plus its offset, the activated half; fc2's input if it
        # trains.
        saved += (5 if self.trains_language else 4) * ffn
        if self.trains_language:
            saved += 2 * hidden  # the inputs of qkv and fc1
        if language.qk_norm:
            heads = n * w * (q + kv)
            # bf16 inputs are cast to float32 copies; in fp32 the norm of the keys reads the qkv projection itself.
            saved += (4 * heads if w == 2 else n * w * q) + (heads if self.trains_language else 0)
        gathered = n * language.hidden_size * w
        # fc1's output (2), both halves and their product (3); residual, layer input, norm output; the gathered input.
        forward = 5 * ffn + 3 * hidden + gathered
        # The product's gradient beside fc2's of all tokens, then beside those of both halves, when fc2's input is gone.
        backward = max(3 * ffn, ffn + gathered)
        if self.trains_language:
            weight = language.ffn_size // tensor * language.hidden_size * w
            backward = max(2 * ffn, ffn + weight + gathered)
        return Block(saved, forward, backward)

    def language_layer_end(self, batch: MicrobatchShape) -> int:
        """Return the bytes on top of what a decoder layer keeps when its forward pass ends."""
        # fc2's output of all tokens, a rank's own, the sum with the residual; fc2's input, where it is not kept.
        gathered = batch.rows * batch.tokens * self.architecture.language.hidden_size * self.element_bytes
        ffn = gathered * self.architecture.language.ffn_size // self.architecture.language.hidden_size
        return gathered + 2 * self.hidden(batch) + (0 if self.trains_language else ffn // self.layout.tensor)

    def vision_layer(self, tiles: int) -> Block:
        """Return the bytes of one layer of the vision tower without recomputation."""
        vision, tensor, w = self.architecture.vision, self.layout.tensor, self.element_bytes
        m = tiles * (vision.num_patches + 1)
        hidden = m * vision.hidden_size * w
        local_heads = padded_vision_heads(vision, tensor) // tensor
        heads = m * local_heads * vision.head_size * w
        ffn = m * w * vision.ffn_size // tensor
        norm = self._rms_norm(hidden, trained=True) if vision.norm == "rms_norm" else hidden
        # Norms, inputs of qkv and fc1, factors of the two layer scales, before and after GELU.
        saved = 2 * norm + 2 * hidden + 2 * hidden + 2 * ffn
        saved += 3 * heads + heads + m * local_heads * 4
        if vision.qk_norm:
            # q and k each: two float32 copies (in fp32 the input serves), the normalised one, and attention's input.
            saved += 2 * ((2 * 2 * heads if w == 2 else heads) + heads + heads)
        wide = 8 if w == 2 else 4
        norm_forward = m * vision.hidden_size * (3 * w + wide) if vision.norm == "rms_norm" else 3 * hidden
        # The layer's input, what attention made of it, the norm's output and fc2's; bias, scale and residual added.
        forward = max(norm_forward, 3 * hidden + 2 * ffn, 7 * hidden)
        if vision.qk_norm:
            # Queries, keys, values; the normalised queries; of the keys a copy, two in float32, a product (fp32: two).
            forward = max(forward, 2 * hidden + (9 if w == 2 else 7) * heads)
        norm_backward = m * vision.hidden_size * (16 if w == 2 else 12) if vision.norm == "rms_norm" else 3 * hidden
        backward = max(norm_backward, 2 * ffn + 2 * hidden) + hidden
        return Block(saved, forward, backward)

    def vision_front(self, tiles: int) -> int:
        """Return the bytes that stay beside the layers of the tower while it runs without a graph."""
        vision = self.architecture.vision
        # Float32 pixels; the patches, the same with class tokens and positions, and in the layers' order.
        patches = tiles * (3 * vision.num_patches + 2) * vision.hidden_size * self.element_bytes
        return tiles * 3 * vision.image_size**2 * 4 + patches

    def adapter(self, tiles: int) -> Block:
        """Return the bytes of pixel shuffle and adapter."""
        sizes, w = self.architecture, self.element_bytes
        tokens = tiles * sizes.tokens_per_tile
        wide = tokens * sizes.adapter_input_size * w
        middle = tokens * sizes.language.hidden_size // self.layout.tensor * w
        out = tokens * sizes.language.hidden_size * w
        trained = Part.adapter in self.parts
        saved = 0
        if trained or self.trains_vision:
            # The norm's input; its output and GELU's where the linears train; GELU's input.
            saved = wide * (2 if trained else 1) + middle * (2 if trained else 1)
        return Block(saved, 2 * wide + 2 * middle + out, 2 * wide)

    def head(self, batch: MicrobatchShape) -> Block:
        """Return the bytes of final norm, output layer and log-probs on the last stage."""
        language, tensor, w = self.architecture.language, self.layout.tensor, self.element_bytes
        n, hidden = batch.rows * batch.tokens, self.hidden(batch)
        if self.scores:
            # The hidden states in float32, from which the weight's gradient follows; the gradient of both kinds.
            norm, wide = self._rms_norm(hidden, trained=self.trains_language), hidden * 4 // w
            return Block(norm + wide, norm + wide, wide + hidden)
        logits = (n if batch.outputs is None else batch.outputs) * padded_vocabulary(language, tensor) // tensor
        gathered = n * language.hidden_size * w
        norm = self._rms_norm(hidden, trained=self.trains_language) + (hidden if self.trains_language else 0)
        # Kept: the softmax, in float32. On top: logits, their float32 copy and the quotient; later two float32
        # gradients.
        transient = logits * (w + 4 if w == 2 else 4)
        backward = transient
        if self.measures_entropy:
            # The softmax is made after the entropy.
            backward = max(backward, self._entropy(logits) - 4 * logits)
        if self.trains_language:
            weight = padded_vocabulary(language, tensor) // tensor * language.hidden_size * w
            backward = max(backward, logits * (w - 4) + weight + gathered) + (gathered if tensor > 1 else 0)
        return Block(norm + 4 * logits, logits * 4 + transient, backward)

    def _entropy(self, logits: int) -> int:
        """Return the bytes of logits and, in float32, of the positions whose entropy is measured at once."""
        language, tensor, w = self.architecture.language, self.layout.tensor, self.element_bytes
        first = min(logits, POSITIONS_AT_ONCE * padded_vocabulary(language, tensor) // tensor)
        second = min(first, logits - first)
        # Scaled, shifted, their exponentials, a product. The first three stay until those of the next positions are
        # made: of these a float32 copy and the quotient, or (fp32 has no copy) the scaled, and shifted in two steps.
        next_positions = 3 * first + 2 * second if w == 2 else 2 * first + 3 * second
        return logits * w + 4 * max(4 * first, next_positions)

    def _rms_norm(self, hidden: int, *, trained: bool) -> int:
        """Return the bytes that our RMSNorm keeps: its input in float32, and its result where the weight trains."""
        # In bf16 both `.float()` calls make a copy; in fp32 the input itself is kept, once.
        wide = hidden * 2 * 2 if self.element_bytes == 2 else hidden
        return wide + (hidden if trained else 0)

    def _core_attention_output(self, batch: MicrobatchShape) -> int:
        """Return the bytes that core attention keeps of its output, the log-sum-exp of each query included."""
        language, tensor = self.architecture.language, self.layout.tensor
        heads = batch.rows * batch.tokens * language.num_heads // tensor
        output = heads * language.head_size * self.element_bytes
        if self.recompute is Recompute.selective:
            # Queries, keys and values stay either way; the output only where the projection needs it.
            return output if self.trains_language else 0
        return output + heads * 4
