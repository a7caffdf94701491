"""The page's event handlers: a question, its replies as they grow, a retry, an edit, an undo, a like."""

import asyncio
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gradio as gr

from sft.chat.batching import BusyError
from sft.opendata.fields import RecordError
from sft.web import models
from sft.web.models import LocalModel, RemoteError, RemoteModel
from sft.web.panes import PendingReply, to_page
from sft.web.security import Limits
from sft.web.text import is_chinese, label, refusal
from sft.web.turns import (
    EXAMPLES,
    MAX_CONVERSATION,
    SLIDERS,
    Turn,
    check_conversation,
    clean_text,
    drop_unanswered,
    has_text,
    num_characters,
    num_questions,
    to_messages,
    to_record,
    to_sampling,
    to_tools,
    without_oldest,
)

MAX_UNREAD = 50  # updates that a client doesn't fetch before its reply is cancelled
MAX_FEEDBACK_BYTES = 64 << 20  # of the file of likes
SECONDS_TO_LISTEN = 5.0  # until a client must fetch the reply that it requested


@dataclass
class Handlers:
    """The event handlers and their state. Most return (message box, turns, each pane)."""

    models: dict[str, LocalModel | RemoteModel]
    num_panes: int = 1
    limits: Limits = field(default_factory=Limits)
    feedback: Path | None = None
    page: gr.Blocks | None = None
    running: dict[str, list[PendingReply]] = field(default_factory=dict)  # by session
    lock: threading.Lock = field(default_factory=threading.Lock)

    # --- the conversation ---

    def ask(self, request: gr.Request, message: str, turns: list[Turn], system: str, tools: str = "") -> tuple:
        """Append the user's message to the conversation; one that is refused stays in the box."""
        message = str(message or "")
        if not message.strip():
            raise refusal(request, "empty")
        if all(model.is_full for model in self.models.values()):
            raise refusal(request, "busy")
        turns = [*drop_unanswered(turns), Turn(clean_text(message))]
        check_conversation(turns, system, request)
        to_tools(tools, request)
        self.cancel_session(request)
        box = gr.Textbox("", interactive=False, submit_btn=False, stop_btn=True)
        return (box, turns, *self._pages(request, turns, growing=True))

    def ask_example(
        self, request: gr.Request, turns: list[Turn], system: str, event: gr.EventData, tools: str = ""
    ) -> tuple:
        return self.ask(request, EXAMPLES[_index(request, event, len(EXAMPLES))], turns, system, tools)

    def ask_again(self, request: gr.Request, turns: list[Turn], system: str, tools: str = "") -> tuple:
        """Drop the last replies and ask for new ones."""
        return self.ask(request, turns[-1].question if turns else "", turns[:-1], system, tools)

    def ask_edited(
        self, request: gr.Request, turns: list[Turn], system: str, event: gr.EventData, tools: str = ""
    ) -> tuple:
        """Replace a question, and drop the turns after it."""
        index = _index(request, event, len(turns))
        return self.ask(request, str(event._data.get("value") or ""), turns[:index], system, tools)

    def undo(self, request: gr.Request, turns: list[Turn]) -> tuple:
        """Remove the last turn and put its question into the box."""
        self.cancel_session(request)
        box = _ready_box(*[turn.question for turn in turns[-1:]])
        return (box, turns[:-1], *self._pages(request, turns[:-1]))

    def end_reply(self, request: gr.Request, turns: list[Turn]) -> tuple:
        """Prepare the next message; a question that was stopped before its answer goes back into the box."""
        kept = drop_unanswered(turns)
        left = [turn.question for turn in turns[len(kept) :]]
        return (_ready_box(*left[:1]), kept, *self._pages(request, kept))

    def clear(self, request: gr.Request) -> tuple:
        self.cancel_session(request)
        return (_ready_box(), [], *self._pages(request, []))

    def show(self, request: gr.Request, turns: list[Turn]) -> list[list[str]] | list[str]:
        """Return each pane in the language of the browser, as the page is opened."""
        pages = self._pages(request, turns)
        return pages if self.num_panes > 1 else pages[0]

    def _pages(self, request: gr.Request | None, turns: Sequence[Turn], *, growing: bool = False) -> list[list[str]]:
        chinese = is_chinese(request)
        return [to_page(turns, pane, chinese=chinese, growing=growing) for pane in range(self.num_panes)]

    # --- likes ---

    def like_in(self, pane: int):
        """Return the handler of a pane's likes: it appends the conversation to a file, that reply alone trained."""

        def like(request: gr.Request, turns: list[Turn], system: str, event: gr.EventData, tools: str = "") -> None:
            self._admit(request)
            index = _index(request, event, len(turns))
            messages = to_messages(turns[: index + 1], pane, check_conversation(turns[: index + 1], system, request))
            liked = event._data.get("liked")
            if liked is True and messages[-1].get("train") is False:
                raise refusal(request, "not_ended")
            if messages[-1]["role"] == "assistant" and liked in (True, False):
                self.write_feedback(messages, bool(liked), to_tools(tools, request))
                gr.Info(label("noted", is_chinese(request)))

        return like

    def write_feedback(self, messages: list[dict], liked: bool, tools: list[dict] | None = None) -> None:
        last = len(messages) - 1
        for index, message in enumerate(messages):
            if message["role"] == "assistant" and not (liked and index == last):
                message["train"] = False
        path = self.feedback if liked else self.feedback.with_suffix(f".disliked{self.feedback.suffix}")
        with self.lock:
            if path.exists() and path.stat().st_size > MAX_FEEDBACK_BYTES:
                return
            with open(path, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(to_record(messages, tools), ensure_ascii=False) + "\n")

    # --- replies ---

    async def reply(self, request: gr.Request, turns: list[Turn], system: str, *values) -> AsyncIterator[tuple]:
        """Yield (turns, each pane, each pane's status) as the replies grow; closing it cancels them."""
        if not turns or turns[-1].replies:
            return
        system = check_conversation(turns, system, request)
        session = request.session_hash
        self._admit(request)
        self.hang_up(session)
        if not await self._listens(session):
            return
        replies = self.running[session] = []
        try:
            sampling = to_sampling(values, request)
            thinking, tools, *names = values[len(SLIDERS) :] or (None, "")
            settings = {"sampling": sampling, "thinking": thinking, "tools": to_tools(tools, request)}
            for pane in range(self.num_panes):
                model = self.models[names[pane]] if names else next(iter(self.models.values()))
                replies.append(await self._start(request, model, to_messages(turns, pane, system), **settings))
            async for update in self._follow(request, turns, replies):
                yield update
        except (gr.Error, asyncio.CancelledError):
            raise
        except BusyError:
            raise refusal(request, "busy") from None
        except RemoteError as error:
            raise refusal(request, "server_error", error=error) from None
        except Exception as error:  # of the model: the log has its cause, the page a line without it
            logging.exception("a reply failed")
            raise refusal(request, "error") from error
        finally:
            for reply in replies:
                reply.started.cancel()
            if self.running.get(session) is replies:
                del self.running[session]

    async def _start(self, request, model, messages: list[dict], *, sampling, thinking, tools) -> PendingReply:
        """Start a pane's reply; the oldest turns are left out where they don't fit."""
        count = num_questions(messages)
        thinking = thinking if isinstance(thinking, bool) and model.has_thinking_switch else None
        tools = tools if model.can_use_tools else None
        while num_characters(messages) > MAX_CONVERSATION and num_questions(messages) > 1:
            messages = without_oldest(messages)
        try:
            messages = await asyncio.to_thread(model.fit, messages, sampling, tools=tools)
        except RecordError as error:  # of the chat template
            raise refusal(request, "template", error=str(error).splitlines()[0][:200]) from None
        except ValueError:
            raise refusal(request, "no_room") from None
        started = model.start(messages, sampling, thinking=thinking, tools=tools)
        return PendingReply(started, count - num_questions(messages))

    async def _follow(self, request, turns: list[Turn], replies: list[PendingReply]) -> AsyncIterator[tuple]:
        last = None
        chinese = is_chinese(request)
        while True:
            await asyncio.sleep(models.SECONDS_BETWEEN_UPDATES)
            if self.running.get(request.session_hash) is not replies:  # another question has replaced this one
                return
            done = all([reply.started.done for reply in replies])
            messages = tuple(reply.update() for reply in replies)
            shown = [reply.shown() for reply in replies]
            if done or shown != last:
                started = done or any(map(has_text, messages))
                grown = [*turns[:-1], Turn(turns[-1].question, messages if started else ())]
                statuses = [reply.status(chinese) for reply in replies]
                yield (grown, *self._pages(request, grown, growing=not done), *statuses)
            if done or not self.has_reader(request.session_hash):
                return
            last = shown

    # --- the clients ---

    async def _listens(self, session: str) -> bool:
        """Wait for the client to fetch its reply: before that no token is computed."""
        end = time.monotonic() + SECONDS_TO_LISTEN
        while not self.has_reader(session) and time.monotonic() < end:
            await asyncio.sleep(0.02)
        return self.has_reader(session)

    def has_reader(self, session: str) -> bool:
        """Say whether a client fetches the updates: gradio 6.31 continues for one that never listens."""
        unread = self.page._queue.pending_messages_per_session.get(session)
        return self.limits.listening[session] > 0 and unread is not None and unread.qsize() < MAX_UNREAD

    def hang_up(self, session: str) -> None:
        """Cancel the replies of a session."""
        for reply in self.running.get(session, ()):
            reply.started.cancel()

    def stop(self, request: gr.Request) -> None:
        self.hang_up(request.session_hash)

    def cancel_session(self, request: gr.Request | None) -> None:
        """Cancel the replies of a conversation that continues without them: they add nothing more to it."""
        if request:
            self.hang_up(request.session_hash)
            self.running.pop(request.session_hash, None)

    def _admit(self, request: gr.Request) -> None:
        if not self.limits.admit(request.session_hash, request.client.host if request.client else ""):
            raise refusal(request, "too_often")


def _index(request: gr.Request | None, event: gr.EventData, count: int) -> int:
    """Return the index that an event of the page names; raise gr.Error where there is no such thing."""
    index = event._data.get("index") if isinstance(event._data, dict) else None
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
        raise refusal(request, "no_message")
    return index


def _ready_box(*message: str) -> gr.Textbox:
    return gr.Textbox(*message, interactive=True, submit_btn=True, stop_btn=False)
