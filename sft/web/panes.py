"""A pane of the page: the HTML of its messages, with the buttons that `page.js` connects, and a reply in the making."""

import html
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import gradio as gr

from sft.web import markdown
from sft.web.models import SECONDS_BETWEEN_UPDATES, LocalReply, RemoteReply
from sft.web.text import label
from sft.web.turns import EXAMPLES, Turn, has_text, open_calls

FOLDER = Path(__file__).parent
ICONS = {  # paths of a 24 x 24 drawing
    "copy": "M9 9h11v11H9zM5 15H4V4h11v1",
    "edit": "M4 20l1-4L16 5l3 3L8 19zM14 7l3 3",
    "retry": "M20 11a8 8 0 1 0-2 6M20 5v6h-6",
    "undo": "M9 14L4 9l5-5M4 9h10a6 6 0 0 1 0 12h-3",
    "like": "M7 11v9H4v-9zM7 11l4-8c2 0 3 1 3 3l-1 4h6l-2 10H7",
    "dislike": "M7 13V4H4v9zM7 13l4 8c2 0 3-1 3-3l-1-4h6L17 4H7",
}


def to_page(turns: Sequence[Turn], pane: int = 0, *, chinese: bool | None = None, growing: bool = False) -> list[str]:
    """Return the HTML of each turn as a pane shows it; the examples where there is none."""
    if not turns:
        return [_examples(chinese)]
    last = len(turns) - 1
    return [
        _question(index, turn.question, open_calls(turns[:index], pane), chinese)
        + _reply(index, turn.reply(pane), chinese, growing=growing and index == last, is_last=index == last)
        for index, turn in enumerate(turns)
    ]


def _question(index: int, question: str, calls: Sequence[dict], chinese: bool | None) -> str:
    """Return a question, or the results of `calls` under their names."""
    buttons = _button("copy", chinese) + _button("edit", chinese, send="send", cancel="cancel")
    names = ", ".join(call["function"]["name"] for call in calls)
    title = f"<small>{html.escape(label('result', chinese))} · {html.escape(names)}</small>" if calls else ""
    body = f'{title}<div class="body" data-testid="user">{markdown.to_plain_html(question)}</div>'
    return _message("user", index, question, body, buttons, chinese)


def _reply(index: int, reply: dict, chinese: bool | None, *, growing: bool, is_last: bool) -> str:
    if not has_text(reply) and not growing:
        return ""
    content = reply.get("content") or ""
    parts = []
    if thought := (reply.get("reasoning_content") or "").strip():
        is_open = growing and not content and not reply.get("tool_calls")
        title = label("thinking" if is_open else "thought", chinese)
        parts.append(_fold("thought", title, markdown.to_plain_html(thought)))
    if content:
        parts.append(f'<div class="body" data-testid="bot">{markdown.to_html(content)}</div>')
    for call in reply.get("tool_calls") or ():
        function = call.get("function", call)
        title = f"{label('call', chinese)} · {function.get('name', '')}"
        parts.append(_fold("call", title, f"<pre><code>{html.escape(_call_text(function))}</code></pre>"))
    if growing:
        return _message("bot", index, None, "".join(parts), "", chinese)
    buttons = _button("copy", chinese) + _button("like", chinese) + _button("dislike", chinese)
    buttons += _button("retry", chinese) + _button("undo", chinese) if is_last else ""
    return _message("bot", index, content, "".join(parts), buttons, chinese)


def _call_text(function: dict) -> str:
    """Return the arguments of a call; those that the model wrote as text stay as they are."""
    arguments = function.get("arguments")
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, indent=2)


def _fold(kind: str, title: str, body: str) -> str:
    return f'<details class="{kind}"><summary>{html.escape(title)}</summary><div class="body">{body}</div></details>'


def _message(side: str, index: int, text: str | None, body: str, buttons: str, chinese: bool | None) -> str:
    """Return a message; `text` is copied by its button, None while it grows."""
    copied = f' data-text="{html.escape(text)}"' if text is not None else ""
    copy = html.escape(label("copy_code", chinese))
    done = html.escape(label("copied", chinese))
    marks = f'data-turn="{index}" data-copy-code="{copy}" data-copied="{done}"'
    return f'<div class="message {side}" {marks}{copied}>{body}<div class="buttons">{buttons}</div></div>'


def _button(action: str, chinese: bool | None, **texts: str) -> str:
    title = html.escape(label(action, chinese))
    data = "".join(f' data-{name}="{html.escape(label(key, chinese))}"' for name, key in texts.items())
    drawing = f'<svg viewBox="0 0 24 24" aria-hidden="true"><path d="{ICONS[action]}"/></svg>'
    return f'<button type="button" data-action="{action}" title="{title}" aria-label="{title}"{data}>{drawing}</button>'


def _examples(chinese: bool | None) -> str:
    buttons = "".join(
        f'<button type="button" class="example" data-action="example" data-index="{index}">{html.escape(text)}</button>'
        for index, text in enumerate(EXAMPLES)
    )
    return f'<div class="examples"><p>{html.escape(label("examples", chinese))}</p>{buttons}</div>'


def new_pane(*, has_feedback: bool, has_picker: bool) -> gr.HTML:
    """Return the component that shows a pane: it lays the HTML of the turns one after the other."""
    classes = ["conversation", *(["feedback"] if has_feedback else []), *(["picked"] if has_picker else [])]
    return gr.HTML(
        to_page([]),
        html_template="${value.join('')}",
        js_on_load=read_asset("page.js"),
        elem_classes=classes,
        apply_default_css=False,
        autoscroll=True,
        **_formula_assets(),
    )


@cache
def read_asset(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


@cache
def _formula_assets() -> dict[str, str]:
    """Return the addresses of the KaTeX that comes with gradio 6; without it formulas stay as they were written."""
    folder = Path(gr.__file__).parent / "templates" / "frontend" / "assets"
    script = sorted(folder.glob("auto-render-*.js"))
    style = sorted(folder.glob("katex-*.css"))
    found = script and style
    return {
        "katex_script": f"assets/{script[0].name}" if found else "",
        "katex_style": f"assets/{style[0].name}" if found else "",
    }


@dataclass
class PendingReply:
    """A pane's reply in the making, and the line below it."""

    started: LocalReply | RemoteReply
    num_left_out: int = 0
    message: dict = field(default_factory=dict)
    queue_position: int = -1
    ended: bool = False
    num_tokens: int = 0
    begun: float | None = None
    seconds: float = 0.0
    is_complete: bool = False

    def update(self) -> dict:
        """Read the reply up to now and return its message; raises the model's error.

        A reply that the model has not ended may be stopped or cut: as training data it would teach to stop there.
        """
        self.queue_position = self.started.queue_position
        if self.started.error:
            raise self.started.error
        if self.queue_position < 0 and not self.is_complete:
            self.begun = self.begun or time.monotonic() - SECONDS_BETWEEN_UPDATES
            self.seconds = time.monotonic() - self.begun
            self.is_complete = self.started.done
        self.message, self.ended, self.num_tokens = self.started.read()
        if has_text(self.message) and not self.ended:
            self.message["train"] = False
        return self.message

    def status(self, chinese: bool | None) -> str:
        """Return the line below the reply: the queue, or the number of tokens and their speed."""
        if self.queue_position >= 0:
            return label("queued", chinese, count=self.queue_position)
        if not self.num_tokens:
            return "" if self.started.done else label("reading", chinese)
        speed = self.num_tokens / max(self.seconds, 1e-3)
        parts = [("tokens", {"count": self.num_tokens}), ("speed", {"speed": speed})]
        if self.started.done and not self.ended:
            parts.append(("cut", {}))
        if self.num_left_out:
            parts.append(("left_out", {"count": self.num_left_out}))
        languages = (True, False) if chinese is None else (chinese,)
        return " · ".join(label(key, language, **values) for language in languages for key, values in parts)

    def shown(self) -> tuple:
        """Return what an update changes on the page; equal ones are not sent again."""
        return self.message if has_text(self.message) else {}, self.queue_position, self.num_tokens
