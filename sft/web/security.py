"""Request filter of the web page: routes, hosts, origins, sizes, logins and rate limits, before gradio gets a request.

It also counts the open streams of each session.
"""

import hmac
import ipaddress
import os
import re
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, PlainTextResponse

MAX_BODY_BYTES = 256 * 1024  # of a request
REQUESTS_PER_MINUTE = 20  # of a tab of a browser; ten times as many of an address
CALLS_PER_REQUEST = 6  # of the page's handlers: ask, reply, end the reply, undo ...
MAX_OPEN = 500  # requests of an address that are open at a time; a tab's two streams are
MAX_LOGINS = 5  # failed ones of an address before it is locked out
LOCKED_SECONDS = 600


@dataclass
class Limits:
    """The requests of the last minute, and the open streams and requests."""

    per_minute: int = REQUESTS_PER_MINUTE
    asked: OrderedDict[str, deque] = field(default_factory=OrderedDict)
    listening: Counter = field(default_factory=Counter)  # open streams of a session
    open_requests: Counter = field(default_factory=Counter)  # open requests of an address

    def admit(self, session: str, address: str) -> bool:
        """Count a request of this tab and of this address; return whether it is within the limits."""
        names = (f"tab {session}", 1), (f"address {network(address)}", 10)
        return all(is_within(self.asked, name, limit * self.per_minute, 60) for name, limit in names)


# The routes that the page uses; uploads, files, proxying, monitoring and the rest of gradio 6.31's are closed.
ROUTES = re.compile(
    r"/(|config/?|theme\.css|favicon\.ico|manifest\.json|robots\.txt|(assets|static|svelte)/.*|log(in|out)/?"
    r"|gradio_api/(info/?|queue/(join|data)|cancel|reset/?|heartbeat/.*|startup-events|login_check/?|user/?"
    r"|app_id/?|token/?|theme\.css))"
)
HEADERS = {
    # A reply can't load from or post to another host. gr.HTML of gradio 6.31 compiles its template with Function(),
    # for which a script must be allowed to evaluate text; inline scripts are allowed already.
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; form-action 'self'; "
    "frame-src 'none'; object-src 'none'; base-uri 'self'; frame-ancestors 'self'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class RequestFilter:
    """ASGI middleware: closes routes and foreign origins, limits the bytes of a request and logins, adds the headers.

    It also counts open streams: `hang_up` is called for a session whose last stream closes.
    """

    def __init__(self, app, limits: Limits, hang_up: Callable[[str], None], hosts: Sequence[str] | None):
        self.app = app
        self.limits = limits
        self.hang_up = hang_up
        self.hosts = hosts
        self.logins: OrderedDict[str, deque] = OrderedDict()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await (self.app(scope, receive, send) if scope["type"] == "lifespan" else _ignore())
            return
        address = network((scope.get("client") or ("",))[0])
        login = scope["method"] == "POST" and scope["path"].rstrip("/") == "/login"

        async def send_with_headers(message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
                if login and message["status"] < 400 and self.logins.get(address):
                    self.logins[address].pop()  # only failures count
            await send(message)

        answer = self._refuse(scope) or self._too_often(scope, address)
        # A try is counted before its password is checked, so that parallel tries are counted too.
        if not answer and login and not is_within(self.logins, address, MAX_LOGINS, LOCKED_SECONDS):
            answer = PlainTextResponse("too many failed logins; wait ten minutes", 429)
        with self._count_streams(scope, address):
            await (answer or self.app)(scope, receive, send_with_headers)

    def _refuse(self, scope) -> PlainTextResponse | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        origin = headers.get("origin")
        if self.hosts is not None and not (_name(host) in self.hosts or _parse_address(_name(host))):
            return PlainTextResponse("unknown host; with a login any name may be used", 403)
        foreign = origin is not None and urlsplit(origin).netloc != host
        if foreign or (headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-mode") != "navigate"):
            return PlainTextResponse("another site's request", 403)
        if not ROUTES.fullmatch(scope["path"]):
            return PlainTextResponse("closed", 404)
        length = headers.get("content-length", "")
        if scope["method"] == "POST" and not (length.isdecimal() and int(length) <= MAX_BODY_BYTES):
            return PlainTextResponse(f"at most {MAX_BODY_BYTES} bytes, with a content-length", 413)
        return None

    def _too_often(self, scope, address: str) -> JSONResponse | None:
        """Limit all calls of an address: each new session costs memory, and removes the oldest one."""
        limits = self.limits
        is_call = scope["path"].endswith("/queue/join")
        if is_call and not is_within(limits.asked, f"calls {address}", 10 * CALLS_PER_REQUEST * limits.per_minute, 60):
            return JSONResponse({"detail": "请求太频繁，请稍后再试 · too many requests; wait a minute"}, 429)
        if limits.open_requests[address] >= MAX_OPEN:
            return JSONResponse({"detail": "打开的连接太多 · too many open connections"}, 429)
        return None

    @contextmanager
    def _count_streams(self, scope, address: str) -> Iterator[None]:
        session = ""
        if scope["path"].endswith("/queue/data"):
            session = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
        opened = Counter([address])
        streams = Counter(filter(None, [session]))
        self.limits.open_requests += opened
        self.limits.listening += streams
        try:
            yield
        finally:
            self.limits.open_requests -= opened  # a count of 0 is removed
            self.limits.listening -= streams
            if session and not self.limits.listening[session]:
                self.hang_up(session)


async def _ignore() -> None:
    """Leave a websocket unanswered: gradio 6.31 needs none."""


def _name(host: str) -> str:
    return (urlsplit(f"//{host}").hostname or "") if re.fullmatch(r"[\w.:\[\]-]+", host) else ""


def _parse_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    with suppress(ValueError):
        return ipaddress.ip_address(text)
    return None


def is_within(times: OrderedDict[str, deque], name: str, limit: int, seconds: float) -> bool:
    """Count an event under `name`; return whether there were at most `limit` in the last `seconds`."""
    now = time.monotonic()
    seen = times.setdefault(name, deque())
    times.move_to_end(name)
    while seen and now - seen[0] > seconds:
        seen.popleft()
    while len(times) > 10_000:
        times.popitem(last=False)
    if len(seen) >= limit:
        return False
    seen.append(now)
    return True


def network(address: str) -> str:
    """Return an address, or the /64 of an IPv6 address, all of which a client may use."""
    parsed = _parse_address(address)
    if parsed and parsed.version == 6:
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed or address)


def is_login(auth: dict[str, str], name: str, password: str) -> bool:
    """Say whether name and password are a login; the time is the same for an unknown name."""
    known = auth.get(name, "")
    return hmac.compare_digest(password.encode(), known.encode()) and bool(known)


def read_logins(host: str, file: str | None) -> dict[str, str] | None:
    """Return the logins from --auth_file or WEB_DEMO_AUTH; any address but the machine's own must have one.

    The variable is taken out of the environment, so that no child process inherits it.
    """
    text = os.environ.pop("WEB_DEMO_AUTH", "")
    where = "WEB_DEMO_AUTH"
    if file:
        try:
            text = Path(file).read_text(encoding="utf-8")
            where = f"--auth_file {file}"
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--auth_file {file}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    pairs = [line.strip().partition(":") for line in text.splitlines() if line.strip()]
    if not all(name and password for name, _, password in pairs) or (file and not pairs):
        raise ValueError(f"{where} must be name:password")
    address = _parse_address(host)
    if not pairs and not (host == "localhost" or (address and address.is_loopback)):
        raise ValueError(
            f"--host {host} is reachable by others: set WEB_DEMO_AUTH=name:password in the environment, "
            "or use --auth_file"
        )
    return {name: password for name, _, password in pairs} or None
