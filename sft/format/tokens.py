"""Rows of token ids and labels, how an overlong one is cut, and a tokenizer in which text writes no control token."""

import json
import re
import secrets
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from sft.format.table import Part
from sft.opendata.fields import RecordError

# The ids of a prompt and of the reply to it.
TurnIds = tuple[list[int], list[int]]

IGNORE_INDEX = -100
HALF_CHARACTER = "\ufffd"  # decoded from the bytes of half a character
ZERO_WIDTH_JOINER = "\u200d"
EMOJI_JOINERS = (ZERO_WIDTH_JOINER, "\ufe0f")  # inside one visible emoji; the second marks its coloured form


class Rendered(NamedTuple):
    """One row of tokens: `input_ids` and `labels` (length,) int32, labels unshifted.

    `outcome` is "whole", "turns_dropped" (whole trailing turns left out), "cut" (the first answer cut, without a stop
    token), or, with no tokens at all, "prompt_too_long", "no_trained_token", "boundary" or "template"; `why` has the
    template's words.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    outcome: str

    why: str = ""


class Rows(NamedTuple):
    """A batch of conversations as flat arrays: `input_ids` and `labels` (tokens,) int32, `lengths` (rows,) int64.

    `outcomes` has one entry per conversation, as in `Rendered`, `num_rows` its number of rows, 0 where it was lost, and
    `whys` the words of a template that refused it.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray
    outcomes: list[str]
    num_rows: list[int]
    whys: list[str]


def empty_row(reason: str, why: str = "") -> Rendered:
    """Return the row of a conversation that is lost for `reason`."""
    empty = np.zeros(0, dtype=np.int32)
    return Rendered(empty, empty, reason, why)


def join_rows(rendered: Sequence[Sequence[Rendered]]) -> Rows:
    """Join the rows of a batch, one or more per conversation, into flat arrays."""
    kept = [row for rows in rendered for row in rows if len(row.input_ids)]
    empty = np.zeros(0, dtype=np.int32)
    ids = np.concatenate([empty, *(row.input_ids for row in kept)])
    labels = np.concatenate([empty, *(row.labels for row in kept)])
    lengths = np.asarray([len(row.input_ids) for row in kept], dtype=np.int64)
    num_rows = [sum(len(row.input_ids) > 0 for row in rows) for rows in rendered]
    return Rows(
        ids, labels, lengths, [rows[0].outcome for rows in rendered], num_rows, [rows[0].why for rows in rendered]
    )


# --- rows of turns ------------------------------------------------------------------------------------------------


def encode_turns(
    turns: Sequence[tuple[str, str]], backend: Tokenizer, anchor: str
) -> list[tuple[list[int], list[int]]]:
    """Encode (prompt, reply) texts: the prompt as a server does, and the reply as what follows it.

    If a token would cross the seam, the reply is encoded without the prompt, behind the control token `anchor`:
    a model that is asked with the prompt's tokens can't write that token.
    """
    texts = [text for prompt, reply in turns for text in (prompt, prompt + reply, anchor + reply)]
    encoded = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    pairs = []
    for prompt, whole, alone in zip(encoded[::3], encoded[1::3], encoded[2::3], strict=True):
        pairs.append((prompt, whole[len(prompt) :] if whole[: len(prompt)] == prompt else alone[1:]))
    return pairs


def rows_of_turns(turns: Sequence[TurnIds], backend: Tokenizer, max_length: int | None) -> list[Rendered]:
    """Put a conversation's trained turns into as few rows as can be, and leave out what doesn't fit in `max_length`.

    Turns share a row where the later prompt begins with exactly the ids before it. Of several rows, those that fit are
    kept; if none does, the first one is cut.
    """
    rows: list[tuple[list[int], list[int], list[int]]] = []  # ids, labels, turn ends
    for prompt, reply in turns:
        if not rows or prompt[: len(rows[-1][0])] != rows[-1][0]:
            rows.append(([], [], []))
        ids, labels, ends = rows[-1]
        labels += [IGNORE_INDEX] * (len(prompt) - len(ids)) + reply
        ids += prompt[len(ids) :] + reply
        ends.append(len(ids))
    shortened = []
    for ids, labels, ends in rows:
        arrays = [np.asarray(values, dtype=np.int32) for values in (ids, labels)]
        start = next((place for place, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
        around = text_around_by_decoding(backend, arrays[0], start)
        shortened.append(shorten_row(*arrays, np.asarray(ends), max_length, around))
    complete = [row for row in shortened if row.outcome in ("whole", "turns_dropped")]
    if all(row.outcome == "whole" for row in shortened):
        return shortened
    return [row._replace(outcome="turns_dropped") for row in complete] or shortened[:1]


# --- truncation ---------------------------------------------------------------------------------------------------


def shorten_row(
    ids: np.ndarray,
    labels: np.ndarray,
    turn_ends: np.ndarray,
    max_length: int | None,
    text_around: Callable[[int], tuple[str, str] | None],
) -> Rendered:
    """Keep of a row what fits in `max_length` tokens: whole turns, or else the beginning of the first reply.

    `turn_ends` are the lengths of the row at which a reply is complete, in ascending order. A cut reply ends at the end
    of a character, and without a stop token, as it must not teach the model to stop. `text_around(length)` returns the
    text before and after a length of the row, or None inside a character.
    """
    length = len(ids)
    outcome = "whole"
    if max_length is not None and length > max_length:
        fitting = turn_ends[turn_ends <= max_length]
        if len(fitting):
            length = int(fitting[-1])
            outcome = "whole" if length == turn_ends[-1] else "turns_dropped"
        else:
            length = max_length
            outcome = "cut"
            while length and not _can_end_at(text_around(length)):
                length -= 1
    if (labels[:length] == IGNORE_INDEX).all():
        is_trained = bool((labels != IGNORE_INDEX).any())
        return empty_row("prompt_too_long" if is_trained and outcome == "cut" else "no_trained_token")
    return Rendered(ids[:length].copy(), labels[:length].copy(), outcome)


def _can_end_at(around: tuple[str, str] | None) -> bool:
    """Say whether a row may end between two texts: not inside a character, nor before what joins or marks one."""
    if around is None:
        return False
    before, after = around
    is_mark = unicodedata.combining(after[:1] or "x") != 0
    return not (is_mark or after[:1] in EMOJI_JOINERS or before[-1:] == ZERO_WIDTH_JOINER)


def text_around_by_offsets(text: str, offsets: np.ndarray) -> Callable[[int], tuple[str, str] | None]:
    """Return the `text_around` of a row whose tokens have character offsets (tokens, 2) in `text`."""

    def text_around(length: int) -> tuple[str, str] | None:
        start = int(offsets[length, 0])
        if start < offsets[length - 1, 1]:
            return None
        return text[max(0, start - 1) : start], text[start : start + 1]

    return text_around


def text_around_by_decoding(
    backend: Tokenizer, ids: np.ndarray, reply_start: int
) -> Callable[[int], tuple[str, str] | None]:
    """Return the `text_around` of a row whose tokens are bytes, for lengths after `reply_start`."""

    def text_around(length: int) -> tuple[str, str] | None:
        begin = max(min(reply_start, length), length - 16)
        before = backend.decode(ids[begin:length].tolist(), skip_special_tokens=False)
        text = backend.decode(ids[begin : length + 16].tolist(), skip_special_tokens=False)
        is_whole = text.startswith(before) and not before.endswith(HALF_CHARACTER)
        return (before, text[len(before) :]) if is_whole else None

    return text_around


# --- control tokens -----------------------------------------------------------------------------------------------


def any_of(texts: Iterable[str]) -> re.Pattern:
    """Return a pattern that matches any of the texts, the longest first; without texts it matches nothing."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def unforgeable_backend(tokenizer) -> tuple[Tokenizer, dict[str, str], str]:
    """Copy the Rust tokenizer with every control token renamed to a random private-use string, ids unchanged.

    Returns the copy, the new names, and the name of a further token, which separates texts.
    `split_special_tokens` is not enough: it leaves added tokens such as `<think>`
    live (transformers 5.23). Added words and runs of whitespace keep their names; they are ordinary text.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    nonce = secrets.token_hex(8)
    names = {}
    for token in spec["added_tokens"]:
        if token["special"] or not re.fullmatch(r"[\w\s]*", token["content"]):
            names[token["content"]] = f"\ue000{nonce}{token['id']}\ue001"
            token["content"] = names[token["content"]]
    spec["model"] = _rename_in_model(spec["model"], names)
    seam = f"\ue000{nonce}\ue001"
    spec["added_tokens"].append(_describe_token(seam, _find_free_id(spec)))
    spec.update(post_processor=None, truncation=None, padding=None)
    backend = Tokenizer.from_str(json.dumps(spec))
    for token, name in names.items():
        if backend.token_to_id(name) != tokenizer.convert_tokens_to_ids(token):
            raise ValueError(f"the tokenizer gives its token {token!r} an id that it can't be loaded with")
    return backend, names, seam


class BareTokenizer:
    """The part of a transformers tokenizer that a Renderer uses, without transformers; it can be sent to a process.

    It neither decodes nor renders a chat template.
    """

    is_fast = True

    def __init__(self, tokenizer):
        self.backend_tokenizer = tokenizer.backend_tokenizer
        self.special_tokens_map = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        self.bos_token = tokenizer.bos_token
        self.bos_token_id = tokenizer.bos_token_id
        self.eos_token = tokenizer.eos_token
        self.eos_token_id = tokenizer.eos_token_id
        self.chat_template = tokenizer.chat_template
        self.name_or_path = tokenizer.name_or_path
        self._added_vocab = tokenizer.get_added_vocab()

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self.backend_tokenizer.encode(text).ids}

    def get_added_vocab(self) -> dict[str, int]:
        return self._added_vocab

    def convert_tokens_to_ids(self, token: str) -> int | None:
        return self.backend_tokenizer.token_to_id(token)

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return self.backend_tokenizer.id_to_token(token_id)


def _rename_in_model(model: dict, names: dict[str, str]) -> dict:
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        renamed = names.keys() & vocab.keys()
        vocab.update({names[token]: vocab.pop(token) for token in renamed})
        if renamed and "merges" in model:
            pairs = (merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"])
            model["merges"] = [pair for pair in pairs if not renamed & {*pair, "".join(pair)}]
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return model


def _find_free_id(spec: dict) -> int:
    vocab = spec["model"]["vocab"]
    in_model = vocab.values() if isinstance(vocab, dict) else [len(vocab) - 1]
    return 1 + max([*in_model, *(token["id"] for token in spec["added_tokens"])])


def _describe_token(name: str, token_id: int) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": name, **flags, "special": True}


def label_parts(parts: list[Part], encoding, max_length: int | None) -> Rendered:
    """Turn one encoding into ids and labels: a token is in the loss when it starts in a part that is."""
    ids = np.asarray(encoding.ids, dtype=np.int32)
    offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    ends = np.cumsum([len(part.text) for part in parts])
    starts_in = np.searchsorted(ends, offsets[:, 0], side="right").clip(max=len(parts) - 1)
    in_loss = np.asarray([part.in_loss for part in parts])[starts_in]
    _check_boundaries(parts, ends, offsets)
    labels = np.where(in_loss, ids, IGNORE_INDEX).astype(np.int32)
    turn_ends = [end for part, end in zip(parts, ends, strict=True) if part.ends_turn]
    turn_lengths = np.searchsorted(offsets[:, 0], turn_ends, side="left")
    text_around = text_around_by_offsets("".join(part.text for part in parts), offsets)
    return shorten_row(ids, labels, turn_lengths, max_length, text_around)


def _check_boundaries(parts: list[Part], ends: np.ndarray, offsets: np.ndarray) -> None:
    """Refuse a token that crosses the end of the prompt: generation never gets it."""
    for before, reply, end in zip(parts, parts[1:], ends, strict=False):
        if before.in_loss or not reply.in_loss:
            continue
        index = int(np.searchsorted(offsets[:, 0], end, side="left")) - 1
        if index >= 0 and offsets[index, 0] < end < offsets[index, 1]:
            raise RecordError("boundary", "a token reaches over the point where the prompt ends and the reply begins")
