"""The table of chat formats: a row of text pieces each, and its layout for a sequence of roles."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple


@dataclass(frozen=True)
class ChatFormat:
    """One chat format as data. `{eos}` stands for the tokenizer's end-of-sequence token.

    A conversation reads: system[0] S system[1], then per exchange user[0] U user[1] header gap REPLY end between.
    The prompt ends after `header`; gap, reply and `end` are in the loss. With `has_tools` the saved template also takes
    tools, calls and thoughts, in the form of Qwen.
    """

    name: str
    user: tuple[str, str]
    header: str
    gap: str
    end: str
    between: str = ""
    system: tuple[str, str] = ("", "")
    default_system: str = ""
    system_in_user: bool = False
    has_tools: bool = False


CHAT_FORMATS = {
    row.name: row
    for row in (
        # Blossom v1 to v5: the text of the published models; the space before a reply is moved behind the prompt's end.
        ChatFormat(
            "blossom",
            user=("\n|Human|: ", ""),
            header="\n|Bot|:",
            gap=" ",
            end="{eos}",
            default_system="A chat between a human and an artificial intelligence bot. "
            "The bot gives helpful, detailed, and polite answers to the human's questions.",
        ),
        # Blossom v6, Qwen and Yi chat models.
        ChatFormat(
            "chatml",
            system=("<|im_start|>system\n", "<|im_end|>\n"),
            user=("<|im_start|>user\n", "<|im_end|>\n"),
            header="<|im_start|>assistant\n",
            gap="",
            end="<|im_end|>",
            between="\n",
            has_tools=True,
        ),
        # stanford_alpaca, with a space before the reply: without one, `:` merges with a reply that begins with `**`.
        ChatFormat(
            "alpaca",
            user=("\n\n### Instruction:\n", ""),
            header="\n\n### Response:",
            gap=" ",
            end="{eos}",
            default_system="Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.",
        ),
        # Mistral 7B Instruct v0.1; the system text goes in front of the first question, as in Mistral's own templates.
        ChatFormat(
            "mistral",
            system=("", "\n\n"),
            user=("[INST] ", " [/INST]"),
            header="",
            gap=" ",
            end="{eos}",
            system_in_user=True,
        ),
    )
}
FORMAT_NAMES = ("auto", *CHAT_FORMATS, "base")
TURNS_TO_TRAIN = ("all", "last")  # of a conversation


class Part(NamedTuple):
    """A part of a rendered conversation: the format's own text, or (text None) the content of `messages[message]`.

    Control tokens are real in the format's text and plain characters in a message's.
    """

    text: str | None
    message: int
    in_loss: bool = False
    ends_turn: bool = False


def bind_format(chat_format: ChatFormat, tokenizer) -> ChatFormat:
    """Fill in the tokenizer's own tokens; where it lacks the format's, fall back on ordinary text and eos.

    ChatML on a tokenizer without `<|im_end|>` (bloom, falcon, Mistral) keeps `<|im_start|>` as plain characters, ends a
    turn with eos, and leaves the newline before a reply to the model: embeddings are never resized.
    """
    if not tokenizer.eos_token:
        raise ValueError("the tokenizer has no eos_token, so a reply could not be ended; set eos_token in its config")
    control = set(tokenizer.get_added_vocab())
    end = chat_format.end
    if end != "{eos}" and end not in control:
        header = chat_format.header.rstrip()
        gap = chat_format.header[len(header) :] + chat_format.gap
        chat_format = replace(chat_format, header=header, gap=gap)
        chat_format = _replace_text(chat_format, end, "{eos}")
    return _replace_text(chat_format, "{eos}", tokenizer.eos_token)


def _replace_text(chat_format: ChatFormat, old: str, new: str) -> ChatFormat:
    def swap(value):
        return tuple(map(swap, value)) if isinstance(value, tuple) else value.replace(old, new)

    names = ("user", "header", "gap", "end", "between", "system")
    return replace(chat_format, **{name: swap(getattr(chat_format, name)) for name in names})


def table_layout(chat_format: ChatFormat, roles: Sequence[str], bos: str = "") -> list[Part]:
    """Lay a sequence of roles out in a bound format; a leading system turn takes the default system text's place."""
    row = chat_format
    has_system = roles[:1] == ("system",)
    system = []
    if has_system or row.default_system:
        content = Part(None if has_system else row.default_system, 0)
        system = [Part(row.system[0], 0), content, Part(row.system[1], 0)]
    parts = [Part(bos, 0)] + ([] if row.system_in_user else system)
    for index in range(int(has_system), len(roles)):
        if roles[index] == "user":
            inserted = system if row.system_in_user and index == int(has_system) else []
            parts += [Part(row.user[0], index), *inserted, Part(None, index), Part(row.user[1], index)]
        else:
            parts += [
                Part(row.header, index),
                Part(row.gap, index, in_loss=True),
                Part(None, index, in_loss=True),
                Part(row.end, index, in_loss=True, ends_turn=True),
                Part(row.between, index),
            ]
    return parts + ([Part(row.header, len(roles) - 1)] if roles[-1:] != ("assistant",) else [])


def is_bos_added(tokenizer) -> bool:
    """Say whether the family starts every sequence with bos (Mistral does; bloom, falcon, Qwen and Yi don't)."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def saved_format(template: str) -> str | None:
    """Return the format that one of our saved templates names, or None."""
    ours = re.match(r"\{#- chat format: (\w+) #\}", template)
    return ours.group(1) if ours else None
