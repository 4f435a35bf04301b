"""Messages -> the text that a language model reads, by the checkpoint's own chat template.

Templates are Jinja, run in transformers' sandbox: they read what they are given and nothing else. A text is data to
them and never a template. Used by any number of threads at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from embedq.core.checkpoint.chat import Chat
from embedq.core.errors import CannotLoadModel, InvalidInput

#: Texts that stand for others where a template is tried out.
_TRIED = ("alpha", "bravo", "charlie!", "foxtrot!")


class ChatTemplate:
    """Writes texts, or pairs of query and passage, as one checkpoint wants them."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._special = _special_tokens(chat) if "_token" in chat.template else {}

    def check(self, num_texts: int) -> None:
        """CannotLoadModel unless the template renders `num_texts` texts and all of them reach what it writes."""
        plain = _TRIED[:num_texts]
        try:
            written = self._render(plain, "", None)
            for place in range(num_texts):
                other = [*plain]
                other[place] = _TRIED[2 + place]
                if self._render(other, "", None) == written:
                    which = (
                        "the query"
                        if place == 0 and num_texts == 2
                        else "the text"
                        if num_texts == 1
                        else "the passage"
                    )
                    raise CannotLoadModel(f"the chat template of {self._chat.path} does not write {which}")
        except CannotLoadModel:
            raise
        except Exception as error:  # Jinja's own classes, and whatever a template raises
            raise CannotLoadModel(
                f"the chat template of {self._chat.path} cannot be rendered: {type(error).__name__}: {error!s:.200}"
            ) from None

    def write(self, texts: Sequence[str], prompt: str | None, task: str | None) -> str:
        """One text, or a query and its passage, behind `prompt` as the system's message. InvalidInput if it fails."""
        try:
            return self._render(texts, prompt or "", task)
        except Exception as error:  # a template may refuse what it is given, and its message may repeat a text
            raise InvalidInput(f"the model's chat template cannot write a text: {type(error).__name__}") from None

    def _render(self, texts: Sequence[str], prompt: str, task: str | None) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        roles = ("user",) if len(texts) == 1 else ("query", "document")
        messages = [("system", prompt)] * bool(prompt) + list(zip(roles, texts, strict=True))
        conversation = [{"role": role, "content": self._content(text)} for role, text in messages]
        variables = {"add_generation_prompt": False, **({"task": task} if task else {}), **self._chat.variables}
        rendered, _ = render_jinja_template(
            conversations=[conversation], chat_template=self._chat.template, **(self._special | variables)
        )
        text: str = rendered[0]
        return text

    def _content(self, text: str) -> Any:
        return [{"type": "text", "text": text}] if self._chat.has_parts else text


def _special_tokens(chat: Chat) -> dict[str, Any]:
    """`bos_token` and the others by name, as transformers hands them to a template."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(chat.path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # its classes fail in many ways
        raise CannotLoadModel(
            f"{chat.path} cannot be loaded as a tokenizer: {type(error).__name__}: {error!s:.200}"
        ) from None
    return dict(tokenizer.special_tokens_map)
