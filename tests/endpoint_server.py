"""An OpenAI-compatible server in a thread that answers from a script, with the faults that real ones have."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """`script(body, times)` gives the answer to a request that came `times` before: a text, or a fault.

    A fault is {"status", "headers", "body"}, or {"raw": bytes} sent as they are before the connection closes, or
    {"hang": seconds} between half of the answer and its end, or {"drip": seconds} between its bytes.
    """

    daemon_threads = True

    def __init__(self, script: Callable):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.requests, self.headers, self.lock = script, [], [], threading.Lock()
        self.ended, self.busy, self.most_busy = threading.Event(), 0, 0
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def close(self) -> None:
        self.ended.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address) -> None:
        pass  # a client that gave up


def completion(text: str | None) -> bytes:
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    return json.dumps({"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}).encode()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_POST(self) -> None:
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            times = server.requests.count(body)
            server.requests.append(body)
            server.headers.append(self.headers)
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
        try:
            answer = server.script(body, times)
            answer = {"body": completion(answer)} if isinstance(answer, str) else answer
            self._send(answer)
        finally:
            with server.lock:
                server.busy -= 1

    def _send(self, answer: dict) -> None:
        if "raw" in answer:
            self.wfile.write(answer["raw"])
            self.close_connection = True
            return
        body = answer.get("body", completion("late"))
        self.send_response(answer.get("status", 200))
        for name, value in answer.get("headers", {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if "drip" in answer:
            for byte in body:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                if self.server.ended.wait(answer["drip"]):
                    return
        half = len(body) // 2 if "hang" in answer else len(body)
        self.wfile.write(body[:half])
        self.wfile.flush()
        if "hang" in answer:
            self.server.ended.wait(answer["hang"])
            self.wfile.write(body[half:])
