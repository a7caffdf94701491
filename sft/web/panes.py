"""A pane of the page: the HTML of its messages, with the buttons that `page.js` connects, and a reply in the making."""

import html
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import gradio as gr

from sft.report.templates import load_template
from sft.web import markdown
from sft.web.models import SECONDS_BETWEEN_UPDATES, LocalReply, RemoteReply
from sft.web.text import label
from sft.web.turns import EXAMPLES, Turn, has_text, open_calls

FOLDER = Path(__file__).parent


def to_page(turns: Sequence[Turn], pane: int = 0, *, chinese: bool | None = None, growing: bool = False) -> list[str]:
    """Return the HTML of each turn as a pane shows it; the examples where there is none."""
    macros = load_template("pane.html", FOLDER).module
    text = partial(label, chinese=chinese)
    if not turns:
        return [str(macros.examples(EXAMPLES, text))]
    pages = []
    last = len(turns) - 1
    for index, turn in enumerate(turns):
        results = [call["function"]["name"] for call in open_calls(turns[:index], pane)]
        question = macros.question(index, turn.question, markdown.to_plain_html(turn.question), results, text)
        reply = _reply(index, turn.reply(pane), text, growing=growing and index == last, is_last=index == last)
        pages.append(str(question + reply))
    return pages


def _reply(index: int, reply: dict, text: Callable[[str], str], *, growing: bool, is_last: bool) -> str:
    if not has_text(reply) and not growing:
        return ""
    content = reply.get("content") or ""
    thought = (reply.get("reasoning_content") or "").strip()
    functions = [call.get("function", call) for call in reply.get("tool_calls") or ()]
    is_open = growing and not content and not functions
    return load_template("pane.html", FOLDER).module.reply(
        index,
        markdown.to_plain_html(thought) if thought else "",
        "thinking" if is_open else "thought",
        markdown.to_html(content) if content else None,
        [(function.get("name", ""), html.escape(_call_text(function))) for function in functions],
        None if growing else content,
        is_last,
        text,
    )


def _call_text(function: dict) -> str:
    """Return the arguments of a call; those that the model wrote as text stay as they are."""
    arguments = function.get("arguments")
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, indent=2)


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
