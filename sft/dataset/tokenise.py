"""One task of the preparation: a piece of a data file -> token ids, labels and the account of its conversations.

It runs in the process that prepares, or in worker processes, which have a renderer of their own.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sft.dataset.ledger import (
    KEPT_OUTCOMES,
    LOST_OUTCOMES,
    WITH_THOUGHT,
    WITHOUT_THOUGHT,
    count_outcome,
    new_ledger,
)
from sft.format.bulk import ENCODERS
from sft.format.render import Renderer
from sft.format.tokens import IGNORE_INDEX, BareTokenizer, Rows, join_rows
from sft.opendata.conversation import Conversation, check_messages, read_record
from sft.opendata.fields import FieldCounts, NotChosen, RecordError
from sft.opendata.files import Work
from sft.opendata.records import WrongCut
from sft.workers import TaskError, describe_error

BATCH_SIZE = 1000  # conversations per call of the tokenizer: enough to keep its threads busy, little memory
MAX_COMPARED_CHARACTERS = 1 << 20
# Of each example: its source, a number of the ledger's "sources", and a number of KEPT_OUTCOMES, how it was kept.
ORIGIN = [("source", "<i4"), ("way", "i1")]


class Part(NamedTuple):
    """The tokens of a piece of a file: `input_ids` (tokens,) int32, `in_loss` (tokens,) bool, `lengths` (examples,).

    `origins` number the names in `source_names`; `ledger` and `counts` are the account of this piece alone. `different`
    names a conversation for which the bulk encoder is wrong.
    """

    input_ids: np.ndarray
    in_loss: np.ndarray
    lengths: np.ndarray
    origins: np.ndarray
    source_names: list[str]
    ledger: dict
    counts: FieldCounts
    different: str | None


class _Numbers(dict):
    """Numbers names in the order in which they are first asked for."""

    def __missing__(self, name: str) -> int:
        self[name] = len(self)
        return self[name]


def make_tokeniser(load_renderer: Callable[[], Renderer], **settings) -> Callable[[Work], Part | None]:
    """Return the function that does a task, with the renderer of this process; `settings` are those of `tokenise`."""
    return partial(tokenise, renderer=load_renderer(), **settings)


def pack_renderer(renderer: Renderer) -> Callable[[], Renderer]:
    """Return a function that can be pickled and makes the same renderer in a process without transformers."""
    options = {"template_kwargs": renderer.template_kwargs, "today": renderer.today}
    return partial(
        _unpack_renderer,
        BareTokenizer(renderer.tokenizer),
        renderer.name,
        encoder=renderer.encoder,
        fingerprint=renderer.fingerprint(),
        **options,
        train_turns=renderer.train_turns,
    )


def _unpack_renderer(
    tokenizer: BareTokenizer, chat_format: str, *, encoder: str, fingerprint: str, **options
) -> Renderer:
    renderer = Renderer(tokenizer, chat_format, **options)
    assert renderer.fingerprint() == fingerprint, "the worker's tokenizer differs from that of its parent"
    renderer.use_encoder(encoder)
    return renderer


def tokenise(task: Work, *, renderer: Renderer, max_length: int, reading: dict) -> Part | None:
    """Read, render and label the conversations of a piece; None for a range that was wrongly cut."""
    ledger = new_ledger([task.name], max_length)
    counts = FieldCounts()
    numbers = _Numbers()
    try:
        readable = list(_read(task, ledger, counts, renderer, reading))
    except WrongCut:
        return None
    parts = []
    origins = [np.zeros(0, ORIGIN)]
    different = None
    for batch in batches(readable, BATCH_SIZE):
        try:
            rows = _render(task, batch, renderer, max_length)
        except EncoderFault as error:
            different = str(error)
            break
        different = different or _compare_one(task, batch, rows, renderer, max_length)
        parts.append(rows)
        origins.append(_count(task, batch, rows, ledger, numbers))
    ids, labels, lengths = (
        np.concatenate([np.zeros(0, kind), *(rows[place] for rows in parts)])
        for place, kind in enumerate((np.int32, np.int32, np.int64))
    )
    return Part(ids, labels != IGNORE_INDEX, lengths, np.concatenate(origins), list(numbers), ledger, counts, different)


def reading_options(renderer: Renderer, reading: dict) -> dict:
    """Return how records are read: thoughts are dropped where the chat format has no place for them."""
    keeps = reading["reasoning"] != "drop" and renderer.keeps_reasoning
    return {"reasoning": "keep" if keeps else "drop", "preference": reading["preference"]}


def _read(
    task: Work, ledger: dict, counts: FieldCounts, renderer: Renderer, reading: dict
) -> Iterator[tuple[int, Conversation]]:
    """Yield (line, conversation) of each readable conversation, and count the others."""
    source = Path(task.name).name
    options = {"source": source, "counts": counts, **reading_options(renderer, reading)}
    ignores_definitions = renderer.ignores_definitions
    has_thinking_switch = renderer.thinking_switch is not None
    for raw in task.split():
        ledger["files"][task.name]["in"] += 1
        try:
            conversation = read_record(raw.parse(), line=raw.place, **options)
            check_messages(conversation["messages"])
        except RecordError as error:
            lost = "not_chosen" if isinstance(error, NotChosen) else "rejected"
            if lost == "rejected":
                ledger["rejected"][error.reason] += 1
            count_outcome(ledger, task.name, raw.line, source, lost, why=str(error))
            continue
        if ignores_definitions and conversation.get("tools"):
            counts.notes["tools_not_written_by_the_template"] += 1
        if has_thinking_switch:
            _count_thoughts(conversation["messages"], counts.notes)
        yield raw.line, conversation


def _count_thoughts(messages: Sequence[dict], notes: Counter) -> None:
    for message in messages:
        if message["role"] == "assistant" and message.get("train", True):
            notes[WITH_THOUGHT if message.get("reasoning_content") else WITHOUT_THOUGHT] += 1


class EncoderFault(Exception):
    """The bulk encoder fails on conversations from this file and line on, and the plain one does not."""


def _render(task: Work, batch: Sequence, renderer: Renderer, max_length: int) -> Rows:
    """Render a batch. Raises TaskError, which names the conversation, where the tokenizer fails, or EncoderFault."""
    try:
        return renderer.render_rows([conversation for _line, conversation in batch], max_length=max_length)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # a panic of a Rust library is no Exception
        for line, conversation in batch:
            try:
                if renderer.encoder in ENCODERS:
                    _render_plainly(conversation, renderer, max_length)
                else:
                    renderer.render_rows([conversation], max_length=max_length)
            except RecordError:
                continue
            except BaseException as error:
                advice = "take the record out, or report the fault to the tokenizer's makers"
                message = f"the tokenizer fails on this record ({describe_error(error)}); {advice}"
                raise TaskError(f"{task.name} line {line}: {message}") from error
        if renderer.encoder in ENCODERS:
            raise EncoderFault(f"{task.name} line {batch[0][0]}") from None
        raise


def _render_plainly(conversation: Conversation, renderer: Renderer, max_length: int) -> Rows:
    """Render a conversation without the bulk encoder."""
    tools = conversation.get("tools")
    return join_rows([renderer.render_conversation(conversation["messages"], tools=tools, max_length=max_length)])


def _compare_one(task: Work, batch: Sequence, rows: Rows, renderer: Renderer, max_length: int) -> str | None:
    """Render the last kept conversation of a batch again, token by token; return its file and line if it differs.

    It is the last row of `rows`; a very long one is not compared, as offsets take gigabytes there.
    """
    kept = [item for item, outcome in zip(batch, rows.outcomes, strict=True) if outcome not in LOST_OUTCOMES]
    if not kept or sum(len(message["content"]) for message in kept[-1][1]["messages"]) > MAX_COMPARED_CHARACTERS:
        return None
    line, conversation = kept[-1]
    expected = _render_plainly(conversation, renderer, max_length)
    size = len(expected.input_ids)
    same = [np.array_equal(rows[place][len(rows[place]) - size :], expected[place]) for place in (0, 1)]
    return None if all(same) else f"{task.name} line {line}"


def _count(task: Work, batch: Sequence, rows: Rows, ledger: dict, numbers: _Numbers) -> np.ndarray:
    """Count what became of each conversation of a batch; return the origins of its rows, (rows,)."""
    of_each = []
    for (line, conversation), outcome, num_rows, why in zip(batch, *rows[3:], strict=True):
        count_outcome(ledger, task.name, line, conversation["source"], outcome, num_rows, why)
        if outcome in KEPT_OUTCOMES:
            of_each.append((numbers[conversation["source"]], KEPT_OUTCOMES.index(outcome)))
    return np.repeat(np.array(of_each, ORIGIN), [count for count in rows.num_rows if count])


def batches(items: Iterable, size: int) -> Iterable[list]:
    """Cut a stream into lists of at most `size` (itertools.batched needs Python 3.12)."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
