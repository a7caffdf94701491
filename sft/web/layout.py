"""The page's layout, the connection of its components to the handlers, and its server."""

import html

import gradio as gr
from starlette.middleware import Middleware

from sft.chat.sampling import Sampling
from sft.web.handlers import Handlers
from sft.web.panes import new_pane, read_asset
from sft.web.security import RequestFilter, is_login
from sft.web.text import I18N
from sft.web.turns import SLIDERS, export_links

TOOLS_EXAMPLE = (
    '[{"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]'
)
MAX_JOBS = 512  # of gradio at a time: replies that run or wait, and the other handlers meanwhile
MAX_SESSIONS = 2_000  # whose conversations are kept; the least recently used one is removed


def build_page(handlers: Handlers) -> gr.Blocks:
    """Build the page; `serve_page` opens it."""
    with gr.Blocks(title="SFT chat", analytics_enabled=False, fill_height=True) as page:
        turns = gr.State([])
        with gr.Row(equal_height=True):
            gr.Markdown(f"## {I18N('title')}")
            clear = gr.Button(I18N("clear"), size="sm", scale=0, min_width=120)
        with gr.Row(elem_classes="panes"):
            panes = [_pane(handlers, index) for index in range(handlers.num_panes)]
            pickers, shown, statuses = map(list, zip(*panes, strict=True))
        box = gr.Textbox(show_label=False, placeholder=I18N("message"), autofocus=True, submit_btn=True, max_lines=8)
        with gr.Accordion(I18N("settings"), open=False):
            system = gr.Textbox("", label=I18N("system"), lines=2)
            has_switch = any(model.has_thinking_switch for model in handlers.models.values())
            thinks = all(model.thinks_by_default for model in handlers.models.values())
            thinking = gr.Checkbox(thinks, label=I18N("thinking"), visible=has_switch)
            can_use_tools = any(model.can_use_tools for model in handlers.models.values())
            with gr.Accordion(I18N("tools"), open=False, visible=can_use_tools):
                tools = gr.Textbox("", show_label=False, placeholder=TOOLS_EXAMPLE, lines=4, max_lines=20)
            with gr.Row():
                sliders = [_slider(name, *bounds) for name, bounds in SLIDERS.items()]
            with gr.Row():
                export = gr.Button(I18N("export"), size="sm", scale=0, min_width=200)
                links = gr.Markdown(sanitize_html=False)
        settings = [*sliders, thinking, tools, *filter(None, pickers)]
        _connect_events(handlers, turns, shown, statuses, box, [system, tools], settings, clear)
        export.click(export_links, [turns, system, tools], links, api_visibility="private", show_progress="hidden")
        page.load(handlers.show, turns, shown, api_visibility="private", show_progress="hidden")
    handlers.page = page
    page.queue(max_size=MAX_JOBS, default_concurrency_limit=None, api_open=False)
    page._queue.ANALYTICS_MAX_EVENTS = 1  # gradio 6.31 makes a table of the last 10,000 after each
    return page


def _pane(handlers: Handlers, index: int) -> tuple:
    """Return (picker or None, conversation, status line); the pane names its model."""
    with gr.Column():
        names = list(handlers.models)
        picker = None
        if len(names) > 1:
            picker = gr.Dropdown(names, value=names[index], show_label=False, container=False, filterable=False)
        else:
            gr.HTML(f'<div class="model-name">{html.escape(names[0])}</div>', js_on_load=None)
        shown = new_pane(has_feedback=handlers.feedback is not None, has_picker=picker is not None)
        return picker, shown, gr.Markdown(elem_classes="status")


def _slider(name: str, low: float, high: float, step: float) -> gr.Slider:
    default = getattr(Sampling(), name)
    precision = 0 if isinstance(step, int) else None
    return gr.Slider(low, high, default, step=step, precision=precision, label=I18N(name), min_width=300)


def _connect_events(
    handlers: Handlers, turns, shown: list, statuses: list, box, given: list, settings: list, clear
) -> None:
    """Connect the events: each way to ask shows the question first, then waits for its reply.

    `shown` and `statuses` are those of the panes, `given` the boxes of system prompt and tools.
    """
    # Only an event that goes through the queue can show why it was refused.
    now = {"show_progress": "hidden", "outputs": [box, turns, *shown]}
    hidden = {**now, "api_visibility": "private"}
    asked = [box.submit(handlers.ask, [box, turns, *given], api_name="say", **now)]
    for pane in shown:
        asked += [
            pane.retry(handlers.ask_again, [turns, *given], **hidden),
            pane.edit(handlers.ask_edited, [turns, *given], **hidden),
            pane.example_select(handlers.ask_example, [turns, *given], **hidden),
        ]
    replies = [
        event.success(
            handlers.reply,
            [turns, given[0], *settings],
            [turns, *shown, *statuses],
            api_name="reply",
            api_visibility="private" if index else "public",
            show_progress="hidden",
        )
        for index, event in enumerate(asked)
    ]
    for event in replies:
        event.then(handlers.end_reply, turns, **hidden)
    for event in (*asked, *replies):
        event.failure(handlers.end_reply, turns, **hidden)
    box.stop(handlers.stop, None, None, cancels=replies, api_visibility="private", show_progress="hidden")
    for index, pane in enumerate(shown):
        pane.undo(handlers.undo, turns, cancels=replies, **hidden)
        if handlers.feedback:
            like = handlers.like_in(index)
            pane.like(like, [turns, *given], None, api_visibility="private", show_progress="hidden")
    clear.click(handlers.clear, None, cancels=replies, **hidden)


# --- the server ---------------------------------------------------------------------------------------------------


def serve_page(
    page: gr.Blocks, handlers: Handlers, *, host: str, port: int, auth: dict | None = None, block=True
) -> None:
    """Open the page on host:port; with `block` False it returns at once, and `page.close()` ends it.

    Without a login another site could reach the page under its own name that resolves to this host (DNS rebinding), so
    only names of this machine are answered; an address in numbers can't be such a name.
    """
    hosts = None if auth else ("localhost", host)
    middleware = Middleware(RequestFilter, limits=handlers.limits, hang_up=handlers.hang_up, hosts=hosts)
    page.launch(
        server_name=host,
        server_port=port,
        auth=(lambda name, password: is_login(auth, name, password)) if auth else None,
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
        css=read_asset("page.css"),
        app_kwargs={"middleware": [middleware]},
        prevent_thread_lock=True,
    )
    print(f"http://{host}:{port}", flush=True)
    if block:
        page.block_thread()
