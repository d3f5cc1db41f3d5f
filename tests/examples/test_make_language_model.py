import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.digits import make_language_model as maker
from examples.digits import questions
from megatron_r1v2.checkpoint.hf.architecture import language_architecture

TINY = ["--steps", "2", "--batch", "4", "--hidden-size", "32", "--layers", "2"]


@pytest.fixture(scope="module")
def tokenizer():
    return maker.make_tokenizer(1234)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("digits") / "language"
    maker.main(["--output", str(output), *TINY])
    return output


def test_the_folder_is_a_qwen2_that_transformers_and_we_can_read(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    architecture = language_architecture(model.config.to_dict())
    assert (architecture.model_type, architecture.hidden_size, architecture.num_layers) == ("qwen2", 32, 2)
    assert architecture.vocab_size >= len(AutoTokenizer.from_pretrained(folder)) + maker.SPARE_ROWS
    assert not architecture.tied_embeddings


def test_the_loaded_tokenizer_cuts_as_the_trained_one(folder, tokenizer):
    loaded = AutoTokenizer.from_pretrained(folder)
    rng = random.Random(5)
    for _ in range(20):
        example = maker.make_example(tokenizer, rng, filler=0.5, wrong=0.3)
        assert loaded(example.prompt).input_ids == tokenizer(example.prompt).input_ids
        assert loaded(example.response).input_ids == tokenizer(example.response).input_ids


def test_the_prompt_ends_inside_think(tokenizer):
    messages = [{"role": "user", "content": "left + right = ?"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nleft + right = ?<|im_end|>\n<|im_start|>assistant\n<think>\n"


@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>", "<think>", "</think>", *"0123456789"])
def test_one_token(tokenizer, token):
    assert len(tokenizer(token).input_ids) == 1


def test_numbers_are_cut_into_digits(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer("=81</think>").input_ids) == ["=", "8", "1", "</think>"]


def test_decoding_gives_the_response_back_with_its_tags(tokenizer):
    response = questions.Problem(3, 5, "-", "").response
    ids = tokenizer(response + "<|im_end|>").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == response
    assert len(ids) <= 23


def test_a_note_takes_as_many_tokens_as_an_image_between_its_tags(tokenizer):
    note = questions.make_note(3, 5, random.Random(0), filler=0.5, wrong=0.5)
    assert len(tokenizer(note).input_ids) == 1 + 3 * questions.TOKENS_PER_TILE + 1


def test_labels_are_the_response_and_its_end_alone(tokenizer):
    rng = random.Random(1)
    examples = [maker.make_example(tokenizer, rng, filler=0.2, wrong=0.1) for _ in range(6)]
    token_ids, mask, labels = maker.collate(tokenizer, examples)
    for row, example in enumerate(examples):
        kept = labels[row] != -100
        assert tokenizer.decode(labels[row][kept]) == example.response
        assert torch.equal(labels[row][kept], token_ids[row][kept])
        assert tokenizer.decode(token_ids[row][mask[row].bool()]) == example.prompt + example.response


def test_training_lowers_the_loss_on_a_fixed_batch(tokenizer):
    settings = maker.Settings(hidden_size=32, layers=1, steps=30, batch=16)
    rng = random.Random(3)
    token_ids, mask, labels = maker.collate(
        tokenizer, [maker.make_example(tokenizer, rng, filler=0.3, wrong=0.1) for _ in range(32)]
    )
    model = maker.train(settings, tokenizer)
    loss = model(input_ids=token_ids, attention_mask=mask, labels=labels).loss.item()
    assert loss < 2.0 < torch.log(torch.tensor(float(len(tokenizer)))).item()


def test_what_is_there_is_left_alone(folder, capsys):
    before = (folder / "model.safetensors").read_bytes()
    maker.main(["--output", str(folder), *TINY, "--seed", "9"])
    assert "is there already" in capsys.readouterr().out
    assert (folder / "model.safetensors").read_bytes() == before
