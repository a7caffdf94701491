"""The table of chat formats: a row of text pieces each, its layout for a sequence of roles, and its Jinja template."""

import json
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


def jinja_template(chat_format: ChatFormat, bos: str = "", *, with_tools: bool = False) -> str:
    """Write the bound format as the Jinja chat template that is saved with the tokenizer.

    `generation` marks the trained text, so `apply_chat_template(return_assistant_tokens_mask=True)` gives our labels.
    `with_tools` adds definitions, calls, results and thoughts in Qwen's form; without them the text is the same.
    """
    row = chat_format
    texts = {
        "BOS": bos,
        "DEFAULT": row.default_system,
        "SYSTEM_0": row.system[0],
        "SYSTEM_1": row.system[1],
        "USER_0": row.user[0],
        "USER_1": row.user[1],
        "HEADER": row.header,
        "GAP": row.gap,
        "TAIL": row.end,
        "BETWEEN": row.between,
        "BEFORE_TOOLS": BEFORE_TOOLS,
        "AFTER_TOOLS": AFTER_TOOLS + row.system[1],
    }
    system = "{%- if system %}{{- SYSTEM_0 + system + SYSTEM_1 }}{%- endif %}"
    system_in_user = "{%- if loop.first and system %}{{- SYSTEM_0 + system + SYSTEM_1 }}{%- endif %}"
    if with_tools:
        system = DEFINITIONS + "{%- elif system %}{{- SYSTEM_0 + system + SYSTEM_1 }}{%- endif %}" + FIND_LAST_QUESTION
    template = (
        "{#- chat format: NAME #}"
        "{%- set system = DEFAULT %}{%- set turns = messages %}"
        "{%- if messages and messages[0]['role'] == 'system' %}"
        "{%- set system = messages[0]['content'] | trim %}{%- set turns = messages[1:] %}{%- endif %}"
        "{{- BOS }}" + ("" if row.system_in_user else system) + "{%- for message in turns %}"
        "{%- if message['role'] == 'user' %}{{- USER_0 }}"
        + (system_in_user if row.system_in_user else "")
        + "{{- message['content'] | trim }}{{- USER_1 }}"
        + "{%- elif message['role'] == 'assistant' %}{{- HEADER }}"
        + (REPLY_WITH_TOOLS if with_tools else REPLY)
        + "{{- BETWEEN }}"
        + (RESULTS if with_tools else "")
        + "{%- else %}{{- raise_exception('use the roles user and assistant, and system only in front') }}{%- endif %}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- HEADER }}{%- endif %}"
    )
    names = {name: json.dumps(text, ensure_ascii=False) for name, text in texts.items()} | {"NAME": row.name}
    pattern = "|".join(sorted(names, key=len, reverse=True))
    return re.sub(rf"\b({pattern})\b", lambda match: names[match.group()], template)


# Pieces of a saved template, with the names of the format's texts in capitals.
REPLY = "{%- generation %}{{- GAP + message['content'] | trim + TAIL }}{%- endgeneration %}"
REPLY_WITH_TOOLS = (
    "{%- generation %}{{- GAP }}"
    "{%- if message['reasoning_content'] and loop.index0 > last.question %}"
    "{{- '<think>\\n' + message['reasoning_content'] | trim + '\\n</think>\\n\\n' }}{%- endif %}"
    "{{- message['content'] | trim }}"
    "{%- for call in message['tool_calls'] or [] %}"
    "{%- if not loop.first or message['content'] | trim %}{{- '\\n' }}{%- endif %}"
    "{{- '<tool_call>\\n{\"name\": \"' + call['function']['name'] + '\", \"arguments\": ' }}"
    "{{- call['function']['arguments'] if call['function']['arguments'] is string "
    "else call['function']['arguments'] | tojson }}{{- '}\\n</tool_call>' }}{%- endfor %}"
    "{{- TAIL }}{%- endgeneration %}"
)
RESULTS = (
    "{%- elif message['role'] == 'tool' %}"
    "{{- USER_0 if loop.first or loop.previtem['role'] != 'tool' else '\\n' }}"
    "{{- '<tool_response>\\n' + message['content'] | trim + '\\n</tool_response>' }}"
    "{%- if loop.last or loop.nextitem['role'] != 'tool' %}{{- USER_1 }}{%- endif %}"
)
FIND_LAST_QUESTION = (
    "{%- set last = namespace(question=-1) %}"
    "{%- for message in turns %}{%- if message['role'] == 'user' %}{%- set last.question = loop.index0 %}{%- endif %}"
    "{%- endfor %}"
)
DEFINITIONS = (
    "{%- if tools %}{{- SYSTEM_0 }}{%- if system %}{{- system + '\\n\\n' }}{%- endif %}{{- BEFORE_TOOLS }}"
    "{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}{{- AFTER_TOOLS }}"
)
# Word for word as in the templates of Qwen 2.5 and 3 (Apache-2.0).
BEFORE_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
AFTER_TOOLS = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


def adds_bos(tokenizer) -> bool:
    """Say whether the family starts every sequence with bos (Mistral does; bloom, falcon, Qwen and Yi don't)."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def saved_format(template: str) -> str | None:
    """Return the format that one of our saved templates names, or None."""
    ours = re.match(r"\{#- chat format: (\w+) #\}", template)
    return ours.group(1) if ours else None
