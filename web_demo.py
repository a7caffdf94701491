"""A chat page for one or more checkpoints, or for a model behind an OpenAI-compatible server.

python web_demo.py                                          the newest finished run, on http://127.0.0.1:7860
python web_demo.py --model_path runs/a/model --model_path runs/b/model --compare      two side by side
python web_demo.py --base_url http://127.0.0.1:8000/v1      vLLM, Ollama, llama.cpp ...; the key: OPENAI_API_KEY
WEB_DEMO_AUTH=name:password python web_demo.py --host 0.0.0.0
"""

import argparse
import os
import socket
import sys
from pathlib import Path

from sft.chat.batching import MAX_ACTIVE, MAX_WAITING
from sft.chat.reply import MODEL_FILES, add_model_flags, find_newest_run, load_chat, model_options
from sft.model.load import check_model_path
from sft.web.handlers import Handlers
from sft.web.layout import build_page, serve_page
from sft.web.models import LocalModel, RemoteModel
from sft.web.security import REQUESTS_PER_MINUTE, Limits, read_logins

RUNS = Path(__file__).resolve().parent / "runs"


def main(arguments: list[str] | None = None) -> None:
    options = parse_flags(arguments)
    key = os.environ.pop("OPENAI_API_KEY", None) if options.base_url else None
    try:
        logins = read_logins(options.host, options.auth_file)
        if problem := find_problem(options):
            raise ValueError(problem)
        models = load_models(options, key)
    except (ValueError, OSError) as error:
        fail(str(error).splitlines()[0])
    handlers = Handlers(models, 2 if options.compare else 1, Limits(options.requests_per_minute))
    handlers.feedback = Path(options.feedback) if options.feedback else None
    serve_page(build_page(handlers), handlers, host=options.host, port=options.port, auth=logins)


def parse_flags(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="web_demo.py", description="A chat page for a checkpoint.")
    parser.error = fail
    add = parser.add_argument
    add("--model_path", action="append", help="a model folder or a hub model; repeat it (default: the newest run)")
    add("--compare", action="store_true", help="two models side by side")
    add("--base_url", help="an OpenAI-compatible server in place of a model here; its key: OPENAI_API_KEY")
    add("--model", help="the name of the server's model (default: the first that it lists)")
    add("--host", default="127.0.0.1", help="any but this machine's own needs a login")
    add("--port", type=int, default=7860)
    add("--auth_file", help="a file of lines name:password (or one login in WEB_DEMO_AUTH)")
    add("--feedback", help="write liked replies to this file (JSON Lines), disliked ones beside it; off by default")
    add("--max_active", type=int, default=MAX_ACTIVE, help="replies in the making at a time")
    add("--max_waiting", type=int, default=MAX_WAITING, help="replies that may wait for that")
    add("--requests_per_minute", type=int, default=REQUESTS_PER_MINUTE, help="of a tab; of an address ten times that")
    add_model_flags(parser, "chat_format", "device", "dtype", "load_in_4bit", "trust_remote_code", "template_kwargs")
    parser.set_defaults(dtype=None)
    return parser.parse_args(arguments)


def fail(problem: str) -> None:
    print(f"web_demo.py: {problem}", file=sys.stderr)
    sys.exit(2)


def find_problem(options: argparse.Namespace) -> str | None:
    """Return a mistake that is visible before a model is loaded; sets the newest run where no model is named."""
    if options.base_url and (options.model_path or options.compare or options.load_in_4bit):
        return "--base_url goes without --model_path, --compare and --load_in_4bit"
    if options.model and not options.base_url:
        return "--model goes with --base_url; a model here is named by --model_path"
    if not (options.base_url or options.model_path):
        if not (newest := find_newest_run(RUNS)):
            return f"no finished run in {RUNS}; make one with `sh base_run.sh`, or name a model with --model_path"
        options.model_path = [newest]
    if options.compare and len(options.model_path) < 2:
        return "--compare needs two --model_path"
    if min(options.max_active, options.max_waiting, options.requests_per_minute) < 1:
        return "--max_active, --max_waiting and --requests_per_minute must be at least 1"
    if options.feedback and not os.access(Path(options.feedback).absolute().parent, os.W_OK):
        return f"--feedback {options.feedback}: its folder is not there, or can't be written to"
    problems = [check_model_path(path, names=MODEL_FILES) for path in options.model_path or ()]
    return next(filter(None, problems), None) or find_port_problem(options.host, options.port)


def find_port_problem(host: str, port: int) -> str | None:
    if not 0 < port < 65536:
        return f"--port {port}: use 1 to 65535"
    try:
        with socket.create_server((host, port)):
            return None
    except OSError as error:
        return f"--host {host} --port {port}: {error.strerror or error}; choose another"


def load_models(options: argparse.Namespace, key: str | None) -> dict[str, LocalModel | RemoteModel]:
    """Return the models by the names that the page shows."""
    limits = {"max_active": options.max_active, "max_waiting": options.max_waiting}
    if options.base_url:
        remote = RemoteModel(options.base_url, model=options.model, key=key, **limits)
        return {remote.model: remote}
    models = {}
    for path in options.model_path:
        print(f"loading {path}", flush=True)
        name = name_model(path)
        models[name if name not in models else f"{name} ({len(models) + 1})"] = LocalModel(
            load_chat(path, **model_options(options)), **limits
        )
    return models


def name_model(path: str) -> str:
    """Return a model's name on the page: its run, never its path."""
    parts = (Path(path).resolve() if Path(path).exists() else Path(path)).parts
    return parts[-2] if parts[-1] == "model" and len(parts) > 2 else parts[-1]


if __name__ == "__main__":
    main()
