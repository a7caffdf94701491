"""The base's own chat template as a layout, found by rendering placeholders."""

import secrets
from collections.abc import Sequence

from sft.format.table import Part
from sft.format.tokens import any_of


def own_layout(tokenizer, template: str, roles: Sequence[str]) -> list[Part]:
    """Lay a sequence of roles out as the base's own chat template does, found by rendering placeholders.

    Raises ValueError when the template rewrites earlier turns, moves or drops contents, or doesn't close a reply with a
    control token: labels made for such a template would not be what a server renders.
    """
    mark = "\ue000" + secrets.token_hex(4)
    messages = [{"role": role, "content": f"{mark}{index}\ue001"} for index, role in enumerate(roles)]

    def text(count: int, prompt: bool) -> str:
        return apply_template(tokenizer, template, messages[:count], prompt)

    full = text(len(roles), roles[-1] == "user")
    controls = any_of(tokenizer.get_added_vocab())
    parts, position = [], 0
    for index, message in enumerate(messages):
        found = full.find(message["content"], position)
        if found < 0 or full.count(message["content"]) != 1:
            raise ValueError("chat format 'base': the base's own template moves or drops a message; use chatml")
        start = found
        if message["role"] == "assistant":
            prompt, ended = text(index, prompt=True), text(index + 1, prompt=False)
            if not (full.startswith(prompt) and full.startswith(ended.rstrip()) and position <= len(prompt) <= found):
                raise ValueError(
                    "chat format 'base': the base's own template renders a turn differently once it is history, or its "
                    "generation prompt is not how a reply begins (thinking templates do this); use chatml"
                )
            start = len(prompt)
        parts.append(Part(full[position:start], index))
        in_loss = message["role"] == "assistant"
        parts += [Part(full[start:found], index, in_loss), Part(None, index, in_loss)]
        position = found + len(message["content"])
        if in_loss:
            end = controls.search(full, position)
            if end is None:
                raise ValueError("chat format 'base': no control token ends a reply in the base's own template")
            parts.append(Part(full[position : end.end()], index, in_loss=True, ends_turn=True))
            position = end.end()
    return [*parts, Part(full[position:], len(roles) - 1)]


def apply_template(tokenizer, template: str, messages: list[dict], prompt: bool) -> str:
    options = {"chat_template": template, "tokenize": False, "add_generation_prompt": prompt}
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as error:  # whatever a template raises is about the template
        raise ValueError(f"chat format 'base': the base's own template failed: {error}") from None
