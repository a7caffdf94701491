"""The contract with whoever serves the model: the prompt ids of a server are those of training."""

import random
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from sft.format.tokens import IGNORE_INDEX
from sft.opendata.fields import RecordError

if TYPE_CHECKING:
    from sft.format.render import Renderer

REPLY_STARTS = (
    "你好！",
    "Hello.",
    "\n1. one",
    "**bold**",
    " spaced",
    "😀 ok",
    "7 days",
    "(a)",
    "“引用”",
    "- item",
    "```\ncode\n```",
)


def check_contract(renderer: "Renderer", conversations: Iterable[Sequence[dict]] = ()) -> list[str]:
    """Return what is wrong between training and serving for this tokenizer and format; an empty list when all is well.

    Checked on built-in probes and on `conversations`: the saved template renders the same string and ids; each turn's
    prompt is a strict prefix of the training ids; each reply ends in the stop token; typed control tokens stay plain.
    """
    problems: dict[str, None] = {}
    for messages in [*probe_conversations(), *conversations]:
        try:
            problems.update(dict.fromkeys(_check_conversation(renderer, list(messages))))
        except (ValueError, RecordError) as error:
            problems[str(error)] = None
    if renderer.can_text_write_control_tokens():
        problems["control tokens typed in a message become control ids"] = None
    return list(problems)


def odd_conversations() -> Iterable[list[dict]]:
    """Conversations of random pieces that tokenizers treat in their own ways; the same at each call."""
    pieces = [
        *"7(|。.…#\t\n\r \\\x00\xa0\u2028\u3000▁𠀀😀‍é",
        "你好",
        "Hello",
        "**",
        "e\u0301",
        "'s",
        "</s>",
        "<think>",
        "12345",
    ]
    source = random.Random(0)
    for _ in range(40):
        texts = ["".join(source.choices(pieces, k=source.randint(1, 9))) + source.choice(["x", "字"]) for _ in range(4)]
        roles = ("user", "assistant", "user", "assistant")
        yield [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]


def probe_conversations() -> Iterable[list[dict]]:
    question = {"role": "user", "content": "第一个问题？"}
    for start in REPLY_STARTS:
        reply = {"role": "assistant", "content": start}
        yield [question, reply]
        yield [question, reply, {"role": "user", "content": start}, reply, question, reply]
    yield [{"role": "system", "content": "Be brief."}, question, reply, question, reply]


def _check_conversation(renderer: "Renderer", messages: list[dict]) -> Iterable[str]:
    tokenizer, template = renderer.tokenizer, renderer.chat_template
    rendered = renderer.render(messages)
    ids = rendered.input_ids.tolist()
    example = repr(messages[-1]["content"][:20])
    if tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False) != renderer.text(messages):
        yield f"the chat template renders other text than training does (reply {example})"
    if tokenizer.apply_chat_template(messages, chat_template=template, return_dict=False) != ids:
        yield f"the chat template gives other ids than training does (reply {example})"
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = renderer.prompt(messages[:index])
            if ids[: len(prompt)] != prompt or len(ids) <= len(prompt):
                yield f"the prompt is not a prefix of the training ids (reply {example})"
            elif rendered.labels[len(prompt)] == IGNORE_INDEX:
                yield f"the first token of a reply is not trained (reply {example})"
    trained = rendered.labels[rendered.labels != IGNORE_INDEX]
    if not len(trained) or trained[-1] != renderer.stop_ids[0]:
        yield f"a reply does not end in the stop token (reply {example})"
