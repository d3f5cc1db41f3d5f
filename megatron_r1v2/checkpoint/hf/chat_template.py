"""Image parts for chat templates that know plain text only.

Afterwards a message's content may be a list of texts and images, as processors pass it.
"""

from __future__ import annotations

import json
from pathlib import Path

from megatron_r1v2.checkpoint.hf.config import IMAGE_TOKEN
from megatron_r1v2.checkpoint.hf.folders import read_json
from megatron_r1v2.resilience.files import write_file, write_json

_KEY = "chat_template"
# In front of a template: each content that is a list becomes one text, and the template sees texts alone. The last
# expression keeps a line end that the template begins with.
_AS_TEXT = (
    "{%- macro content_as_text(parts) -%}{%- for part in parts -%}"
    "{{- part['text'] if part['type'] == 'text' else '<video>\n' if part['type'] == 'video' else 'IMAGE\n' -}}"
    "{%- endfor -%}{%- endmacro -%}"
    "{%- set plain = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- if message['content'] is iterable and message['content'] is not string -%}"
    "{%- set message = dict(message, content=content_as_text(message['content'])) -%}"
    "{%- endif -%}{%- set plain.messages = plain.messages + [message] -%}"
    "{%- endfor -%}{%- set messages = plain.messages -%}{{ '' }}"
).replace("IMAGE", IMAGE_TOKEN)


def with_image_parts(template: str) -> str:
    """Return a chat template that writes `<IMG_CONTEXT>` for an image, unchanged where it already does."""
    return template if IMAGE_TOKEN in template else _AS_TEXT + template


def give_image_parts(folder: Path) -> None:
    """Change every chat template of a folder, in whichever file, to one that takes images.

    Raises:
        ValueError: a template is not a text.
    """
    for path in sorted(folder.glob("chat_template*.jinja")):
        write_file(path, with_image_parts(path.read_text(encoding="utf-8")))
    for path in (folder / "tokenizer_config.json", folder / "chat_template.json"):
        content = read_json(path) if path.is_file() else {}
        if content.get(_KEY):
            write_json(path, {**content, _KEY: _changed(content[_KEY], path)})


def _changed(template: object, path: Path) -> object:
    if isinstance(template, str):
        return with_image_parts(template)
    # Several, by name: [{"name": ..., "template": ...}]
    if not isinstance(template, list) or not all(isinstance(e, dict) and "template" in e for e in template):
        raise ValueError(f"{path} has {_KEY}={json.dumps(template)[:80]}; accepted: a text, or a list of named ones")
    return [{**entry, "template": with_image_parts(entry["template"])} for entry in template]
