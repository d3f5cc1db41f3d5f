import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from examples.real_weights import convert_language_model as converter
from tests.examples.tiny_weights import CONTROL, random_llama, tokens, write_gguf

IDS = torch.tensor([[1, 40, 7, 99, 12, 200, 3, 41, 2]])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A GGUF file, the model that it means, and the folder that we make of it."""
    folder = tmp_path_factory.mktemp("language")
    model = random_llama()
    write_gguf(folder / "tiny.gguf", model)
    converter.main(["--gguf", str(folder / "tiny.gguf"), "--output", str(folder / "hf")])
    return folder, model


def test_every_weight_is_what_the_file_means(made):
    folder, model = made
    found = LlamaForCausalLM.from_pretrained(folder / "hf")
    assert found.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    with torch.no_grad():
        assert torch.equal(found(IDS).logits, model(IDS).logits)


def test_transformers_own_reader_of_gguf_computes_the_same(made):
    folder, _ = made
    ours = AutoModelForCausalLM.from_pretrained(folder / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file="tiny.gguf", dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(ours(IDS).logits, theirs(IDS).logits, atol=1e-5)
    for name in ("rms_norm_eps", "head_dim", "num_key_value_heads", "tie_word_embeddings", "rope_parameters"):
        assert getattr(ours.config, name) == pytest.approx(getattr(theirs.config, name)), name


def test_an_output_matrix_of_its_own_is_kept(tmp_path):
    model = random_llama(tied=False)
    write_gguf(tmp_path / "untied.gguf", model)
    config = converter.convert(tmp_path / "untied.gguf", tmp_path / "hf")
    assert not config.tie_word_embeddings
    found = LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(found.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(found.lm_head.weight, found.model.embed_tokens.weight)


def test_the_tokenizer_splits_digits_singly_and_keeps_control_tokens_whole(made):
    tokenizer = AutoTokenizer.from_pretrained(made[0] / "hf")
    assert tokenizer.tokenize("cat 123") == ["cat", "\u0120", "1", "2", "3"]
    assert tokenizer.encode("<|im_start|>cat<|im_end|>") == [1, tokens().index("cat"), 2]
    text = "It's 7 cats,\n\t  caf\u00e9!"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token] == CONTROL
    assert tokenizer.pad_token == "<|im_end|>"


def test_the_chat_template_is_the_files_own(made):
    tokenizer = AutoTokenizer.from_pretrained(made[0] / "hf")
    messages = [{"role": "user", "content": "cat?"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\ncat?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "qwen2"}, "general.architecture='qwen2' is not supported; accepted: 'llama'"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type is set"),
        ({"llama.rope.freq_base": None}, "has no llama.rope.freq_base"),
        ({"llama.block_count": 3}, r"9 tensors are missing \['blk.2.attn_k.weight'"),
        ({"llama.block_count": 1}, r"9 have no place in it \['blk.1.attn_k.weight'"),
        ({"tensors": {"blk.0.attn_q.bias": torch.zeros(64).numpy()}}, "have no place in it .*attn_q.bias"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model='llama' is not supported; accepted: 'gpt2'"),
        ({"tokenizer.ggml.pre": "qwen2"}, "tokenizer.ggml.pre='qwen2' is not supported; accepted: 'smollm'"),
        ({"llama.embedding_length": 32}, "token_embd.weight is .*64.* the header means .*32"),
    ],
)
def test_another_model_is_refused_and_leaves_nothing(tmp_path, capsys, changes, message):
    write_gguf(tmp_path / "other.gguf", random_llama(), changes)
    with pytest.raises(ValueError, match=message):
        converter.convert(tmp_path / "other.gguf", tmp_path / "hf")
    with pytest.raises(SystemExit) as stopped:
        converter.main(["--gguf", str(tmp_path / "other.gguf"), "--output", str(tmp_path / "hf")])
    assert stopped.value.code == 1
    assert "error: " in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.gguf"]


@pytest.mark.parametrize("kept", [0, 3, 30, 4000, -1])
def test_a_truncated_file_is_refused(made, tmp_path, kept):
    whole = (made[0] / "tiny.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:kept])
    with pytest.raises(ValueError, match="cut.gguf cannot be read as GGUF"):
        converter.convert(tmp_path / "cut.gguf", tmp_path / "hf")
    (tmp_path / "other.gguf").write_bytes(b"PK\3\4" + whole[4:])
    with pytest.raises(ValueError, match="other.gguf cannot be read as GGUF"):
        converter.convert(tmp_path / "other.gguf", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
