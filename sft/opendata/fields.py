"""The table of fields: which keys a record form has, which keys change what a record means, and how one field is read.

A key that holds something is read, honoured, refused by name, or counted as not read; no key passes silently.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NotRequired, TypedDict


class RecordError(ValueError):
    """One record can't be used. `reason` is a short code for ledgers; the text says which field and what to do."""

    def __init__(self, reason: str, message: str):
        # A message that quotes a lone surrogate must still be printable.
        super().__init__(reason, message.encode("utf-8", "backslashreplace").decode())
        self.reason = reason

    def __str__(self) -> str:
        return self.args[1]


@dataclass
class FieldCounts:
    """Of one file: `unread` counts the fields that were not read by name, `notes` what was read in a special way."""

    unread: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    def add(self, other: "FieldCounts") -> None:
        """Add the counts of a further piece of the file."""
        self.unread.update(other.unread)
        self.notes.update(other.notes)


class NotChosen(RecordError):
    """The record is left out because `--preference chosen` says so; nothing is wrong with it."""


# --- The canonical record


class Message(TypedDict):
    """A message. Role is system, user, assistant or tool; keys that don't apply to the role are absent.

    assistant: `content` may be "" beside `tool_calls`; `train` is absent (trained) or False. A call is
    {"id"?, "type": "function", "function": {"name", "arguments"}}; its arguments are an object, never JSON text.
    tool: `content` is the result of the call `tool_call_id`, or of the next call without a result if that is absent.
    """

    role: str
    content: str
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[dict]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]
    train: NotRequired[bool]


class Conversation(TypedDict):
    """The canonical record: maybe a system message, then user and assistant take turns; the last turn is a reply.

    The results of a reply's calls, one tool message each, come between it and the next reply. `tools` are the
    definitions offered, {"type": "function", "function": {"name", "description"?, "parameters"?}} with a JSON schema
    as parameters; the key is absent where there are none.
    """

    id: str
    source: str
    messages: list[Message]
    tools: NotRequired[list[dict]]


# --- Keys that change what a record means

SYSTEM_KEYS = ("system", "system_prompt")
TOOL_KEYS = ("tools", "functions")
# The text that a model thinks before it replies.
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
CALL_KEYS = ("tool_calls", "function_call")
# Whether a reply is learned, in the words of several toolkits: train (ours, axolotl), loss (ms-swift), weight (OpenAI),
# loss_weight (LLaMA-Factory v1), training and trainable.
SWITCHES = ("train", "loss", "training", "trainable", "weight", "loss_weight")
# The same for parts of a text, or as a factor: never honoured.
OTHER_SWITCHES = ("loss_scale", "train_detail", "training_detail", "mask")
# Files beside the text. LLaMA-Factory and ms-swift use the plural, LLaVA and others the singular.
MEDIA_KEYS = ("images", "image", "videos", "video", "audios", "audio")
MEDIA_KEYS += tuple(
    f"{kind}_{what}" for kind in ("image", "video", "audio") for what in ("path", "paths", "url", "urls")
)
# The better and the worse of two replies, and what holds them.
CHOSEN_KEYS = ("chosen", "chosen_response", "response_chosen", "preferred_output")
REJECTED_KEYS = ("rejected", "rejected_response", "response_rejected", "rejected_messages", "non_preferred_output")

MEANING_KEYS = frozenset((*SWITCHES, *OTHER_SWITCHES, *MEDIA_KEYS, *CHOSEN_KEYS, *REJECTED_KEYS, "label", "loss_mask"))

# --- The forms


@dataclass(frozen=True)
class Form:
    """A way to write a conversation: `keys` hold it, and `optional` keys are read where they are there."""

    keys: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @cached_property
    def read(self) -> frozenset[str]:
        """All keys of a record of texts that are read or checked; a label is read where it says good or bad."""
        beside = () if self in MESSAGE_LISTS else (*THOUGHT_KEYS, *CALL_KEYS, *self.optional)
        return MEANING_KEYS.difference(("label",)).union(("id",), SYSTEM_KEYS, TOOL_KEYS, self.keys, beside)

    @cached_property
    def read_beside_lists(self) -> frozenset[str]:
        """The same where the keys hold messages or calls, which have their own thoughts."""
        return self.read.difference(THOUGHT_KEYS, CALL_KEYS, self.optional)


MESSAGE_LISTS = (Form(("messages",)), Form(("conversations",)))
# Question, answer, and what may come with the question. The first row whose keys are not null decides.
PAIRS = (
    Form(("instruction", "output"), ("input", "history")),
    Form(("instruction", "response"), ("context", "history")),
    Form(("prompt", "completion"), ("history",)),
    Form(("prompt", "response"), ("history",)),
    Form(("query", "response"), ("history",)),
    Form(("question", "answer"), ("history",)),
    Form(("question", "response"), ("history",)),
    Form(("input", "target"), ("history",)),
    Form(("input", "output"), ("history",)),
    Form(("query", "tools", "answers")),
)

MESSAGE_KEYS = frozenset(("role", "from", "content", "value", *SWITCHES, *OTHER_SWITCHES, *MEDIA_KEYS))
ASSISTANT_KEYS = MESSAGE_KEYS.union(THOUGHT_KEYS, CALL_KEYS)
TOOL_MESSAGE_KEYS = MESSAGE_KEYS.union(("tool_call_id", "name"))


def find_form(record: object) -> Form | None:
    """Return the form of a record: a filled list of messages, else a pair, else an empty list of messages."""
    if not isinstance(record, dict):
        return None
    empty = None
    for form in MESSAGE_LISTS:
        value = record.get(form.keys[0])
        if value and (isinstance(value, list) or is_messages_text(value) or is_columns(value)):
            return form
        if isinstance(value, list):
            empty = empty or form
    for form in PAIRS:
        if all(record.get(key) is not None for key in form.keys):
            return form
    return empty


def is_messages_text(value: object) -> bool:
    """Whether a list of messages is written as JSON text, as some Parquet and CSV files have it."""
    return isinstance(value, str) and value.lstrip()[:1] == "[" and "{" in value


def is_columns(value: object) -> bool:
    """Whether messages are an object of two lists, roles and texts, as Parquet exports have them."""
    return isinstance(value, dict) and len([key for key in value if isinstance(value[key], list)]) >= 2


def count_unread(item: dict, read: frozenset[str], prefix: str, unread: Counter[str]) -> None:
    """Count the keys of `item` that hold something and are not in `read`."""
    for key, value in item.items():
        if key not in read and not is_empty(value):
            unread[f"{prefix}{key}"] += 1


def list_counts(counts: dict[str, int]) -> str:
    """`lang 300, score 12`: the largest count first."""
    return ", ".join(
        f"{name} {count:,}" for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    )


def is_empty(value: object) -> bool:
    """Whether a field holds nothing: null, or an empty text, list or object."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def is_blank(message: Message) -> bool:
    """Whether a text is missing; a result and the text beside a call may be empty."""
    return not message["content"].strip() and message["role"] != "tool" and "tool_calls" not in message


def check_media(item: dict, where: str) -> None:
    """Raise RecordError if there are pictures, sounds or films beside the text."""
    for key in MEDIA_KEYS:
        if not is_empty(item.get(key)):
            message = f"{where}{key} holds media, and only text is learned; leave the record out"
            raise RecordError(key.partition("_")[0].rstrip("s") + "s", message)


def read_switch(item: dict, where: str) -> bool | None:
    """Return whether a reply is to be learned, or None where it isn't said. Raises RecordError for other values."""
    for key in OTHER_SWITCHES:
        if not is_empty(item.get(key)):
            raise RecordError("loss_switch", f"{where}{key} can't be honoured; use train: false for a whole reply")
    found = {key: as_boolean(item[key]) for key in SWITCHES if item.get(key) is not None}
    for key, value in found.items():
        if value is None:
            shown = json.dumps(item[key])[:40]
            raise RecordError("loss_switch", f"{where}{key} is {shown}; only 0 and 1, false and true are honoured")
    if len(set(found.values())) > 1:
        raise RecordError("loss_switch", f"{where}{' and '.join(found)} contradict each other; keep one")
    return next(iter(found.values()), None)


def read_learned(item: dict, mask: object, is_reply: bool, where: str) -> dict[str, bool]:
    """Return {"train": False} for a message that is not to be learned, by a switch or by the record's loss_mask."""
    learned = read_switch(item, f"{where}.")
    if mask is not None:
        masked = as_boolean(mask)
        if masked is None or learned not in (None, masked):
            raise RecordError("loss_switch", f"{where}: its loss_mask is neither 0 nor 1, or contradicts its switch")
        learned = masked
    if learned and not is_reply:
        raise RecordError("loss_switch", f"{where} is to be learned, but only replies are; set its switch to 0")
    return {"train": False} if learned is False and is_reply else {}


def as_boolean(value: object) -> bool | None:
    """0/1, false/true, and these as text; None for everything else."""
    if isinstance(value, str):
        value = {"true": True, "false": False, "0": False, "1": True, "0.0": False, "1.0": True}.get(
            value.strip().lower()
        )
    return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None


# --- One field


def name_type(value: object) -> str:
    """Name the JSON type of a value, with its article."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def has_lone_surrogate(text: str) -> bool:
    """Whether there is a lone surrogate, which no encoding can write."""
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def read_text(value: object, where: str) -> str:
    """Return a text as it is. Raises RecordError for null, other types and halves of characters."""
    if not isinstance(value, str):
        if value is None:
            raise RecordError("null_field", f"{where} is null; give a text or leave the record out")
        raise RecordError("not_text", f"{where} is {name_type(value)}; write it as a string")
    if has_lone_surrogate(value):
        position, char = next((i, char) for i, char in enumerate(value) if "\ud800" <= char <= "\udfff")
        found = f"a lone surrogate (\\u{ord(char):04x}) at character {position + 1}"
        raise RecordError("lone_surrogate", f"{where} has {found}, half of a character; fix the text")
    return value


def read_call_id(value: object, where: str) -> str:
    """Return the id of a call as text, also where it is a number; "" if it is missing. Raises RecordError."""
    if value is None:
        return ""
    return str(value) if type(value) in (int, float) else read_text(value, where)


def read_result(value: object, where: str) -> str:
    """Return the result of a call: a text, or JSON text of an object or list that isn't one."""
    if not isinstance(value, dict | list):
        return read_text(value, where)
    check_json(value, where)
    return json.dumps(value, ensure_ascii=False)


def drop_nulls(value: Any) -> Any:
    """Leave out keys whose value is null: padding, where a table gives all rows the keys of all others."""
    if isinstance(value, dict):
        return {key: drop_nulls(inner) for key, inner in value.items() if inner is not None}
    return [drop_nulls(inner) for inner in value] if isinstance(value, list) else value


def parse_json(text: str) -> Any:
    """Parse JSON inside a text. Raises ValueError, for a key that is there twice and for NaN too."""
    return json.loads(text, object_pairs_hook=unique_keys, parse_constant=_refuse_constant)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its pairs. Raises RecordError for a key that is there twice."""
    record = dict(pairs)
    if len(record) != len(pairs):
        key = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise RecordError("duplicate_key", f'key "{key}" occurs twice in one object; keep one')
    return record


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def check_json(value: object, where: str) -> None:
    """Raise RecordError unless `value` can be written as JSON in UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise RecordError("lone_surrogate", f"{where} has a lone surrogate, half of a character; fix it") from error
    except (ValueError, RecursionError) as error:
        raise RecordError("not_json", f"{where} can't be written as JSON ({error}); fix it") from error


# --- Choices of the user

REASONING = ("auto", "keep", "drop")
PREFERENCES = ("chosen",)


def check_choices(reasoning: str, preference: str | None) -> list[str]:
    """List what is wrong with --reasoning and --preference."""
    mistakes = [] if reasoning in REASONING else [f"--reasoning {reasoning}: use {', '.join(REASONING)}"]
    if preference not in (None, *PREFERENCES):
        mistakes.append(f"--preference {preference}: use {', '.join(PREFERENCES)}, or leave it out")
    return mistakes


def take_chosen(record: dict, preference: str | None) -> dict:
    """Return preference data as a record of another form that holds the chosen reply; other records as they are.

    Raises RecordError without `--preference chosen`, and NotChosen for what is labelled as bad.
    """
    keys = [key for key in (*CHOSEN_KEYS, *REJECTED_KEYS) if not is_empty(record.get(key))]
    label = as_boolean(record.get("label"))
    if not keys and label is None:
        return record
    if preference is None:
        shown = " and ".join(keys or ["label"])
        advice = "--preference chosen takes the chosen replies and leaves out the others"
        raise RecordError("preference", f"{shown}: preference data, of which half is bad; {advice}")
    if label is False:
        raise NotChosen("not_chosen", "label is false: left out by --preference chosen")
    if label is not None:
        keys.append("label")
    rest = {key: value for key, value in record.items() if key not in keys}
    found = {key: record[key] for key in CHOSEN_KEYS if key in keys}
    if any(value != next(iter(found.values())) for value in found.values()):
        raise RecordError("preference", f"{' and '.join(found)} differ; keep one")
    return _put_chosen(rest, next(iter(found.values()))) if found else rest


def _put_chosen(record: dict, chosen: object) -> dict:
    if isinstance(chosen, dict):
        chosen = [chosen]
    if isinstance(chosen, list) and chosen and isinstance(chosen[0], dict):
        first = chosen[0].get("role") or chosen[0].get("from")
        if first in ("user", "human", "system"):
            return _put_conversation(record, chosen)
    inner = record.get("input")
    if isinstance(inner, dict) and isinstance(inner.get("messages"), list):
        record = {key: value for key, value in record.items() if key != "input"} | inner
    for form in MESSAGE_LISTS:
        if isinstance(messages := record.get(form.keys[0]), list):
            reply = [{"role": "assistant", "content": chosen}] if isinstance(chosen, str) else chosen
            return record | {form.keys[0]: [*messages, *reply]}
    for form in PAIRS:
        question = form.keys[0]
        answer = form.keys[-1]
        if record.get(question) is not None and len(form.keys) == 2:
            if record.get(answer) not in (None, "", chosen):
                raise RecordError("preference", f"{answer} and the chosen reply differ; keep one")
            if isinstance(record[question], list) == isinstance(chosen, list):
                return record | {answer: chosen}
            if isinstance(chosen, list):
                asked = {"role": "user", "content": record[question]}
                return {key: value for key, value in record.items() if key != question} | {"messages": [asked, *chosen]}
            return record | {answer: [{"role": "assistant", "content": chosen}]}
    raise RecordError("preference", "the chosen reply has no question beside it; write prompt, chosen and rejected")


def _put_conversation(record: dict, chosen: list[dict]) -> dict:
    """Return a record whose chosen messages are a whole conversation; `prompt` is left out where they repeat it."""
    prompt = record.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
        num_system = int((prompt[0].get("role") or prompt[0].get("from")) == "system")
        if prompt[num_system:] == chosen[: len(prompt) - num_system]:
            chosen = [*prompt[:num_system], *chosen]
    first_text = chosen[0].get("content", chosen[0].get("value"))
    is_repeated = prompt == first_text or (isinstance(prompt, list) and prompt == chosen[: len(prompt)])
    rest = {key: value for key, value in record.items() if key != "prompt" or not is_repeated}
    return rest | {"messages": chosen}
