"""A chat page for one or more checkpoints, or for a model behind an OpenAI-compatible server.

    python web_demo.py                                          the newest finished run, on http://127.0.0.1:7860
    python web_demo.py --model_path runs/a/model --model_path runs/b/model --compare      two side by side
    python web_demo.py --base_url http://127.0.0.1:8000/v1      vLLM, Ollama, llama.cpp ...; the key: OPENAI_API_KEY
    WEB_DEMO_AUTH=name:password python web_demo.py --host 0.0.0.0

The conversation lives on the server; what the page shows is made from it and never read back. What a client may do is
limited here: routes, hosts, bytes, characters, turns, requests; and a reply needs a reader.
"""

import argparse
import asyncio
import base64
import hashlib
import json
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import gradio as gr
from starlette.middleware import Middleware

from sft.chat.batching import MAX_ACTIVE, MAX_CACHED_TOKENS, BusyError
from sft.chat.reply import Chat, Reply, load_chat, newest_run
from sft.chat.sampling import Sampling
from sft.format.table import FORMAT_NAMES
from sft.model.load import check_model_path
from sft.web.remote import JOINER, Remote, RemoteError, RemoteReply
from sft.web.security import REQUESTS_PER_MINUTE, Gate, Limits, knows, read_logins

RUNS = Path(__file__).resolve().parent / "runs"
MAX_MESSAGE = 8_000  # characters of a message or of the system prompt
MAX_CONVERSATION = 32_000  # characters that a model is given, counted before anything is tokenised
MAX_CONTEXT = MAX_CACHED_TOKENS // 4  # tokens that a model reads: no conversation may fill the batch that all share
MAX_TURNS = 50
MAX_WAITING = 20  # replies in the queue
MAX_JOBS = 512  # of gradio's at a time: those whose reply is made or waits, and what the others' buttons do meanwhile
MAX_SESSIONS = 2_000  # whose conversations are kept; the one that was used least recently goes
MAX_UNREAD = 50  # updates that nobody fetches before a reply is given up
MAX_FEEDBACK = 64 << 20  # bytes of the file of likes
SECONDS_BETWEEN_UPDATES = 0.05
SECONDS_TO_LISTEN = 5.0  # until a client that asked must fetch its reply

SLIDERS = {  # lowest, highest, step; the defaults are Sampling's
    "temperature": (0.0, 2.0, 0.05),
    "top_p": (0.05, 1.0, 0.05),
    "top_k": (1, 200, 1),
    "repetition_penalty": (1.0, 2.0, 0.01),
    "max_new_tokens": (1, 4096, 1),
}
EXAMPLES = ("写一首关于春天的诗", "一年有几个季节？", "What is the capital of France?", "What is 8+9?")
TEXTS = {
    "title": ("Chat with your model", "和你的模型对话"),
    "message": ("Type a message", "输入消息"),
    "settings": ("Settings", "设置"),
    "system": ("System prompt", "系统提示"),
    "temperature": ("Temperature (0: always the likeliest token)", "温度（0：总取最可能的词元）"),
    "top_p": ("Top p", "Top p（核采样）"),
    "top_k": ("Top k", "Top k（候选词元数）"),
    "repetition_penalty": ("Repetition penalty", "重复惩罚"),
    "max_new_tokens": ("Longest reply, in tokens", "回复最多的词元数"),
    "export": ("Export the conversation", "导出对话"),
    # gradio 6.31's own Chinese texts lack these two.
    "chatbot.copy_message": ("Copy message", "复制消息"),
    "chatbot.copied_message": ("Copied message", "已复制"),
}
ENGLISH, CHINESE = ({key: pair[place] for key, pair in TEXTS.items()} for place in (0, 1))
I18N = gr.I18n(**{"en": ENGLISH, "zh": CHINESE, "zh-CN": CHINESE, "zh-TW": CHINESE})
LATEX = (("$$", "$$", True), (r"\[", r"\]", True), (r"\(", r"\)", False))  # left, right, on a line of its own
# A reply can't draw over the page; an error is a note in the corner, not a sheet over the conversation.
CSS = """
.message { contain: paint }
[data-testid=status-tracker]:has(> .error) { display: none !important }
footer { display: none !important }
.status { min-height: 1.5em; font-size: var(--text-sm); color: var(--body-text-color-subdued) }
.panes { flex-grow: 1 } .panes > .column { min-width: min(100%, 320px) !important }
"""


def say(request: gr.Request | None, chinese: str, english: str) -> str:
    """Choose by the browser's language; both where it names none."""
    languages = request.headers.get("accept-language", "") if request else ""
    return f"{chinese} · {english}" if not languages else chinese if languages.startswith("zh") else english


def refusal(request: gr.Request | None, chinese: str, english: str) -> gr.Error:
    return gr.Error(say(request, chinese, english), title=say(request, "提示", "Note"), print_exception=False)


# --- the conversation: turns on the server, and what the page shows of them ---------------------------------------

# A `<` that could open a tag or a comment, a `!` that could open an image; and a fenced code block as marked, the
# page's Markdown reader, sees it.
OPENER = r"<(?=[A-Za-z/!?])|!(?=\[)"
FENCE = r"^(`{3,}(?=[^`\n]*$)|~{3,})[^\n]*(?:\Z|\n(?:(?:[\s\S]*?\n)?? {0,3}\1[~`]* *$|[\s\S]*))"
THINKING = re.compile(r"\s*<think>(.*?)(</think>|\Z)", re.S)


@dataclass(frozen=True)
class Turn:
    """A question and its replies, one for each pane; "" where one has none."""

    question: str
    replies: tuple[str, ...] = ()


def answered(turns: Sequence[Turn]) -> list[Turn]:
    """Leave out a trailing question that got no answer."""
    return list(turns[:-1] if turns and not any(turns[-1].replies) else turns)


def to_messages(turns: Sequence[Turn], pane: int, system: str = "") -> list[dict]:
    """Return what the model of a pane has said and been asked; a question that it didn't answer counts only as last."""
    messages = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        reply = turn.replies[pane] if pane < len(turn.replies) else ""
        if reply or turn is turns[-1]:
            messages.append({"role": "user", "content": turn.question})
        if reply:
            messages.append({"role": "assistant", "content": reply})
    return messages


def to_page(turns: Sequence[Turn], pane: int = 0) -> list[dict]:
    """Return the messages as a pane shows them: thinking folded away, tags as plain text."""
    return [message for _turn, message in _shown(turns, pane)]


def _shown(turns: Sequence[Turn], pane: int) -> list[tuple[int, dict]]:
    page = []
    for index, turn in enumerate(turns):
        page.append((index, {"role": "user", "content": _plain(turn.question)}))
        text = turn.replies[pane] if pane < len(turn.replies) else None
        thinking = THINKING.match(text or "")
        if thinking:
            title = {"title": "思考 · Thinking", "status": "done" if thinking[2] else "pending"}
            page.append((index, {"role": "assistant", "content": _plain(thinking[1].strip()), "metadata": title}))
            text = text[thinking.end() :].strip()
        if text or (text is not None and not thinking):
            page.append((index, {"role": "assistant", "content": _plain(text)}))
    return page


def turn_at(turns: Sequence[Turn], pane: int, index: int | Sequence[int]) -> int:
    """Return which turn the message stands in that the page calls `index`."""
    place = index if isinstance(index, int) else index[0]
    shown = _shown(turns, pane)
    if not 0 <= place < len(shown):
        raise refusal(None, "没有这条消息", "there is no such message")
    return shown[place][0]


def _plain(text: str) -> list[dict]:
    """Keep Markdown, but not HTML and images: a word joiner parts what opens them, except in code, which people copy.

    The page looks for LaTeX before it looks for code, so beside LaTeX code is no exception. What slips through meets
    gradio's sanitizer and the content security policy.
    """
    text = re.sub(r"\r\n?", "\n", text)
    pattern = OPENER if any(left in text for left, _right, _display in LATEX) else f"{FENCE}|{OPENER}"
    text = re.sub(pattern, lambda found: found[0] + JOINER * (len(found[0]) == 1), text, flags=re.M)
    return [{"type": "text", "text": text}]


def check(turns: Sequence[Turn], system: str, request: gr.Request | None = None) -> str:
    """Return the system prompt; raise gr.Error when something is too long. Nothing is tokenised here."""
    system = _clean(system or "")
    if max(len(turns[-1].question), len(system)) > MAX_MESSAGE:
        chinese, english = f"超过 {MAX_MESSAGE:,} 个字符，请缩短", f"longer than {MAX_MESSAGE:,} characters; shorten it"
        raise refusal(request, chinese, english)
    if len(turns) > MAX_TURNS:
        raise refusal(
            request, f"超过 {MAX_TURNS} 轮，请清空后重新开始", f"more than {MAX_TURNS} turns; clear it and start anew"
        )
    return system


def to_sampling(values: Sequence, request: gr.Request | None = None) -> Sampling:
    """Return the sliders' settings; raise gr.Error for what no slider can give, such as NaN, which gradio lets in."""
    settings = dict(zip(SLIDERS, values, strict=False))
    for name, (low, high, _step) in SLIDERS.items():
        value = settings.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise refusal(request, f"{name} 应在 {low} 到 {high} 之间", f"{name} must be between {low} and {high}")
    return Sampling(**settings)


def _clean(text: str) -> str:
    """Replace lone surrogates, which no tokenizer takes."""
    return text.strip().encode("utf-8", "replace").decode()


def without_oldest(messages: list[dict]) -> list[dict]:
    """Leave out the oldest question and what was said to it."""
    system = messages[:1] if messages[0]["role"] == "system" else []
    rest = messages[len(system) + 1 :]
    while rest and rest[0]["role"] != "user":
        rest = rest[1:]
    return system + rest


def num_questions(messages: Sequence[dict]) -> int:
    return sum(message["role"] == "user" for message in messages)


def export_links(turns: Sequence[Turn]) -> str:
    """Return links that hold the conversation themselves, as JSON (canonical, one for each pane) and as Markdown."""
    turns = answered(turns)
    if not turns:
        return ""
    panes = range(max(len(turn.replies) for turn in turns))
    records = [to_record(to_messages(turns, pane)) for pane in panes]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    names = {"system": "System", "user": "User · 用户", "assistant": "Assistant · 助手"}
    text = "\n---\n\n".join(
        "".join(f"## {names[message['role']]}\n\n{message['content']}\n\n" for message in record["messages"])
        for record in records
    )
    files = (("json", "application/json", "\n".join(lines) + "\n"), ("md", "text/markdown", text))
    links = ((name, f"data:{kind};base64,{base64.b64encode(body.encode()).decode()}") for name, kind, body in files)
    return " · ".join(f'<a download="conversation.{name}" href="{link}">{name}</a>' for name, link in links)


def to_record(messages: list[dict]) -> dict:
    """Return the canonical record that sft.opendata and train.py read."""
    name = hashlib.sha256(json.dumps(messages, ensure_ascii=False).encode()).hexdigest()[:16]
    return {"id": f"web_demo-{name}", "source": "web_demo", "messages": messages}


# --- the models behind the page ---------------------------------------------------------------------------------------


class LocalReply:
    """A reply that sft.chat.batching is making."""

    def __init__(self, chat: Chat, request):
        self.chat, self.request, self.cancel = chat, request, request.cancel

    @property
    def done(self) -> bool:
        return self.request.done

    @property
    def error(self) -> BaseException | None:
        return self.request.error

    @property
    def place(self) -> int:
        return self.chat.decoder.queue_position(self.request)

    def reply(self) -> Reply:
        done = self.request.done
        return self.chat.to_reply(list(self.request.ids), growing=not done)


class Local:
    """A model in this process."""

    def __init__(self, chat: Chat, *, max_active: int = MAX_ACTIVE, max_waiting: int = MAX_WAITING):
        self.chat = chat
        chat.decoder.max_active, chat.decoder.max_waiting = max_active, max_waiting

    @property
    def num_waiting(self) -> int:
        return len(self.chat.decoder.waiting)

    def fit(self, messages: list[dict], sampling: Sampling) -> list[dict]:
        """Drop the oldest turns until the prompt and some of the reply fit; ValueError where the last alone doesn't."""
        window = min(self.chat.context_window or MAX_CONTEXT, MAX_CONTEXT)
        room = min(sampling.max_new_tokens, window // 4)
        while num_questions(messages) > 1:
            if len(self.chat.renderer.prompt(messages)) + room <= window:
                break
            messages = without_oldest(messages)
        if len(self.chat.prompt_ids(messages)) >= window:
            raise ValueError(f"the last message alone has more than {window:,} tokens")
        return messages

    def start(self, messages: list[dict], sampling: Sampling) -> LocalReply:
        request = self.chat.decoder.add(self.chat.prompt_ids(messages), sampling)
        self.chat.decoder.start()
        return LocalReply(self.chat, request)


class Served:
    """A model on a server, which knows its own context window."""

    def __init__(self, remote: Remote, *, max_active: int = MAX_ACTIVE, max_waiting: int = MAX_WAITING):
        self.remote, self.start = remote, remote.start
        remote.max_active, remote.max_waiting = max_active, max_waiting

    @property
    def num_waiting(self) -> int:
        return len(self.remote.waiting)

    def fit(self, messages: list[dict], _sampling: Sampling) -> list[dict]:
        return messages


@dataclass
class Answer:
    """A pane's reply in the making, and the line under it; `note` (Chinese, English) tells of turns left out."""

    started: LocalReply | RemoteReply
    note: tuple[str, ...] = ()
    place: int = -1
    begun: float | None = None
    seconds: float = 0.0

    def __post_init__(self):
        self.said, self.finished = Reply("", False, 0), False

    def look(self) -> Reply:
        """Return what was said up to now; raises what went wrong."""
        self.place = self.started.place
        if self.started.error:
            raise self.started.error
        if self.place < 0 and not self.finished:
            self.begun = self.begun or time.monotonic() - SECONDS_BETWEEN_UPDATES
            self.seconds, self.finished = time.monotonic() - self.begun, self.started.done
        self.said = self.started.reply()
        return self.said

    def status(self, request: gr.Request | None) -> str:
        """Say how many wait before it, or how many tokens came and how fast."""
        if self.place >= 0:
            return say(request, f"排队中，前面还有 {self.place} 个", f"waiting, {self.place} before you")
        if not self.said.num_tokens:
            return say(request, "正在读取…", "reading …") if not self.started.done else ""
        speed = self.said.num_tokens / max(self.seconds, 1e-3)
        parts = [(f"{self.said.num_tokens} 个词元", f"{self.said.num_tokens} tokens")]
        parts.append((f"每秒 {speed:.1f} 个", f"{speed:.1f} tokens/s"))
        if self.started.done and not self.said.ended:
            parts.append(("到了长度上限", "the length limit was reached"))
        parts += [self.note] if self.note else []
        return say(request, *(" · ".join(texts) for texts in zip(*parts, strict=True)))


# --- what the page's buttons do -----------------------------------------------------------------------------------


@dataclass
class Handlers:
    """What the buttons do with a conversation. Most return (message box, conversation, what each pane shows)."""

    models: dict[str, Local | Served]
    num_panes: int = 1
    limits: Limits = field(default_factory=Limits)
    feedback: Path | None = None
    page: gr.Blocks | None = None
    running: dict[str, list["Answer"]] = field(default_factory=dict)  # by session
    lock: threading.Lock = field(default_factory=threading.Lock)

    def say(self, request: gr.Request, message: str, turns: list[Turn], system: str) -> tuple:
        """Put the user's message into the conversation; one that is refused stays in the box."""
        message = str(message or "")
        if not message.strip():
            raise refusal(request, "请先输入消息", "type a message first")
        if all(model.num_waiting >= MAX_WAITING for model in self.models.values()):
            raise self._busy(request)
        turns = [*answered(turns), Turn(_clean(message))]
        check(turns, system, request)
        self.give_up(request)
        return (gr.Textbox("", interactive=False, submit_btn=False, stop_btn=True), turns, *self._pages(turns))

    def say_example(self, request: gr.Request, turns: list[Turn], system: str, choice: gr.SelectData) -> tuple:
        return self.say(request, EXAMPLES[choice.index], turns, system)

    def say_again(self, request: gr.Request, turns: list[Turn], system: str) -> tuple:
        """Drop the last replies and ask for others."""
        return self.say(request, turns[-1].question if turns else "", turns[:-1], system)

    def editor(self, pane: int):
        """Return what a pane does with a question that was changed: it drops what followed."""

        def say_edited(request: gr.Request, turns: list[Turn], system: str, change: gr.EditData) -> tuple:
            place = turn_at(turns, pane, change.index)
            return self.say(request, str(change.value).replace(JOINER, ""), turns[:place], system)

        return say_edited

    def undo(self, request: gr.Request, turns: list[Turn]) -> tuple:
        """Take the last exchange back, its question into the box."""
        self.give_up(request)
        return (_ready(*[turn.question for turn in turns[-1:]]), turns[:-1], *self._pages(turns[:-1]))

    def settle(self, turns: list[Turn]) -> tuple:
        """Make ready for the next message; a question that was stopped before its answer goes back into the box."""
        kept = answered(turns)
        left = [turn.question for turn in turns[len(kept) :]]
        return (_ready(*left[:1]), kept, *self._pages(kept))

    def clear(self, request: gr.Request) -> tuple:
        self.give_up(request)
        return (_ready(), [], *self._pages([]))

    def _pages(self, turns: Sequence[Turn]) -> list[list[dict]]:
        return [to_page(turns, pane) for pane in range(self.num_panes)]

    def liker(self, pane: int):
        """Return what a pane does with a like: it writes the conversation down, that reply alone to be learned."""

        def like(request: gr.Request, turns: list[Turn], system: str, choice: gr.LikeData) -> None:
            self._admit(request)
            place = turn_at(turns, pane, choice.index)
            messages = to_messages(turns[: place + 1], pane, check(turns[: place + 1], system, request))
            if messages[-1]["role"] == "assistant" and choice.liked in (True, False):
                self._write(messages, bool(choice.liked))
                gr.Info(say(request, "已记录，谢谢", "noted, thank you"))

        return like

    def _write(self, messages: list[dict], liked: bool) -> None:
        last = len(messages) - 1
        for index, message in enumerate(messages):
            if message["role"] == "assistant" and not (liked and index == last):
                message["train"] = False
        path = self.feedback if liked else self.feedback.with_suffix(f".disliked{self.feedback.suffix}")
        with self.lock:
            if path.exists() and path.stat().st_size > MAX_FEEDBACK:
                return
            with open(path, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(to_record(messages), ensure_ascii=False) + "\n")

    async def reply(self, request: gr.Request, turns: list[Turn], system: str, *values) -> AsyncIterator[tuple]:
        """Yield (conversation, each pane, each pane's status) as the replies grow; closing it ends the models' work."""
        if not turns or turns[-1].replies:
            return
        system, session = check(turns, system, request), request.session_hash
        self._admit(request)
        self.hang_up(session)
        if not await self._listens(session):
            return
        answers = self.running[session] = []
        try:
            sampling, names = to_sampling(values, request), values[len(SLIDERS) :]
            for pane in range(self.num_panes):
                messages = to_messages(turns, pane, system)
                answers.append(await self._start(request, messages, pane, names, sampling))
            async for update in self._follow(request, turns, answers):
                yield update
        except (gr.Error, asyncio.CancelledError):
            raise
        except BusyError:
            raise self._busy(request) from None
        except RemoteError as error:
            raise refusal(request, "模型服务器出错，请稍后再试", str(error)) from None
        except Exception as error:  # whatever the model raises: the log says why, the page only that
            logging.exception("a reply failed")
            raise refusal(request, "出错了，请重试", "something went wrong; try again") from error
        finally:
            for answer in answers:
                answer.started.cancel()
            if self.running.get(session) is answers:
                del self.running[session]

    async def _start(
        self, request, messages: list[dict], pane: int, names: Sequence[str], sampling: Sampling
    ) -> "Answer":
        """Start a pane's reply, the oldest turns left out where they don't fit."""
        model = self.models[names[pane]] if names else next(iter(self.models.values()))
        count = num_questions(messages)
        while sum(len(message["content"]) for message in messages) > MAX_CONVERSATION and num_questions(messages) > 1:
            messages = without_oldest(messages)
        try:
            messages = await asyncio.to_thread(model.fit, messages, sampling)
        except ValueError:
            raise refusal(
                request,
                "消息超出模型的上下文窗口，请缩短",
                "the message exceeds the model's context window; shorten it",
            ) from None
        left = count - num_questions(messages)
        note = f"上下文已满，最早的 {left} 轮已略去", f"context full, oldest {left} turns left out"
        return Answer(model.start(messages, sampling), note if left else ())

    async def _follow(self, request, turns: list[Turn], answers: list["Answer"]) -> AsyncIterator[tuple]:
        last = None
        while True:
            await asyncio.sleep(SECONDS_BETWEEN_UPDATES)
            if self.running.get(request.session_hash) is not answers:  # the conversation went on without them
                return
            done = all([answer.started.done for answer in answers])
            said = [answer.look() for answer in answers]
            statuses = [answer.status(request) for answer in answers]
            update = [(reply.text, answer.place) for reply, answer in zip(said, answers, strict=True)]
            if done or update != last:
                replies = tuple(reply.text for reply in said)
                shown = [*turns[:-1], Turn(turns[-1].question, replies if done or any(replies) else ())]
                yield (shown, *self._pages(shown), *statuses)
            if done or not self.has_reader(request.session_hash):
                return
            last = update

    async def _listens(self, session: str) -> bool:
        """Wait for the client to fetch its reply: before that nothing is done for it."""
        end = time.monotonic() + SECONDS_TO_LISTEN
        while not self.has_reader(session) and time.monotonic() < end:
            await asyncio.sleep(0.02)
        return self.has_reader(session)

    def has_reader(self, session: str) -> bool:
        """Say whether somebody fetches the updates: gradio 6.31 works on for a client that never listens."""
        unread = self.page._queue.pending_messages_per_session.get(session)
        return self.limits.listening[session] > 0 and unread is not None and unread.qsize() < MAX_UNREAD

    def hang_up(self, session: str) -> None:
        """End what a session's models are doing."""
        for answer in self.running.get(session, ()):
            answer.started.cancel()

    def _admit(self, request: gr.Request) -> None:
        if not self.limits.admit(request.session_hash, request.client.host if request.client else ""):
            raise refusal(request, "请求太频繁，请稍后再试", "too many requests; wait a minute")

    def stop(self, request: gr.Request) -> None:
        self.hang_up(request.session_hash)

    def give_up(self, request: gr.Request | None) -> None:
        """End what the models are doing for a conversation that goes on otherwise: they add nothing more to it."""
        if request:
            self.hang_up(request.session_hash)
            self.running.pop(request.session_hash, None)

    def _busy(self, request) -> gr.Error:
        return refusal(request, "现在人太多，请稍后再试", "too many are waiting; try again later")


def _ready(*message: str) -> gr.Textbox:
    return gr.Textbox(*message, interactive=True, submit_btn=True, stop_btn=False)


# --- the page -----------------------------------------------------------------------------------------------------


def build_page(handlers: Handlers) -> gr.Blocks:
    """Build the page; `serve` opens it."""
    with gr.Blocks(title="SFT chat", analytics_enabled=False, fill_height=True) as page:
        turns = gr.State([])
        gr.Markdown(f"## {I18N('title')}")
        with gr.Row(elem_classes="panes"):
            panes = [_pane(handlers, index) for index in range(handlers.num_panes)]
        box = gr.Textbox(show_label=False, placeholder=I18N("message"), autofocus=True, submit_btn=True, max_lines=8)
        with gr.Accordion(I18N("settings"), open=False):
            system = gr.Textbox("", label=I18N("system"), lines=2)
            with gr.Row():
                sliders = [_slider(name, *bounds) for name, bounds in SLIDERS.items()]
            with gr.Row():
                export = gr.Button(I18N("export"), size="sm", scale=0, min_width=200)
                links = gr.Markdown(sanitize_html=False)
        _connect(handlers, turns, panes, box, system, sliders)
        export.click(export_links, turns, links, api_visibility="private", show_progress="hidden")
    handlers.page = page
    page.queue(max_size=MAX_JOBS, default_concurrency_limit=None, api_open=False)
    page._queue.ANALYTICS_MAX_EVENTS = 1  # gradio 6.31 makes a table of the last 10,000 after each
    return page


def _pane(handlers: Handlers, index: int) -> tuple:
    """Return (picker or None, chatbot, status line)."""
    with gr.Column():
        names, picker = list(handlers.models), None
        if len(names) > 1:
            picker = gr.Dropdown(names, value=names[index], show_label=False, container=False, filterable=False)
        shown = gr.Chatbot(
            show_label=False,
            height=f"calc(100dvh - {300 if picker else 250}px)",
            min_height=280,
            editable="user",
            buttons=["copy"],
            latex_delimiters=[dict(zip(("left", "right", "display"), row, strict=True)) for row in LATEX],
            sanitize_html=True,
            feedback_options=("Like", "Dislike") if handlers.feedback else None,
            examples=[{"text": example} for example in EXAMPLES],
        )
        return picker, shown, gr.Markdown(elem_classes="status")


def _slider(name: str, low: float, high: float, step: float) -> gr.Slider:
    default, precision = getattr(Sampling(), name), 0 if isinstance(step, int) else None
    return gr.Slider(low, high, default, step=step, precision=precision, label=I18N(name), min_width=300)


def _connect(handlers: Handlers, turns, panes: list[tuple], box, system, sliders) -> None:
    """Wire the buttons: each way to ask puts the question down at once, then waits for its reply."""
    pickers, shown, status = ([part for part in parts if part] for parts in zip(*panes, strict=True))
    # Only what goes through the queue can tell the page why it was refused.
    now = {"show_progress": "hidden", "outputs": [box, turns, *shown]}
    hidden = {**now, "api_visibility": "private"}
    asked = [box.submit(handlers.say, [box, turns, system], api_name="say", **now)]
    for pane, chatbot in enumerate(shown):
        asked += [
            chatbot.retry(handlers.say_again, [turns, system], **hidden),
            chatbot.edit(handlers.editor(pane), [turns, system], **hidden),
            chatbot.example_select(handlers.say_example, [turns, system], **hidden),
        ]
    replies = [
        event.success(
            handlers.reply,
            [turns, system, *sliders, *pickers],
            [turns, *shown, *status],
            api_name="reply",
            api_visibility="private" if index else "public",
            show_progress="hidden",
        )
        for index, event in enumerate(asked)
    ]
    for event in replies:
        event.then(handlers.settle, turns, **hidden)
    for event in (*asked, *replies):
        event.failure(handlers.settle, turns, **hidden)
    box.stop(handlers.stop, None, None, cancels=replies, api_visibility="private", show_progress="hidden")
    for pane, chatbot in enumerate(shown):
        chatbot.undo(handlers.undo, turns, cancels=replies, **hidden)
        chatbot.clear(handlers.clear, cancels=replies, **hidden)
        if handlers.feedback:
            chatbot.like(handlers.liker(pane), [turns, system], None, api_visibility="private", show_progress="hidden")


# --- the server ---------------------------------------------------------------------------------------------------


def serve(page: gr.Blocks, handlers: Handlers, *, host: str, port: int, auth: dict | None = None, block=True) -> None:
    """Open the page on host:port; with `block` False it returns at once, and `page.close()` ends it.

    Without a login another site could reach the page under a name of its own that leads here (DNS rebinding), so
    only this machine's names are answered; an address in numbers can't be such a name.
    """
    gate = Middleware(
        Gate, limits=handlers.limits, hang_up=handlers.hang_up, hosts=None if auth else ("localhost", host)
    )
    page.launch(
        server_name=host,
        server_port=port,
        auth=(lambda name, password: knows(auth, name, password)) if auth else None,
        share=False,
        quiet=True,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        state_session_capacity=MAX_SESSIONS,
        max_threads=MAX_JOBS,
        max_file_size=1,
        blocked_paths=["/"],
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        i18n=I18N,
        css=CSS,
        app_kwargs={"middleware": [gate]},
        prevent_thread_lock=True,
    )
    print(f"http://{host}:{port}", flush=True)
    if block:
        page.block_thread()


# --- the command --------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    key = os.environ.pop("OPENAI_API_KEY", None) if options.base_url else None
    limits = {"max_active": options.max_active, "max_waiting": options.max_waiting}
    try:
        auth = read_logins(options.host, options.auth_file)
        if problem := _problem(options):
            raise ValueError(problem)
        if options.base_url:
            remote = Remote(options.base_url, model=options.model, key=key)
            models = {remote.model: Served(remote, **limits)}
        else:
            models = _load(options, limits)
    except (ValueError, OSError) as error:
        _fail(str(error).splitlines()[0])
    feedback = Path(options.feedback) if options.feedback else None
    handlers = Handlers(models, 2 if options.compare else 1, Limits(options.requests_per_minute), feedback)
    serve(build_page(handlers), handlers, host=options.host, port=options.port, auth=auth)


def _load(options: argparse.Namespace, limits: dict) -> dict[str, Local]:
    models = {}
    for path in options.model_path:
        print(f"loading {path}", flush=True)
        chat = load_chat(
            path,
            chat_format=options.chat_format,
            device=options.device,
            dtype=options.dtype,
            load_in_4bit=options.load_in_4bit,
            trust_remote_code=options.trust_remote_code,
        )
        name = _label(path)
        models[name if name not in models else f"{name} ({len(models) + 1})"] = Local(chat, **limits)
    return models


def _label(path: str) -> str:
    """Name a model on the page: its run, never its path."""
    parts = Path(path).resolve().parts if Path(path).exists() else Path(path).parts
    return parts[-2] if parts[-1] == "model" and len(parts) > 2 else parts[-1]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="web_demo.py", description="A chat page for a checkpoint.")
    parser.error = _fail
    add = parser.add_argument
    add("--model_path", action="append", help="a model folder or a hub model; repeat it (default: the newest run)")
    add("--compare", action="store_true", help="two models side by side")
    add("--base_url", help="an OpenAI-compatible server in place of a model here; its key: OPENAI_API_KEY")
    add("--model", help="the name of the server's model (default: the first that it lists)")
    add("--host", default="127.0.0.1", help="any but this machine's own needs a login")
    add("--port", type=int, default=7860)
    add("--auth_file", help="a file of lines name:password (or one login in WEB_DEMO_AUTH)")
    add("--feedback", help="write liked replies to this file (JSON Lines), disliked ones beside it; off by default")
    add("--chat_format", default="auto", choices=FORMAT_NAMES)
    add("--device", help="cuda, cuda:1, cpu ... (default: a GPU if there is one)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="(default: bfloat16 on a GPU, float32 on a CPU)")
    add("--load_in_4bit", action="store_true", help="needs CUDA and bitsandbytes")
    add("--max_active", type=int, default=MAX_ACTIVE, help="replies in the making at a time")
    add("--max_waiting", type=int, default=MAX_WAITING, help="replies that may wait for that")
    add(
        "--requests_per_minute", type=int, default=REQUESTS_PER_MINUTE, help="of a tab; of an address ten times as many"
    )
    add("--trust_remote_code", action="store_true", help="run code that comes with the model")
    return parser


def _problem(options: argparse.Namespace) -> str | None:
    """Say what is wrong before seconds are spent on a model; fills in the newest run."""
    if options.base_url and (options.model_path or options.compare or options.load_in_4bit):
        return "--base_url goes without --model_path, --compare and --load_in_4bit"
    if options.model and not options.base_url:
        return "--model goes with --base_url; a model here is named by --model_path"
    if not (options.base_url or options.model_path):
        newest = newest_run(RUNS)
        if not newest:
            return f"no finished run in {RUNS}; make one with `sh base_run.sh`, or name a model with --model_path"
        options.model_path = [newest]
    if options.compare and len(options.model_path) < 2:
        return "--compare needs two --model_path"
    if min(options.max_active, options.max_waiting, options.requests_per_minute) < 1:
        return "--max_active, --max_waiting and --requests_per_minute must be at least 1"
    if options.feedback and not os.access(Path(options.feedback).absolute().parent, os.W_OK):
        return f"--feedback {options.feedback}: its folder is not there, or can't be written to"
    names = ("config.json", "adapter_config.json")
    problems = [problem for path in options.model_path or () if (problem := check_model_path(path, names=names))]
    return problems[0] if problems else _port_problem(options)


def _fail(problem: str) -> NoReturn:
    print(f"web_demo.py: {problem}", file=sys.stderr)
    sys.exit(2)


def _port_problem(options: argparse.Namespace) -> str | None:
    """Say why the port can't be opened, before seconds are spent on the model."""
    if not 0 < options.port < 65536:
        return f"--port {options.port}: use 1 to 65535"
    try:
        with socket.create_server((options.host, options.port)):
            return None
    except OSError as error:
        return f"--host {options.host} --port {options.port}: {error.strerror or error}; choose another"


if __name__ == "__main__":
    main()
