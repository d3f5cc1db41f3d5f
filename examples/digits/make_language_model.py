"""The pretraining of the demo's language model, a small Qwen2, on text reasoning; it never sees an image.

The result is an ordinary HF folder: Qwen2ForCausalLM, safetensors, and a byte-level BPE tokenizer trained on the
corpus, with ChatML, <think> and </think>, digits split singly, and a chat template whose generation prompt ends with
`<think>` and a line break as QwQ's does. The corpus is questions about two digits that a noisy note describes (see
questions.py); how noisy differs from note to note, so the model knows how sure it may be.

    python -m examples.digits.make_language_model --output runs/digits/components/language
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from examples import making
from examples.digits import pretraining, questions
from megatron_r1v2.resilience.files import atomic_folder

SPARE_ROWS = 32
"""Rows of the embedding beyond the tokenizer, as QwQ has them, for the image tokens that splicing adds."""


@dataclass(frozen=True)
class Settings:
    """Sizes and schedule; the defaults are those of the demo."""

    hidden_size: int = 128
    layers: int = 3
    heads: int = 4
    """Of 32 channels, the fewest that vLLM has kernels for on a CPU."""
    kv_heads: int = 2
    ffn_size: int = 256
    steps: int = 300
    batch: int = 32
    muon: float = 0.015
    adam: float = 8e-3
    seed: int = 1234


@dataclass(frozen=True)
class Example:
    """A templated prompt and its response."""

    prompt: str
    response: str


def make_tokenizer(seed: int) -> Qwen2Tokenizer:
    """Train a byte-level BPE with Qwen2's splitting on the corpus; every frequent word becomes one token.

    Raises:
        ValueError: a digit or filler word takes more than one token, so a note would not be as long as an image.
    """
    bare = Tokenizer(models.BPE())
    # The class AutoTokenizer picks for qwen2 splits by its own rule, whatever the folder says: train with that rule.
    untrained = Qwen2Tokenizer().backend_tokenizer
    bare.normalizer, bare.pre_tokenizer = untrained.normalizer, untrained.pre_tokenizer
    rng = random.Random(seed)
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        min_frequency=20,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bare.train_from_iterator([make_text(rng) for _ in range(2000)], trainer)
    trained = json.loads(bare.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(merge) for merge in trained["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=questions.CHAT_TEMPLATE,
    )
    # As in QwQ these are ordinary added tokens: decoding without special tokens must keep them.
    tokenizer.add_tokens(["<think>", "</think>"])
    for word in (*questions.DIGIT_WORDS, *questions.FILLER_WORDS):
        if len(tokenizer(f" {word}").input_ids) != 1:
            raise ValueError(f"the word {word!r} takes more than one token; accepted: one; lower min_frequency")
    return tokenizer


def make_text(rng: random.Random) -> str:
    """Return the plain text of one example, for the tokenizer."""
    problem = questions.make_problem(rng.randrange(10), rng.randrange(10), rng)
    note = questions.make_note(problem.left, problem.right, rng, filler=0.5, wrong=0.3)
    # The tags are added tokens: left in, they would be cut into pieces together with their neighbours.
    response = problem.response.replace("</think>", "\n")
    return f"user\n{note}\n{problem.question}\nassistant\n{response}"


def make_example(tokenizer: Qwen2Tokenizer, rng: random.Random, *, filler: float, wrong: float) -> Example:
    """Ask about a note of the given noise."""
    problem = questions.make_problem(rng.randrange(10), rng.randrange(10), rng)
    note = questions.make_note(problem.left, problem.right, rng, filler=filler, wrong=wrong)
    messages = [{"role": "user", "content": f"{note}\n{problem.question}"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return Example(prompt, f"{problem.response}<|im_end|>")


def collate(tokenizer: Qwen2Tokenizer, examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pad prompt and response on the right.

    Returns:
        token ids (int64 [B, S]), the attention mask (int64 [B, S]), and labels (int64 [B, S], aligned with the
        token ids, -100 outside the response).
    """
    prompts = tokenizer([example.prompt for example in examples]).input_ids
    responses = tokenizer([example.response for example in examples]).input_ids
    length = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True))
    token_ids = torch.full((len(examples), length), tokenizer.pad_token_id)
    labels = torch.full((len(examples), length), -100)
    mask = torch.zeros((len(examples), length), dtype=torch.long)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        token_ids[row, :end] = torch.tensor(prompt + response)
        labels[row, len(prompt) : end] = torch.tensor(response)
        mask[row, :end] = 1
    return token_ids, mask, labels


def build(settings: Settings, tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    """Return a fresh Qwen2 with room for the tokens that splicing adds."""
    # A multiple of 64, which every usual tensor-parallel size divides without padding.
    rows = (len(tokenizer) + SPARE_ROWS + 63) // 64 * 64
    config = Qwen2Config(
        vocab_size=rows,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        intermediate_size=settings.ffn_size,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        initializer_range=0.06,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def train(settings: Settings, tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    """Pretrain on freshly made examples: no example is seen twice."""
    torch.manual_seed(settings.seed)
    rng = random.Random(settings.seed)
    model = build(settings, tokenizer)
    optimizers = pretraining.Optimizers(model, muon=settings.muon, adam=settings.adam, steps=settings.steps)
    progress = pretraining.Progress("language model", settings.steps)
    for step in range(settings.steps):
        # The noise differs from note to note; with one level of it the model would not learn to weigh evidence.
        examples = [
            make_example(tokenizer, rng, filler=rng.uniform(0, 0.9), wrong=rng.uniform(0, 0.6))
            for _ in range(settings.batch)
        ]
        token_ids, mask, labels = collate(tokenizer, examples)
        logits = model(input_ids=token_ids, attention_mask=mask).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        progress.show(step + 1, optimizers.update(loss, step))
    return model


@torch.inference_mode()
def accuracy(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, *, seed: int, count: int = 512) -> float:
    """Return the probability that a whole response sampled at temperature 1 is the wanted one, on clear notes."""
    rng = random.Random(seed)
    examples = [make_example(tokenizer, rng, filler=0.3, wrong=0.1) for _ in range(count)]
    token_ids, mask, labels = collate(tokenizer, examples)
    log_probs = model(input_ids=token_ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    wanted = labels[:, 1:]
    picked = log_probs.gather(-1, wanted.clamp(min=0)[..., None])[..., 0] * (wanted != -100)
    return float(picked.sum(-1).exp().mean())


HELPS = {
    "steps": "optimizer steps",
    "batch": "examples a step",
    "hidden_size": "width",
    "layers": "depth",
    "muon": "peak rate of Muon",
    "adam": "peak rate of AdamW",
    "seed": "decides weights and examples",
}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    transformers.utils.logging.disable_progress_bar()
    parser = making.maker_parser(
        "examples.digits.make_language_model", __doc__, output="HF folder to make; left alone if it exists"
    )
    making.add_settings(parser, Settings(), HELPS)
    options = parser.parse_args(arguments)
    if making.report_if_made("language model", options.output):
        return
    settings = making.chosen_settings(options, Settings())
    tokenizer = make_tokenizer(settings.seed)
    model = train(settings, tokenizer)
    with atomic_folder(options.output, replace=True) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    right = accuracy(model.eval(), tokenizer, seed=settings.seed + 1)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"language model: {options.output}: {parameters:,} parameters, {len(tokenizer)} tokens, Pass@1 {right:.3f}")


if __name__ == "__main__":
    main()
