"""The known record forms: which keys they have, and the error for a record that can't be used."""

MESSAGE_LISTS = ("messages", "conversations")
SYSTEM_KEYS = ("system", "system_prompt")
# Question, what may come with it, answer. The first row of which question and answer are not null decides.
PAIRS = (
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("prompt", None, "completion"),
    ("prompt", None, "response"),
    ("query", None, "response"),
    ("question", None, "answer"),
    ("question", None, "response"),
    ("input", None, "target"),
    ("input", None, "output"),
)


class RecordError(ValueError):
    """One record can't be used. `reason` is a short code for ledgers; the text says which field and what to do."""

    def __init__(self, reason: str, message: str):
        # A message that quotes a lone surrogate must still be printable.
        super().__init__(reason, message.encode("utf-8", "backslashreplace").decode())
        self.reason = reason

    def __str__(self) -> str:
        return self.args[1]


def find_form(record: object) -> str | tuple | None:
    """The key of a message list, or a row of PAIRS."""
    if not isinstance(record, dict):
        return None
    lists = [key for key in MESSAGE_LISTS if isinstance(record.get(key), list)]
    pairs = [pair for pair in PAIRS if record.get(pair[0]) is not None and record.get(pair[2]) is not None]
    filled = [key for key in lists if record[key]]
    return next(iter(filled + pairs + lists), None)


def name_type(value: object) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def has_lone_surrogate(text: str) -> bool:
    """Whether there is a lone surrogate, which no encoding can write."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def read_text(value: object, where: str) -> str:
    if not isinstance(value, str):
        if value is None:
            raise RecordError("null_field", f"{where} is null; give a text or leave the record out")
        raise RecordError("not_text", f"{where} is {name_type(value)}; write it as a string")
    if has_lone_surrogate(value):
        position, char = next((i, char) for i, char in enumerate(value) if "\ud800" <= char <= "\udfff")
        found = f"a lone surrogate (\\u{ord(char):04x}) at character {position + 1}"
        raise RecordError("lone_surrogate", f"{where} has {found}, half of a character; fix the text")
    return value
