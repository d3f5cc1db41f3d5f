"""Chat templates of language models: text as before, and images where they are in a message."""

from __future__ import annotations

import pytest

from megatron_r1v2.checkpoint.hf.chat_template import give_image_parts, with_image_parts
from megatron_r1v2.checkpoint.hf.folders import read_json
from megatron_r1v2.resilience.files import write_json
from tests.tiny_hf import CHAT_TEMPLATE, tiny_byte_tokenizer

# Each reads the messages in its own way, as the templates of Llama, ChatML and QwQ do.
TEMPLATES = {
    "attribute": "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}",
    "key": "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] + '\n' }}{% endfor %}",
    "first": "\n{%- if messages[0]['role'] == 'system' %}{{- messages[0].content + '\n' }}{%- endif %}"
    "{%- for message in messages %}{%- set content = message.content.split('</think>')[-1] %}"
    "{{- '[' + message.role + '] ' + content }}\n{% endfor %}",
    "line end": "\n\n{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}",
}
TEXTS = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "what <b>is</b> it?"},
    {"role": "assistant", "content": "so</think> a cat"},
]


def rendered(template: str, messages: list) -> str:
    tokenizer = tiny_byte_tokenizer()
    return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_texts_are_rendered_as_before_and_images_take_their_place(name):
    template = TEMPLATES[name]
    changed = with_image_parts(template)
    assert rendered(changed, TEXTS) == rendered(template, TEXTS)
    one_text = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in TEXTS]
    assert rendered(changed, one_text) == rendered(template, TEXTS)
    parts = [{"type": "text", "text": "one "}, {"type": "image"}, {"type": "video"}, {"type": "text", "text": "two"}]
    same = "one <IMG_CONTEXT>\n<video>\ntwo"
    messages = [[*TEXTS, {"role": "user", "content": content}] for content in (parts, same)]
    assert rendered(changed, messages[0]) == rendered(template, messages[1])


def test_a_template_that_takes_images_stays_as_it_is():
    assert with_image_parts(CHAT_TEMPLATE) == CHAT_TEMPLATE
    assert with_image_parts(with_image_parts(TEMPLATES["key"])) == with_image_parts(TEMPLATES["key"])


def test_every_file_that_holds_a_template_is_changed(tmp_path):
    template = TEMPLATES["attribute"]
    (tmp_path / "chat_template.jinja").write_text(template)
    write_json(tmp_path / "chat_template.json", {"chat_template": template})
    named = [{"name": "default", "template": template}]
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": named, "model_max_length": 7})
    give_image_parts(tmp_path)
    expected = with_image_parts(template)
    assert (tmp_path / "chat_template.jinja").read_text() == expected
    assert read_json(tmp_path / "chat_template.json") == {"chat_template": expected}
    changed = {"chat_template": [{"name": "default", "template": expected}], "model_max_length": 7}
    assert read_json(tmp_path / "tokenizer_config.json") == changed
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": 5})
    with pytest.raises(ValueError, match="chat_template=5"):
        give_image_parts(tmp_path)
