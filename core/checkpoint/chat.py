"""The chat template of a checkpoint whose texts are messages: found, and told which variables it is given. Renders nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embedq.core.checkpoint.files import read_json
from embedq.core.checkpoint.saved_modules import TransformerFile
from embedq.core.errors import CannotLoadModel

#: What a template that reads a message's content as a list of parts has in its text, by which
#: sentence-transformers tells the two forms apart where none is stated.
_SIGNS_OF_PARTS = ("content[0]", ".type", "'type'", '"type"', "item.type", "message.content[")


@dataclass(frozen=True, slots=True)
class Chat:
    """Describes how texts become messages, and messages one text."""

    #: Directory of the tokenizer, whose special tokens a template may name.
    path: Path
    template: str = field(repr=False)
    #: Whether a message's content is a list of parts, and not the text itself.
    has_parts: bool
    #: What the template is given besides the messages.
    variables: Mapping[str, Any]


def read_chat(path: Path, transformer: TransformerFile) -> Chat | None:
    """The template that texts pass through; None where sentence-transformers' file wants none."""
    form = transformer.message_format
    if form is None:
        return None
    template = _find(path)
    has_parts = any(sign in template for sign in _SIGNS_OF_PARTS) if form == "auto" else form == "structured"
    return Chat(path, template, has_parts, dict(transformer.chat_kwargs))


def _find(path: Path) -> str:
    """The text of the template: a file of its own comes before the entry in `tokenizer_config.json`."""
    try:
        return (path / "chat_template.jinja").read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise CannotLoadModel(f"{path}/chat_template.jinja cannot be read: {error}") from None
    stated = (read_json(path / "tokenizer_config.json") or {}).get("chat_template")
    if isinstance(stated, list):
        stated = {one["name"]: one["template"] for one in stated}.get("default")
    if not isinstance(stated, str):
        raise CannotLoadModel(
            f"{path} has texts written as messages (modality_config), and no chat template for them: looked for "
            "chat_template.jinja, and for chat_template in tokenizer_config.json"
        )
    return stated
