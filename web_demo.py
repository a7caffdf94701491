"""A chat page for a checkpoint, over sft.chat.

    python web_demo.py                                          the newest finished run, on http://127.0.0.1:7860
    python web_demo.py --model_path runs/my_run/model
    WEB_DEMO_AUTH=name:password python web_demo.py --host 0.0.0.0

The conversation lives on the server, as the messages that sft.chat renders; what the page shows is made from it and
never read back. What a client may do is limited here: routes, bytes, characters, turns, and a reply needs a reader.
"""

import argparse
import ipaddress
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import gradio as gr
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from sft.chat import Chat, Sampling, load_chat, newest_run
from sft.chat_format import FORMAT_NAMES
from sft.model import check_model_path

RUNS = Path(__file__).resolve().parent / "runs"
MAX_MESSAGE = 8_000  # characters of a message or of the system prompt
MAX_CONVERSATION = 32_000  # characters, counted before anything is tokenised
MAX_TURNS = 50
MAX_WAITING = 20  # replies in the queue
MAX_UNREAD = 50  # updates that nobody fetches before a reply is given up
MAX_BODY = 256 * 1024  # bytes of a request
SECONDS_BETWEEN_UPDATES = 0.02

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
    # gradio 6.31's own Chinese texts lack these two.
    "chatbot.copy_message": ("Copy message", "复制消息"),
    "chatbot.copied_message": ("Copied message", "已复制"),
}
ENGLISH, CHINESE = ({key: pair[place] for key, pair in TEXTS.items()} for place in (0, 1))
I18N = gr.I18n(**{"en": ENGLISH, "zh": CHINESE, "zh-CN": CHINESE, "zh-TW": CHINESE})
LATEX = (("$$", "$$", True), (r"\[", r"\]", True), (r"\(", r"\)", False))  # left, right, on a line of its own
# A reply can't draw over the page; an error is a note in the corner, not a sheet over the conversation.
CSS = ".message { contain: paint } [data-testid=status-tracker]:has(> .error) { display: none !important }"

# --- the conversation: messages on the server, and what the page shows of them ------------------------------------

# A `<` that could open a tag or a comment, a `!` that could open an image; and a fenced code block as marked, the
# page's Markdown reader, sees it.
OPENER = r"<(?=[A-Za-z/!?])|!(?=\[)"
FENCE = r"^(`{3,}(?=[^`\n]*$)|~{3,})[^\n]*(?:\Z|\n(?:(?:[\s\S]*?\n)?? {0,3}\1[~`]* *$|[\s\S]*))"
THINKING = re.compile(r"\s*<think>(.*?)(</think>|\Z)", re.S)
JOINER = "\u2060"  # invisible


def answered(conversation: list[dict]) -> list[dict]:
    """Leave out a trailing question that got no answer."""
    end = len(conversation)
    while end and not (conversation[end - 1]["role"] == "assistant" and conversation[end - 1]["content"]):
        end -= 1
    return conversation[:end]


def to_page(conversation: list[dict]) -> list[dict]:
    """Return the messages as the page shows them: thinking folded away, tags as plain text."""
    page = []
    for message in conversation:
        role, text = message["role"], message["content"]
        thinking = THINKING.match(text) if role == "assistant" else None
        if thinking:
            title = {"title": "思考 · Thinking", "status": "done" if thinking[2] else "pending"}
            page.append({"role": role, "content": _plain(thinking[1].strip()), "metadata": title})
            text = text[thinking.end() :].strip()
        if text or not thinking:
            page.append({"role": role, "content": _plain(text)})
    return page


def _plain(text: str) -> list[dict]:
    """Keep Markdown, but not HTML and images: a word joiner parts what opens them, except in code, which people copy.

    The page looks for LaTeX before it looks for code, so beside LaTeX code is no exception. What slips through meets
    gradio's sanitizer and the content security policy.
    """
    text = re.sub(r"\r\n?", "\n", text)
    pattern = OPENER if any(left in text for left, _right, _display in LATEX) else f"{FENCE}|{OPENER}"
    text = re.sub(pattern, lambda found: found[0] + JOINER * (len(found[0]) == 1), text, flags=re.M)
    return [{"type": "text", "text": text}]


def check(chat: Chat, conversation: list[dict], system: str) -> list[dict]:
    """Return the messages to answer; raise gr.Error, in both languages, when they are too long."""
    messages = [{"role": "system", "content": _clean(system)}] if system and system.strip() else []
    messages += conversation
    lengths = [len(message["content"]) for message in messages]
    typed = [length for length, message in zip(lengths, messages, strict=True) if message["role"] != "assistant"]
    if max(typed) > MAX_MESSAGE:
        raise _refusal(f"超过 {MAX_MESSAGE:,} 个字符，请缩短", f"longer than {MAX_MESSAGE:,} characters; shorten it")
    if len(typed) > MAX_TURNS or sum(lengths) > MAX_CONVERSATION:
        raise _refusal("对话太长，请清空后重新开始", "the conversation is too long; clear it and start anew")
    try:
        chat.prompt_ids(messages)
    except ValueError:
        raise _refusal(
            f"对话超出模型的上下文窗口（{chat.context_window} 个词元），请缩短或清空",
            f"the conversation exceeds the model's context window ({chat.context_window} tokens); shorten or clear it",
        ) from None
    return messages


def _refusal(chinese: str, english: str) -> gr.Error:
    return gr.Error(f"{chinese} · {english}", title="提示 · Note", print_exception=False)


def _clean(text: str) -> str:
    """Replace lone surrogates, which no tokenizer takes."""
    return text.strip().encode("utf-8", "replace").decode()


# --- what the page's buttons do -----------------------------------------------------------------------------------


@dataclass
class Handlers:
    """What the buttons do with a conversation. Most return (message box, what the page shows, conversation)."""

    chat: Chat
    page: gr.Blocks

    def say(self, message: str, conversation: list[dict], system: str) -> tuple:
        """Put the user's message into the conversation; one that is refused stays in the box."""
        if not message.strip():
            raise _refusal("请先输入消息", "type a message first")
        if len(self.page._queue) >= MAX_WAITING:
            raise _refusal("排队的人太多，请稍后再试", "too many are waiting; try again later")
        conversation = [*answered(conversation), {"role": "user", "content": _clean(message)}]
        check(self.chat, conversation, system)
        return gr.Textbox("", interactive=False, submit_btn=False, stop_btn=True), to_page(conversation), conversation

    def say_example(self, conversation: list[dict], system: str, choice: gr.SelectData) -> tuple:
        return self.say(EXAMPLES[choice.index], conversation, system)

    def say_again(self, conversation: list[dict], system: str) -> tuple:
        """Drop the last reply and ask for another one."""
        last = _questions(conversation)[-1]
        return self.say(conversation[last]["content"], conversation[:last], system)

    def say_edited(self, conversation: list[dict], system: str, change: gr.EditData) -> tuple:
        """Replace a user's message and drop what followed it."""
        shown = to_page(conversation)[: change.index if isinstance(change.index, int) else change.index[0]]
        place = _questions(conversation)[len(_questions(shown))]
        return self.say(str(change.value).replace(JOINER, ""), conversation[:place], system)

    def reply(self, request: gr.Request, conversation: list[dict], system: str, *values: float) -> Iterator[tuple]:
        """Yield (what the page shows, conversation) as the reply grows; closing it ends the model's work."""
        if not conversation or conversation[-1]["role"] != "user":
            return
        messages = check(self.chat, conversation, system)
        sampling = Sampling(**dict(zip(SLIDERS, values, strict=True)))
        shown_at = 0.0
        try:
            with closing(self.chat.stream_reply(messages, sampling)) as stream:
                for said in stream:
                    if not self.has_reader(request.session_hash):
                        return
                    if time.monotonic() - shown_at >= SECONDS_BETWEEN_UPDATES:
                        yield _with_reply(conversation, said.text)
                        shown_at = time.monotonic()
        except Exception as error:  # whatever the model raises: the log says why, the page only that
            logging.exception("a reply failed")
            raise _refusal("出错了，请重试", "something went wrong; try again") from error
        yield _with_reply(conversation, said.text)
        if not said.ended:
            gr.Info("回复到了长度上限 · the reply reached the length limit")

    def has_reader(self, session: str) -> bool:
        """Say whether somebody fetches the updates: gradio 6.31 works on for a client that never listens."""
        unread = self.page._queue.pending_messages_per_session.get(session)
        return unread is not None and unread.qsize() < MAX_UNREAD


def undo(conversation: list[dict]) -> tuple:
    """Take the last exchange back, its question into the box."""
    last = _questions(conversation)[-1]
    return _ready(conversation[last]["content"]), to_page(conversation[:last]), conversation[:last]


def settle(conversation: list[dict]) -> tuple:
    """Make ready for the next message; a question that was stopped before its answer goes back into the box."""
    kept = answered(conversation)
    left = [message["content"] for message in conversation[len(kept) :]]
    return _ready(*left[:1]), to_page(kept), kept


def _ready(*message: str) -> gr.Textbox:
    return gr.Textbox(*message, interactive=True, submit_btn=True, stop_btn=False)


def _questions(messages: list[dict]) -> list[int]:
    return [index for index, message in enumerate(messages) if message["role"] == "user"]


def _with_reply(conversation: list[dict], text: str) -> tuple[list[dict], list[dict]]:
    conversation = [*conversation, {"role": "assistant", "content": text}]
    return to_page(conversation), conversation


# --- the page -----------------------------------------------------------------------------------------------------


def build_page(chat: Chat) -> gr.Blocks:
    """Build the page; `serve` opens it."""
    with gr.Blocks(title="SFT chat", analytics_enabled=False, fill_height=True) as page:
        conversation = gr.State([])
        gr.Markdown(f"## {I18N('title')}")
        shown = gr.Chatbot(
            show_label=False,
            scale=1,
            editable="user",
            buttons=["copy"],
            latex_delimiters=[dict(zip(("left", "right", "display"), row, strict=True)) for row in LATEX],
            sanitize_html=True,
            feedback_options=None,
            examples=[{"text": example} for example in EXAMPLES],
        )
        box = gr.Textbox(show_label=False, placeholder=I18N("message"), autofocus=True, submit_btn=True, max_lines=8)
        with gr.Accordion(I18N("settings"), open=False):
            system = gr.Textbox("", label=I18N("system"), lines=2)
            with gr.Row():
                sliders = [_slider(name, *bounds) for name, bounds in SLIDERS.items()]
        _connect(Handlers(chat, page), conversation, shown, box, system, sliders)
    return page.queue(max_size=2 * MAX_WAITING, default_concurrency_limit=1, api_open=False)


def _slider(name: str, low: float, high: float, step: float) -> gr.Slider:
    default, precision = getattr(Sampling(), name), 0 if isinstance(step, int) else None
    return gr.Slider(low, high, default, step=step, precision=precision, label=I18N(name), min_width=300)


def _connect(handlers: Handlers, conversation, shown, box, system, sliders) -> None:
    """Wire the buttons: each way to ask puts the question down at once, then waits in the queue for its reply."""
    # Only what goes through the queue can tell the page why it was refused.
    now = {"concurrency_limit": None, "show_progress": "hidden", "outputs": [box, shown, conversation]}
    hidden = {**now, "api_visibility": "private"}
    asked = [
        box.submit(handlers.say, [box, conversation, system], api_name="say", **now),
        shown.retry(handlers.say_again, [conversation, system], **hidden),
        shown.edit(handlers.say_edited, [conversation, system], **hidden),
        shown.example_select(handlers.say_example, [conversation, system], **hidden),
    ]
    replies = [
        event.success(
            handlers.reply,
            [conversation, system, *sliders],
            [shown, conversation],
            api_name="reply",
            api_visibility="private" if index else "public",
            concurrency_id="model",
            show_progress="minimal",
        )
        for index, event in enumerate(asked)
    ]
    for event in replies:
        event.then(settle, conversation, **hidden)
    for event in (*asked, *replies):
        event.failure(settle, conversation, **hidden)
    box.stop(None, cancels=replies)
    shown.undo(undo, conversation, cancels=replies, **hidden)
    shown.clear(lambda: (_ready(), [], []), cancels=replies, **hidden)


# --- the server ---------------------------------------------------------------------------------------------------

# The routes that the page uses; uploads, files, proxying, monitoring and the rest of gradio 6.31's are closed.
ROUTES = re.compile(
    r"/(|config/?|theme\.css|favicon\.ico|manifest\.json|robots\.txt|(assets|static|svelte)/.*|log(in|out)/?"
    r"|gradio_api/(info/?|run/.*|queue/(join|data|status)|cancel|reset/?|heartbeat/.*|startup-events|login_check/?|user/?"
    r"|app_id/?|token/?|theme\.css|call/.*))"
)
HEADERS = {
    # Nothing in a reply can load from or post to another host.
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline' data: blob:; form-action 'self'; frame-src 'none'; "
    "object-src 'none'; base-uri 'self'; frame-ancestors 'self'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Gate:
    """ASGI middleware: closes routes, limits the bytes of a request, adds the headers."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        async def send_with_headers(message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        answer = _closed(scope) if scope["type"] == "http" else None
        await (answer or self.app)(scope, receive, send_with_headers)


def _closed(scope) -> PlainTextResponse | None:
    if not ROUTES.fullmatch(scope["path"]):
        return PlainTextResponse("closed", 404)
    length = Headers(scope=scope).get("content-length", "")
    if scope["method"] == "POST" and not (length.isdigit() and int(length) <= MAX_BODY):
        return PlainTextResponse(f"at most {MAX_BODY} bytes, with a content-length", 413)
    return None


def serve(page: gr.Blocks, *, host: str, port: int, auth: tuple[str, str] | None = None, block: bool = True) -> None:
    """Open the page on host:port; with `block` False it returns at once, and `page.close()` ends it."""
    page.launch(
        server_name=host,
        server_port=port,
        auth=auth,
        share=False,
        quiet=True,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        state_session_capacity=500,
        max_file_size=1,
        blocked_paths=["/"],
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        i18n=I18N,
        css=CSS,
        app_kwargs={"middleware": [Middleware(Gate)]},
        prevent_thread_lock=True,
    )
    print(f"http://{host}:{port}", flush=True)
    if block:
        page.block_thread()


# --- the command --------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    auth = _auth(options.host)
    model_path = options.model_path or newest_run(RUNS)
    if not model_path:
        _fail(f"no finished run in {RUNS}; make one with `sh base_run.sh`, or name a model with --model_path")
    if problem := check_model_path(model_path, names=("config.json", "adapter_config.json")) or _port_problem(options):
        _fail(problem)
    print(f"loading {model_path}", flush=True)
    try:
        chat = load_chat(
            model_path,
            chat_format=options.chat_format,
            device=options.device,
            trust_remote_code=options.trust_remote_code,
        )
    except (ValueError, OSError) as error:
        _fail(str(error).splitlines()[0])
    serve(build_page(chat), host=options.host, port=options.port, auth=auth)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="web_demo.py", description="A chat page for a checkpoint.")
    parser.error = _fail
    parser.add_argument("--model_path", help="a model folder or a hub model (default: the newest run in runs/)")
    parser.add_argument("--host", default="127.0.0.1", help="any but this machine's own needs WEB_DEMO_AUTH")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--chat_format", default="auto", choices=FORMAT_NAMES)
    parser.add_argument("--device", help="cuda, cuda:1, cpu ... (default: a GPU if there is one)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    return parser


def _fail(problem: str) -> NoReturn:
    print(f"web_demo.py: {problem}", file=sys.stderr)
    sys.exit(2)


def _auth(host: str) -> tuple[str, str] | None:
    """Return the login from WEB_DEMO_AUTH; any address but the machine's own must have one."""
    name, _, password = os.environ.get("WEB_DEMO_AUTH", "").partition(":")
    if name and password:
        return name, password
    if os.environ.get("WEB_DEMO_AUTH"):
        _fail("WEB_DEMO_AUTH must be name:password")
    if not _is_own(host):
        _fail(f"--host {host} lets others in: set WEB_DEMO_AUTH=name:password in the environment, or use 127.0.0.1")
    return None


def _is_own(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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
