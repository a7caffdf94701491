"""Conversations to rows in bulk: the text between the seams of the loss is encoded segment by segment, in one call.

    [prompt up to the reply, reply with its end token, prompt of the next reply, ...]    in the loss: no, yes, no, ...

Segments are encoded one by one, so words must not reach over them: tokenizers without a pre-tokenizer that splits, or
with one that puts a space in front of each segment, keep the slower way, which encodes whole conversations.
"""

import itertools
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from sft.format.table import Part
from sft.format.tokens import HALF_CHARACTER, IGNORE_INDEX, Rendered, Rows, shorten_row, text_around_by_decoding
from sft.opendata.fields import RecordError

if TYPE_CHECKING:
    from sft.format.own_template import Turn

MIN_FAST_BYTES = 1 << 20  # of data: for less, making a fast encoder takes longer than it saves
# gigatoken keeps each word that it met: 50 MiB after so many characters. Then it begins anew, in 0.1 s (dev/LOG.md).
MAX_REMEMBERED_CHARACTERS = 30_000_000
# Code points that gigatoken 0.10.0 normalises or splits by Unicode 17, and tokenizers 0.23 by older tables.
_NEW_TO_TOKENIZERS = (
    *((0x7FD, 0x7FD), (0x88F, 0x88F), (0x897, 0x89F), (0x8CA, 0x8D3), (0x9FE, 0x9FE), (0xC3C, 0xC3C), (0xC5C, 0xC5C)),
    *((0xCDC, 0xCDC), (0xD3B, 0xD3C), (0xEBA, 0xEBA), (0x1715, 0x1715), (0x1ABF, 0x1ADD), (0x1AE0, 0x1AEB)),
    *((0x1DF6, 0x1DFA), (0xA7CE, 0xA7CF), (0xA7D2, 0xA7D2), (0xA7D4, 0xA7D4), (0xA7F1, 0xA7F1), (0xA82C, 0xA82C)),
    *((0x105C9, 0x11F42), (0x1611E, 0x16FF6), (0x187F8, 0x18DF2), (0x1E08F, 0x1E6FF), (0x2B73A, 0x2B73F)),
    *((0x2CEA2, 0x2CEAD), (0x323B0, 0x33479)),
)
NUM_AT_ONCE = 100  # conversations encoded at a time where offsets are kept: these take many times the ids' memory
PROOF_EXTRA_TOKENS = (8, 21)  # behind a short prompt: lengths at which a bulk encoder must cut as `render` does

# Texts to token ids of all, (tokens,) int32, and the number of tokens of each, (texts,) int64.
Encode = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]


class Segments(NamedTuple):
    """A layout, cut where the loss begins and ends.

    `template` takes the contents, and after them the thoughts, and has a seam between two segments. `reply_of` is for
    each segment the index of the message that it is the reply of, or -1; `row_sizes` how many segments each row has.
    """

    template: str
    reply_of: list[int]
    is_reply: list[bool]
    row_sizes: list[int]


def cut_into_segments(parts: Sequence[Part], literal: Callable[[str], str], seam: str) -> Segments:
    """Cut a layout where the loss begins and ends; `literal` renames the control tokens of its texts."""
    pieces = []
    reply_of = []
    for part in parts:
        reply = part.message if part.in_loss else -1
        piece = f"{{{part.message}}}" if part.text is None else escape_braces(literal(part.text))
        if reply_of and reply_of[-1] == reply:
            pieces.append(piece)
        elif piece:
            pieces += [seam, piece] if reply_of else [piece]
            reply_of.append(reply)
    return Segments("".join(pieces), reply_of, [reply >= 0 for reply in reply_of], [len(reply_of)])


def segments_of_shape(
    shape: Sequence[tuple[str, bool, bool]],
    turns_of: Callable[[list[dict], list[int]], Sequence["Turn"]],
    literal: Callable[[str], str],
    seam: str,
) -> Segments | None:
    """Lay out conversations of a shape by rendering placeholders; None where the template changes a text.

    A shape has (role, whether it has a thought, whether it is trained) of each message; `turns_of` renders the trained
    turns of messages, `literal` renames the control tokens of a rendered text.
    """
    mark = f"q{secrets.token_hex(6)}y"
    contents = [f"{mark}{number}a \"\\'<&>\n汉 {number}b" for number in range(2 * len(shape))]
    messages = [
        {"role": role, "content": content, "train": train} | ({"reasoning_content": thought} if has_thought else {})
        for (role, has_thought, train), content, thought in zip(shape, contents, contents[len(shape) :], strict=False)
    ]
    trained = [index for index, (role, _, train) in enumerate(shape) if role == "assistant" and train]
    try:
        turns = turns_of(messages, trained)
    except RecordError:
        return None
    pieces = []
    reply_of = []
    row_sizes = []
    row = ""
    for turn in turns:
        if not row or not turn.prompt.startswith(row):
            row = ""
            row_sizes.append(0)
        pieces += [turn.prompt[len(row) :], turn.reply]
        reply_of += [-1, turn.message]
        row_sizes[-1] += 2
        row = turn.prompt + turn.reply
    template = escape_braces(literal(seam.join(pieces)))
    for number, content in enumerate(contents):
        template = template.replace(content, f"{{{number}}}")
    if not turns or mark in template:
        return None
    return Segments(template, reply_of, [reply >= 0 for reply in reply_of], row_sizes)


def escape_braces(text: str) -> str:
    return re.sub(r"[{}]", r"\g<0>\g<0>", text)


def render_segments(
    batch: Sequence[Sequence[dict]],
    layouts: Sequence[Segments | None],
    seam: str,
    encode: Encode,
    *,
    max_length: int | None,
    backend: Tokenizer,
    render_others: Callable[[Sequence[int]], Sequence[Sequence[Rendered]]],
) -> Rows:
    """Render conversations without Python per token, and without any per row that simply fits.

    `layouts` has the segments of each. `render_others` renders the conversations of some indices: those without
    segments, or whose cut can't be found by decoding.
    """
    texts = []
    is_reply = []
    in_loss = []
    row_sizes = []
    num_rows = []
    for messages, segments in zip(batch, layouts, strict=True):
        num_rows.append(len(segments.row_sizes) if segments else 0)
        if segments is None:
            continue
        has_further_fields = max(map(len, messages)) > 2  # than role and content
        contents = [message["content"].strip() for message in messages]
        if has_further_fields:
            contents += [message.get("reasoning_content", "") for message in messages]
        texts += segments.template.format(*contents).split(seam)
        is_reply += segments.is_reply
        in_loss += segments.is_reply
        row_sizes += segments.row_sizes
        if has_further_fields and not all([message.get("train", True) for message in messages]):
            trained = [reply >= 0 and messages[reply].get("train", True) for reply in segments.reply_of]
            in_loss[-len(trained) :] = trained
    assert len(texts) == len(is_reply)
    ids, lengths = encode(texts)
    first = np.cumsum([0, *row_sizes])  # each row's first segment
    ends = np.concatenate([[0], np.cumsum(lengths)])
    row_lengths = np.diff(ends[first])
    num_trained = np.diff(np.concatenate([[0], np.cumsum(lengths * np.asarray(in_loss, dtype=bool))])[first])
    labels = np.where(np.repeat(np.asarray(in_loss, dtype=bool), lengths), ids, np.int32(IGNORE_INDEX))
    rows = Rows(ids, labels, row_lengths, ["whole"] * len(batch), num_rows, [""] * len(batch))
    owners = np.repeat(np.arange(len(batch)), num_rows)
    replaced = {index: () for index, count in enumerate(num_rows) if not count}
    for row in np.flatnonzero((num_trained == 0) | (row_lengths > (max_length or np.inf))).tolist():
        segment = slice(first[row], first[row + 1])
        token = slice(ends[first[row]], ends[first[row + 1]])
        owner = int(owners[row])
        if num_rows[owner] > 1 or any(HALF_CHARACTER in text for text in texts[segment]):
            replaced[owner] = ()
        else:
            replies = np.asarray(is_reply[segment])
            segment_ends = np.cumsum(lengths[segment])
            around = text_around_by_decoding(backend, ids[token], int(segment_ends[~replies][0]))
            replaced[owner] = [shorten_row(ids[token], labels[token], segment_ends[replies], max_length, around)]
    others = [index for index, rendered in replaced.items() if not rendered]
    for begin in range(0, len(others), NUM_AT_ONCE):
        some = others[begin : begin + NUM_AT_ONCE]
        replaced |= dict(zip(some, render_others(some), strict=True))
    return _replace_rows(rows, dict(sorted(replaced.items()))) if replaced else rows


def _replace_rows(rows: Rows, replaced: dict[int, Sequence[Rendered]]) -> Rows:
    """Replace the rows of some conversations; between them the arrays are sliced, not walked through."""
    first_row = np.concatenate([[0], np.cumsum(rows.num_rows)])
    starts = np.concatenate([[0], np.cumsum(rows.lengths)])
    id_pieces = []
    label_pieces = []
    length_pieces = []
    place = 0
    for index, rendered in [*replaced.items(), (len(rows.num_rows), ())]:
        row_span = slice(first_row[place], first_row[index])
        token_span = slice(starts[first_row[place]], starts[first_row[index]])
        kept = [row for row in rendered if len(row.input_ids)]
        id_pieces += [rows.input_ids[token_span], *(row.input_ids for row in kept)]
        label_pieces += [rows.labels[token_span], *(row.labels for row in kept)]
        length_pieces += [rows.lengths[row_span], np.array([len(row.input_ids) for row in kept], dtype=np.int64)]
        if rendered:
            rows.outcomes[index] = rendered[0].outcome
            rows.num_rows[index] = len(kept)
            rows.whys[index] = rendered[0].why
        place = index + 1
    ids, labels, lengths = (np.concatenate(pieces) for pieces in (id_pieces, label_pieces, length_pieces))
    return rows._replace(input_ids=ids, labels=labels, lengths=lengths)


def are_same_rows(found: Rows, expected: Rows) -> bool:
    return all(np.array_equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


# --- Encoders ------------------------------------------------------------------------------------------------------


def bulk_encoders(backend: Tokenizer, seam: str, num_bytes: int) -> Iterator[tuple[str, Encode]]:
    """Yield (name, encoder) for the encoders that may be right for a tokenizer, the fastest first.

    `seam` is the name of a token of the backend that no text contains.
    """
    for name in ENCODERS if num_bytes >= MIN_FAST_BYTES else ["tokenizers"]:
        if encode := make_encoder(name, backend, seam):
            yield name, encode


def make_encoder(name: str, backend: Tokenizer, seam: str) -> Encode | None:
    """Return the encoder of that name, a key of ENCODERS; None where it isn't installed or can't be right."""
    if not _splits_words(backend):
        return None
    try:
        return ENCODERS[name](backend, seam)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # not installed, or a form that it doesn't read; a panic of a Rust library is no Exception
        return None


def _splits_words(backend: Tokenizer) -> bool:
    """Say whether a pattern splits text into words, so that a segment's beginning doesn't depend on what is before."""
    parts = [part.__getstate__().decode() for part in (backend.normalizer, backend.pre_tokenizer) if part]
    return (
        type(backend.model).__name__ == "BPE"
        and '"ByteLevel"' in "".join(parts)
        and not re.search(r'"(Metaspace|Prepend)"|"add_prefix_space":true', "".join(parts))
    )


def _make_gigatoken(backend: Tokenizer, seam: str) -> Encode | None:
    """Encode all texts as one, with the token `seam` between them."""
    from gigatoken.gigatoken_rs import load_hf_json

    spec = backend.to_str()
    fast = load_hf_json(spec)
    num_encoded = 0
    seam_id = backend.token_to_id(seam)
    if backend.id_to_token(seam_id) != seam:
        return None  # two tokens have one id
    is_new = np.zeros(0x110000, dtype=bool)
    for first, last in _NEW_TO_TOKENIZERS:
        is_new[first : last + 1] = True
    encode_slowly = _make_tokenizers(backend, seam)

    def encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        nonlocal fast, num_encoded
        beyond_ascii = "".join([text for text in texts if not text.isascii()])
        if is_new[np.frombuffer(beyond_ascii.encode("utf-32-le"), dtype=np.uint32)].any():
            return encode_slowly(texts)
        joined = seam.join(texts)
        num_encoded += len(joined)
        if num_encoded > MAX_REMEMBERED_CHARACTERS:
            fast = None  # before the new one is made, or the memory of both is held
            fast = load_hf_json(spec)
            num_encoded = len(joined)
        ids = fast.encode(joined).view(np.int32)
        seams = np.flatnonzero(ids == seam_id)
        return np.delete(ids, seams), (np.diff(seams, prepend=-1, append=len(ids)) - 1)[: len(texts)]

    return encode


def _make_fastokens(backend: Tokenizer, _seam: str) -> Encode:
    # A second thread has a cache of its own, which at 200,000 records takes 65 MiB (dev/LOG.md).
    os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")
    from fastokens import Tokenizer as FastTokenizer

    fast = FastTokenizer.from_json_str(backend.to_str())

    def encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, starts = fast.encode_batch_flat(texts)
        return np.frombuffer(ids, dtype=np.uint32).astype(np.int32), np.diff(np.frombuffer(starts, dtype=np.int64))

    return encode


def _make_tokenizers(backend: Tokenizer, _seam: str) -> Encode:
    def encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        lists = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        lengths = np.fromiter(map(len, lists), dtype=np.int64, count=len(lists))
        flat = itertools.chain.from_iterable(lists)
        return np.fromiter(flat, dtype=np.int32, count=int(lengths.sum())), lengths

    return encode


# The fastest first. gigatoken has the patterns of many models by name, fastokens any pattern (bloom's).
ENCODERS = {"gigatoken": _make_gigatoken, "fastokens": _make_fastokens, "tokenizers": _make_tokenizers}
