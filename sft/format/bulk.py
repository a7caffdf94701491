"""Conversations to rows in bulk: the text between the seams of the loss is encoded segment by segment, in one call.

    [prompt up to the reply, reply with its end token, prompt of the next reply, ...]    in the loss: no, yes, no, ...

Segments are encoded one by one, so words must not reach over them: tokenizers without a pre-tokenizer that splits, or
with one that puts a space in front of each segment, keep the slower way, which encodes whole conversations.
"""

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from sft.format.table import Part
from sft.format.tokens import IGNORE_INDEX, Rendered, Rows, shorten, text_around_by_decoding

MIN_FAST_BYTES = 2 << 20  # of data: for less, making the fastest encoder takes longer than it saves
PROOF_EXTRA_TOKENS = (8, 21)  # behind a short prompt: lengths at which a bulk encoder must cut as `render` does
HALF_CHARACTER = "\ufffd"  # decoded from the bytes of half a character

# Texts to token ids of all, and the number of tokens of each.
Encode = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]


class Segments(NamedTuple):
    """A layout, cut where the loss begins and ends.

    `template` takes the contents and has a seam between two segments; `reply_of` is for each segment the index of the
    message that it is the reply of, or -1.
    """

    template: str
    reply_of: list[int]
    is_reply: list[bool]


def cut_into_segments(parts: Sequence[Part], seam: str) -> Segments:
    """Cut a layout, whose control tokens are already renamed, where the loss begins and ends."""
    pieces, reply_of = [], []
    for part in parts:
        reply = part.message if part.in_loss else -1
        piece = f"{{{part.message}}}" if part.text is None else re.sub(r"[{}]", r"\g<0>\g<0>", part.text)
        if reply_of and reply_of[-1] == reply:
            pieces.append(piece)
        elif piece:
            pieces += [seam, piece] if reply_of else [piece]
            reply_of.append(reply)
    return Segments("".join(pieces), reply_of, [reply >= 0 for reply in reply_of])


def render_segments(
    batch: Sequence[Sequence[dict]],
    segments_of: Callable[[tuple[str, ...]], Segments],
    seam: str,
    encode: Encode,
    *,
    max_length: int | None,
    backend: Tokenizer,
    render_alone: Callable[[Sequence[dict]], Rendered],
) -> Rows:
    """Render conversations without Python per token, and without any per row that simply fits.

    `render_alone` renders a conversation whose cut can't be found by decoding.
    """
    texts, is_reply, in_loss, counts = [], [], [], []
    for messages in batch:
        segments = segments_of(tuple([message["role"] for message in messages]))
        text = segments.template.format(*[message["content"].strip() for message in messages])
        texts += text.split(seam)
        is_reply += segments.is_reply
        in_loss += segments.is_reply
        counts.append(len(segments.is_reply))
        if any([not message.get("train", True) for message in messages]):
            trained = [reply >= 0 and messages[reply].get("train", True) for reply in segments.reply_of]
            in_loss[-counts[-1] :] = trained
    assert len(texts) == len(is_reply)
    ids, lengths = encode(texts)
    first = np.cumsum([0, *counts])  # each conversation's first segment
    ends = np.concatenate([[0], np.cumsum(lengths)])
    row_lengths = np.diff(ends[first])
    num_trained = np.diff(np.concatenate([[0], np.cumsum(lengths * in_loss)])[first])
    labels = np.where(np.repeat(in_loss, lengths), ids, np.int32(IGNORE_INDEX))
    rows = Rows(ids, labels, row_lengths, ["whole"] * len(batch))
    replaced = {}
    for index in np.flatnonzero((num_trained == 0) | (row_lengths > (max_length or np.inf))).tolist():
        segment, token = slice(first[index], first[index + 1]), slice(ends[first[index]], ends[first[index + 1]])
        if any(HALF_CHARACTER in text for text in texts[segment]):
            replaced[index] = render_alone(batch[index])
        else:
            replies, segment_ends = np.asarray(is_reply[segment]), np.cumsum(lengths[segment])
            around = text_around_by_decoding(backend, ids[token], int(segment_ends[~replies][0]))
            replaced[index] = shorten(ids[token], labels[token], segment_ends[replies], max_length, around)
    return _replace_rows(rows, replaced) if replaced else rows


def _replace_rows(rows: Rows, replaced: dict[int, Rendered]) -> Rows:
    """Replace or remove some rows; between them the arrays are sliced, not walked through."""
    starts = np.concatenate([[0], np.cumsum(rows.lengths)])
    pieces, place = [], 0
    for index, row in replaced.items():
        pieces += [(rows.input_ids[starts[place] : starts[index]], rows.labels[starts[place] : starts[index]]), row[:2]]
        rows.lengths[index], rows.outcomes[index] = len(row.input_ids), row.outcome
        place = index + 1
    pieces.append((rows.input_ids[starts[place] :], rows.labels[starts[place] :]))
    ids, labels = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    return Rows(ids, labels, rows.lengths[rows.lengths > 0], rows.outcomes)


def are_same_rows(found: Rows, expected: Rows) -> bool:
    return all(np.array_equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def bulk_encoders(backend: Tokenizer, num_bytes: int) -> Iterable[tuple[str, Encode]]:
    """Yield (name, encoder) for the encoders that may be right for a tokenizer, the fastest first."""
    spec = backend.to_str()
    if not _splits_words(json.loads(spec)):
        return
    fast = None
    if num_bytes >= MIN_FAST_BYTES:
        with contextlib.suppress(ImportError, ValueError, RuntimeError, NotImplementedError):
            from fastokens import Tokenizer as FastTokenizer

            fast = FastTokenizer.from_json_str(spec)
    if fast is not None:

        def encode_fast(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
            ids, starts = fast.encode_batch_flat(texts)
            return np.frombuffer(ids, dtype=np.uint32).astype(np.int32), np.diff(np.frombuffer(starts, dtype=np.int64))

        yield "fastokens", encode_fast

    def encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        lists = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        lengths = np.fromiter(map(len, lists), dtype=np.int64, count=len(lists))
        flat = itertools.chain.from_iterable(lists)
        return np.fromiter(flat, dtype=np.int32, count=int(lengths.sum())), lengths

    yield "tokenizers", encode


def _splits_words(spec: dict) -> bool:
    """Say whether a pattern splits text into words, so that a segment's beginning doesn't depend on what is before."""
    names = json.dumps([spec["normalizer"], spec["pre_tokenizer"]])
    return (
        spec["model"]["type"] == "BPE"
        and '"ByteLevel"' in names
        and not re.search(r'"(Metaspace|Prepend)"|"add_prefix_space": true', names)
    )
