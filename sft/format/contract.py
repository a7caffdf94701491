"""The train = serve contract: the prompt ids of a server are those of training."""

import itertools
import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sft.base import find_folder
from sft.embeddings import find_untrained
from sft.format.own_template import PROBE_TOOL, PROBES
from sft.format.reply import find_trained
from sft.format.table import CHAT_FORMATS, FORMAT_NAMES, saved_format
from sft.format.tokens import IGNORE_INDEX
from sft.opendata.conversation import read_conversations
from sft.opendata.fields import RecordError

if TYPE_CHECKING:
    from sft.format.render import Renderer

REPLY_STARTS = PROBES["reply_starts"]
NUM_PLAIN_PROBES = 2 * len(REPLY_STARTS) + 1
MAX_READ = 1000  # records among which the conversations to check are picked
MIN_READ_OF_A_FILE = 20


def check_contract(renderer: "Renderer", conversations: Iterable[dict | Sequence[dict]] = ()) -> list[str]:
    """Return what is wrong between training and serving for this tokenizer and format; an empty list when all is well.

    Checked on built-in probes and on `conversations`, lists of messages or objects with `messages` and `tools`: the
    saved template renders the same string and ids; each turn's prompt is a strict prefix of the training ids; each
    reply ends in the stop token; typed control tokens stay plain. Conversations that the format can't hold are left
    out: the ledger counts them.
    """
    problems: dict[str, None] = {}
    if renderer.writes_date:  # transformers writes today's date; a run that resumes has the date of its start
        renderer = renderer.on_day(date.today())
    for number, item in enumerate([*probe_conversations(), *probe_tool_conversations(), *conversations]):
        messages, tools = (item["messages"], item.get("tools")) if isinstance(item, dict) else (item, None)
        try:
            problems.update(dict.fromkeys(_check_conversation(renderer, list(messages), tools)))
        except RecordError as error:
            if number < NUM_PLAIN_PROBES and (renderer.name != "base" or error.reason != "template"):
                problems[str(error)] = None
        except ValueError as error:
            problems[str(error)] = None
    if renderer.can_text_write_control_tokens():
        problems["control tokens typed in a message become control ids"] = None
    return list(problems)


def check_saved(tokenizer, renderer: "Renderer", conversations: Sequence[dict | Sequence[dict]] = ()) -> list[str]:
    """Return how a saved tokenizer, with the run.json beside it, differs from the `renderer` of the training.

    Template, variables, date and stop tokens must be the same, and so must the rows of `conversations`; and the saved
    template must give a server the prompts of training.
    """
    from sft.format.render import Renderer  # which asks this module for the format

    saved = Renderer(tokenizer, train_turns=renderer.train_turns)
    names = ("name", "template_kwargs", "thinking", "stop_ids")
    problems = [f"{name} differs" for name in names if getattr(saved, name) != getattr(renderer, name)]
    if own_chat_template(tokenizer) != renderer.chat_template:
        problems.append("its chat template differs")
    if renderer.writes_date and saved.today != renderer.today:
        problems.append("the date of its chat template differs")
    if not set(renderer.stop_ids) <= trained_stop_ids(tokenizer):
        problems.append("generation_config.json lacks a stop token")
    if problems:
        return problems
    batch = [*probe_tool_conversations(), *odd_conversations(), *conversations]
    ours, theirs = (each.render_rows(batch) for each in (renderer, saved))
    if any(not np.array_equal(one, other) for one, other in zip(ours, theirs, strict=True)):
        problems.append("it gives other ids or labels than training did")
    return problems + check_contract(saved, conversations)


def check_variables(renderer: "Renderer", given: Mapping | None) -> None:
    """Raise ValueError for variables of the chat template, typed by a user, that it doesn't read."""
    read = renderer.readable_variables
    if unread := [name for name in given or () if name not in read]:
        known = f"it reads {', '.join(sorted(read))}" if read else "it has none; leave it out"
        raise ValueError(f"--template_kwargs: chat format {renderer.name!r} doesn't read {', '.join(unread)}; {known}")


def pick_conversations(files: Sequence[str], num_of_a_kind: int, **reading) -> list[dict]:
    """Return conversations of each kind in the files' beginnings: with tools, calls, thoughts, a system text, turns.

    `reading` are options of `read_conversations`.
    """
    picked = []
    num_read = max(MIN_READ_OF_A_FILE, MAX_READ // max(1, len(files)))
    for file in files:
        found = Counter()
        readable = itertools.islice(read_conversations([file], **reading), num_read)
        for conversation in (item[0] for item in readable if item[1] is None):
            messages = conversation["messages"]
            fields = {key for message in messages for key in message} & {"tool_calls", "reasoning_content"}
            kind = (bool(conversation.get("tools")), frozenset(fields), messages[0]["role"], len(messages) > 3)
            found[kind] += 1
            if found[kind] <= num_of_a_kind:
                picked.append(conversation)
    return picked


def odd_conversations() -> Iterable[list[dict]]:
    """Conversations of random pieces that tokenizers treat in their own ways; the same at each call."""
    odd_characters = "7(|。.…#\t\n\r \\\x00\xa0\u2028\u3000▁𠀀😀‍é"
    pieces = [*odd_characters, "你好", "Hello", "**", "e\u0301", "'s", "</s>", "<think>", "12345"]
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


def probe_tool_conversations() -> Iterable[dict]:
    """Conversations with a thought, a call, parallel calls and their results; a format may have no place for them."""
    question = {"role": "user", "content": "天气 in Zürich?"}
    thought = {"role": "assistant", "content": "4.", "reasoning_content": "Two and two.\n\nFour."}
    yield {"messages": [question, thought, question, thought]}
    cities = ("Zürich", 'B "q"\n<b>')
    calls = [
        {"type": "function", "function": {"name": "probe_weather", "arguments": {"city": city}}} for city in cities
    ]
    results = [{"role": "tool", "content": text} for text in ('{"t": 18}', "晴")]
    for number in (1, 2):
        call = {"role": "assistant", "content": "", "tool_calls": calls[:number]}
        end = [*results[:number], {"role": "assistant", "content": "18."}]
        yield {"messages": [question, call, *end], "tools": [PROBE_TOOL]}
    yield {"messages": [question, {**call, "reasoning_content": "I call."}, *end], "tools": [PROBE_TOOL]}


def _check_conversation(renderer: "Renderer", messages: list[dict], tools: list[dict] | None) -> Iterable[str]:
    rows = [row for row in renderer.render_conversation(messages, tools=tools) if len(row.input_ids)]
    example = repr(messages[-1]["content"][:20])
    is_named = renderer.names_control(messages, tools)  # which a server takes for the token
    whole = renderer.text(messages, tools=tools)
    if not is_named and _render_as_server(renderer, messages, tools, add_generation_prompt=False) != whole:
        yield f"the chat template renders other text than training does (reply {example})"
    trained = find_trained(messages)
    for index in trained[-1:] if renderer.train_turns == "last" else trained:
        message = messages[index]
        history = messages[:index]
        if not history or history[-1]["role"] not in ("user", "tool"):
            continue
        thinking = bool(message.get("reasoning_content"))
        prompt = renderer.prompt(history, tools=tools, thinking=thinking)
        if not is_named and prompt != _served_ids(renderer, history, tools, thinking=thinking):
            yield f"the chat template gives other ids than training does (reply {example})"
        holding = [row for row in rows if row.input_ids[: len(prompt)].tolist() == prompt]
        if not any(len(row.input_ids) > len(prompt) for row in holding):
            yield f"the prompt is not a prefix of the training ids (reply {example})"
        elif all(row.labels[len(prompt) :][:1].tolist() == [IGNORE_INDEX] for row in holding):
            yield f"the first token of a reply is not trained (reply {example})"
    for row in rows:
        trained = row.labels[row.labels != IGNORE_INDEX]
        if not len(trained) or trained[-1] not in renderer.stop_ids:
            yield f"a reply does not end in the stop token (reply {example})"


def _render_as_server(
    renderer: "Renderer", messages: list[dict], tools, *, add_generation_prompt: bool, thinking: bool | None = None
) -> str:
    """Render as a server does, by transformers' own code."""
    variables = dict(renderer.template_kwargs)
    thinking = renderer.thinking if thinking is None else thinking
    if thinking is not None and renderer.thinking_switch:
        variables = {renderer.thinking_switch: thinking, **variables}
    return renderer.tokenizer.apply_chat_template(
        renderer.as_served(messages),
        tools=tools,
        chat_template=renderer.chat_template,
        add_generation_prompt=add_generation_prompt,
        tokenize=False,
        **variables,
    )


def _served_ids(renderer: "Renderer", messages: list[dict], tools, *, thinking: bool | None) -> list[int]:
    text = _render_as_server(renderer, messages, tools, add_generation_prompt=True, thinking=thinking)
    return renderer.tokenizer.encode(text, add_special_tokens=False)


# --- choosing a format --------------------------------------------------------------------------------------------


def saved_run(tokenizer) -> dict:
    """Return the run.json beside a checkpoint's tokenizer, or an empty dict."""
    folder = Path(tokenizer.name_or_path)
    for file in (folder / "run.json", folder.parent / "run.json"):  # the second is that of an earlier checkpoint
        try:
            run = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(run, dict):
            return run
    return {}


def own_chat_template(tokenizer) -> str | None:
    """Return the tokenizer's chat template; of several, the one named default."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def require_template(tokenizer) -> str:
    """Return the tokenizer's own chat template; ValueError says which ones it has in place of it."""
    if template := own_chat_template(tokenizer):
        return template
    if names := ", ".join(sorted(tokenizer.chat_template or ())):
        raise ValueError(f"its chat templates are {names}, none is named default; save one as chat_template.jinja")
    raise ValueError("chat format 'base': this tokenizer has no chat template of its own; name another format")


def choose_format(name: str, tokenizer) -> tuple[str, str]:
    """Resolve "auto" to a format; return its name and why.

    A checkpoint of ours keeps its format. A chat model keeps its own template where that passes the contract, else
    ChatML or Mistral's. A base model gets Blossom's, which is made of ordinary characters: base Qwen2.5 has a ChatML
    template too, but the embedding row of its `<|im_end|>` was never trained.
    """
    if name not in FORMAT_NAMES:
        raise ValueError(f"unknown chat format {name!r}; use one of {', '.join(FORMAT_NAMES)}")
    if name != "auto":
        return name, "as asked"
    template = own_chat_template(tokenizer) or ""
    saved = saved_format(template) or saved_run(tokenizer).get("chat_format")
    if saved in FORMAT_NAMES[1:]:
        return saved, "the checkpoint was trained with it"
    problem = "it has no chat template"
    untrained = []
    reason = ""
    if template:
        problem, untrained, reason = judge_own_template(tokenizer)
    if not problem:
        return "base", f"the model's own template passes the checks, and {reason}"
    chatml_end = CHAT_FORMATS["chatml"].end
    if tokenizer.eos_token == chatml_end and chatml_end not in untrained:
        return "chatml", f"the model ends its turns with {tokenizer.eos_token}; {problem}"
    if CHAT_FORMATS["mistral"].user[1].strip() in template:
        return "mistral", f"the model's template is Mistral's; {problem}"
    return "blossom", f"made of ordinary characters, for a base model; {problem}"


def judge_own_template(tokenizer) -> tuple[str, list[str], str]:
    """Return why `auto` doesn't take a tokenizer's own chat template, its untrained control tokens, and why it does.

    A model is a chat model where the embedding rows of the template's control tokens are trained, as far as its files
    show that, or else where it is known to end its replies with the template's stop token.
    """
    from sft.format.render import Renderer  # which asks this module for the format

    try:
        renderer = Renderer(tokenizer, "base")
    except ValueError as error:
        return str(error), [], ""
    name = tokenizer.convert_ids_to_tokens
    ids = sorted({*renderer.control_ids, renderer.stop_ids[0]})
    others = sorted(set(tokenizer.get_added_vocab().values()) - set(ids))
    found = find_untrained(tokenizer.name_or_path, ids, num_tokens=len(tokenizer), others=others)
    if found and found.untrained_ids:
        untrained = list(map(name, found.untrained_ids))
        rows = "row was" if len(untrained) == 1 else "rows were"
        return f"its own template writes {', '.join(untrained)}, whose embedding {rows} never trained", untrained, ""
    stop = name(renderer.stop_ids[0])
    has_example = bool(found and found.has_example)
    looked = "its embedding rows were not looked at, as they are not here"
    if has_example:
        looked = f"the embedding rows of {', '.join(map(name, ids))} are trained"
    elif found:
        looked = f"the embedding rows of {', '.join(map(name, ids))} look trained"
    is_known = renderer.stop_ids[0] in trained_stop_ids(tokenizer)
    if not is_known and not has_example:
        return f"its own template ends turns with {stop}, on which it may not have been trained ({looked})", [], ""
    known = f"the model ends its replies with {stop}; " if is_known else ""
    return next(iter(check_contract(renderer)), ""), [], known + looked


def trained_stop_ids(tokenizer) -> set[int]:
    """Return the ids that a model is known to end its replies with: eos, and those of its generation_config.json."""
    found = {tokenizer.eos_token_id}
    folder = find_folder(tokenizer.name_or_path)
    try:
        config = json.loads((folder / "generation_config.json").read_text(encoding="utf-8")) if folder else {}
        ids = config.get("eos_token_id")
        found |= set(ids) if isinstance(ids, list) else {ids}
    except (OSError, ValueError):
        pass
    return found
