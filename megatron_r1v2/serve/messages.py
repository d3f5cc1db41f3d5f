"""Chat messages of a request: their shape as pydantic models, their images decoded within limits."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

from annotated_types import Ge, Le
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from megatron_r1v2.data.images import decode_image
from megatron_r1v2.data.messages import data_url_type, decode_data_url
from megatron_r1v2.data.pixels import describe_other_content
from megatron_r1v2.data.samples import ROLES, SampleError
from megatron_r1v2.serve.web import RequestError

# More is refused before it costs memory; the pixels of an image are read from its header.
MAX_MESSAGES = 256
MAX_IMAGES = 16
MAX_IMAGE_PIXELS = 40_000_000
_IMAGE_TYPES = {f"image/{name}" for name in ("png", "x-png", "jpeg", "jpg", "pjpeg", "webp", "*")}
# Of clients that know no type; the content decides.
_GENERIC_TYPES = {"application/octet-stream", "binary/octet-stream", ""}
_FORMATS = ("PNG", "JPEG", "WEBP")
_UNSUPPORTED = ("tool_calls", "function_call", "audio")

Fields = TypeVar("Fields", bound=BaseModel)


@dataclass(frozen=True)
class Turn:
    """One chat message; text and images in the order in which they stand."""

    role: str
    parts: tuple[str | Image.Image, ...]


class WireModel(BaseModel):
    """JSON as it is sent: types are not converted, and there may be fields that nobody reads."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


class TextPart(WireModel):
    """A text in a message's content."""

    type: Literal["text"]
    text: str


class ImageUrl(WireModel):
    """The address of an image; its `detail` changes nothing here."""

    url: str


class ImagePart(WireModel):
    """An image in a message's content."""

    type: Literal["image_url"]
    image_url: ImageUrl | str


class ChatMessage(WireModel):
    """A message; the parts of its content are checked one by one, so that an error names the part."""

    role: Literal["system", "developer", "user", "assistant"] = Field(
        description=f"{', '.join(ROLES)}, and developer, which is system; this server calls no tools"
    )
    content: str | list[object] = Field(description="must be text or a list of parts")


_PART: TypeAdapter[TextPart | ImagePart] = TypeAdapter(Annotated[TextPart | ImagePart, Field(discriminator="type")])


def read_fields(model: type[Fields], content: Mapping[str, object], place: str = "") -> Fields:
    """Validate the fields of an object.

    Args:
        model: its fields; a refusal quotes their bounds and descriptions.
        place: begins the names of its fields in a refusal, such as "messages[0]."; a field of the request itself is
            named as `param` too.

    Raises:
        RequestError: naming the field, the value and what is accepted.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        name = str(error.errors(include_url=False)[0]["loc"][0])
        refusal = _refusal(f"{place}{name}", content.get(name), model.model_fields[name])
        raise RequestError(refusal, param=None if place else name) from error


def _refusal(name: str, value: object, field: FieldInfo) -> str:
    description = field.description or ""
    if description.startswith("must"):
        return f"{name} {description}, got {type(value).__name__}"
    shown = repr(value) if len(repr(value)) <= 60 else f"{value!r:.57}..."
    bounds = [bound.ge if isinstance(bound, Ge) else bound.le for bound in field.metadata if isinstance(bound, Ge | Le)]
    if not bounds:
        return f"{name}={shown}; accepted: {description}"
    low, high = (bound for bound in bounds if isinstance(bound, int))
    # Decided by the value: a whole number of hundreds of digits is of the wrong type to pydantic.
    if isinstance(value, int | float) and not isinstance(value, bool) and not low <= value <= high:
        setting = f", the server's {field.title}" if field.title else ""
        return f"{name}={shown} is out of range; accepted: {low} to {high}{setting}"
    return f"{name}={shown}; accepted: {description} from {low} to {high}"


def read_messages(messages: object) -> list[Turn]:
    """Check the messages of a request, decode their images, and return the turns.

    Raises:
        RequestError: naming the message and what is accepted.
    """
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages must be a list with at least one message")
    if len(messages) > MAX_MESSAGES:
        raise RequestError(f"{len(messages)} messages; accepted: at most {MAX_MESSAGES}", 413)
    read = [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    if sum(isinstance(part, ImagePart) for _, parts in read for part in parts) > MAX_IMAGES:
        raise RequestError(f"the messages hold more than {MAX_IMAGES} images; send fewer", 413)
    turns = []
    for index, (role, parts) in enumerate(read):
        places = [f"messages[{index}].content[{place}]" for place in range(len(parts))]
        decoded = [
            _image(part, place) if isinstance(part, ImagePart) else part
            for part, place in zip(parts, places, strict=True)
        ]
        turns.append(Turn(role, tuple(decoded)))
    return turns


def _message(message: object, place: str) -> tuple[str, list[str | ImagePart]]:
    """Return the role of a message and the parts of its content."""
    if not isinstance(message, dict):
        raise RequestError(f"{place}: a message is an object with role and content, got {type(message).__name__}")
    for name in _UNSUPPORTED:
        if message.get(name):
            raise RequestError(f"{place}.{name} is not supported: this server calls no tools; leave it out")
    given = {"role": str(message.get("role")), "content": message.get("content")}
    if given == {"role": "assistant", "content": None}:
        given["content"] = ""
    read = read_fields(ChatMessage, given, f"{place}.")
    parts: list[str | ImagePart] = [read.content] if isinstance(read.content, str) else []
    if isinstance(read.content, list):
        parts = [_part(part, f"{place}.content[{index}]") for index, part in enumerate(read.content)]
    try:
        "".join(part for part in parts if isinstance(part, str)).encode()
    except UnicodeEncodeError as error:
        refusal = f"{place}.content has half of a surrogate pair; send valid Unicode"
        raise RequestError(refusal, param="messages") from error
    # "developer" is its name for newer models of OpenAI's.
    return "system" if read.role == "developer" else read.role, parts


def _part(part: object, place: str) -> str | ImagePart:
    try:
        read = _PART.validate_python(part)
    except ValidationError as error:
        text, image = '{"type": "text", "text": ...}', '{"type": "image_url", "image_url": {"url": ...}}'
        raise RequestError(f"{place}: accepted are {text} and {image}") from error
    return read.text if isinstance(read, TextPart) else read


def _image(part: ImagePart, place: str) -> Image.Image:
    """Decode an image that came in the request; nothing is ever fetched.

    Raises:
        RequestError: another address, bad base64, no image, or too many pixels.
    """
    url = part.image_url if isinstance(part.image_url, str) else part.image_url.url
    if data_url_type(url) not in _IMAGE_TYPES | _GENERIC_TYPES:
        accepted = "data:image/png;base64,... (or jpeg, webp). This server fetches nothing"
        raise RequestError(f"{place}: got {url[:60]!r}; accepted: {accepted}")
    try:
        data = decode_data_url(url)
    except ValueError as error:
        raise RequestError(f"{place}: not base64: {error}") from error
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            pixels = image.width * image.height
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        other = describe_other_content(data) or f"begins with {data[:12]!r}"
        raise RequestError(f"{place}: no PNG, JPEG or WebP image ({len(data)} bytes): it {other}") from error
    if pixels > MAX_IMAGE_PIXELS:
        raise RequestError(f"{place}: {pixels} pixels; accepted: at most {MAX_IMAGE_PIXELS}", 413)
    try:
        return decode_image(data, place)
    except SampleError as error:
        raise RequestError(str(error)) from error
