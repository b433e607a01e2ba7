"""A chat-completions server on the loopback, in threads of the test: it answers as told, and counts."""

import json
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

KEY = "sk-test-5f1d9c0b7a3e4482"


def good_reply(body: dict) -> str:
    """Links with everybody; or the worked number, believed of all others too."""
    system, question = body["messages"][0]["content"], body["messages"][-1]["content"]
    own, N = (int(n) for n in re.search(r"You are agent (\d+) of (\d+)", system).groups())
    if "Whom do you choose?" in question:
        row = [int(i + 1 != own) for i in range(N)]
        return f"Belief: {row}\nDecision: {row}"
    effort = float(re.search(r"(?:efforts alpha: |Your alpha )([\d.]+\d)|$", question)[1] or 1)
    return f"Belief: {[0 if i + 1 == own else effort for i in range(N)]}\nDecision: {effort}"


class ChatServer:
    """script(body, n) -> None for a good answer, or what to do instead, where n is how often this very
    question has come, from 1: ("status", code, headers, body), ("body", bytes), ("half",), ("close",),
    ("slow", seconds), ("text", str), ("drip", bytes of the response that come at once, the rest bit by bit).

    questions: the bodies that came; answered: how often each was answered in full; hold_after: no more
    answers after so many. A test that makes one is skipped where the client's package is not installed.
    """

    def __init__(
        self, script=lambda body, n: None, delay=lambda: 0.0, hold_after=10**9, usage=(100, 20), port=0
    ):
        pytest.importorskip("openai", reason="no openai: pip install -r requirements-experts.txt")
        self.script, self.delay, self.hold_after, self.usage = script, delay, hold_after, usage
        self.lock, self.questions, self.answered = threading.Lock(), [], Counter()
        self.headers, self.most_at_once, self.at_once, self.released = [], 0, 0, threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                try:
                    server.handle(self)
                except OSError:  # the client has gone
                    self.close_connection = True

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128  # with the usual 5, connections fail when many come at once
            daemon_threads = True

        self.http = Server(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.released.set()
        self.http.shutdown()
        self.http.server_close()

    def handle(self, request):
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        question = json.dumps(body, sort_keys=True)
        with self.lock:
            self.questions.append(question)
            self.headers.append(request.headers)
            n = self.questions.count(question)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(self.delay())
        with self.lock:
            self.at_once -= 1
            held = sum(self.answered.values()) >= self.hold_after
            kind, *what = self.script(body, n) or ("text", None)
            if kind == "text" and not held:
                self.answered[question] += 1
        if held:
            self.released.wait()
            kind = "close"
        request.close_connection = True
        if kind == "status":
            return self.send(request, what[0], what[2], what[1])
        if kind == "body":
            return self.send(request, 200, what[0])
        if kind == "drip":
            return self.drip(request, what[0])
        if kind == "close":
            return
        if kind == "slow":
            time.sleep(what[0])
        text = good_reply(body) if kind != "text" or what[0] is None else what[0]
        names = ("prompt_tokens", "completion_tokens")
        # The protocol asks for their sum too, which nobody here reads.
        usage = dict(zip(names, self.usage, strict=True), total_tokens=0) if self.usage else None
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        data = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "usage": usage}
        data = json.dumps(data | {"choices": [choice]}).encode()
        self.send(request, 200, data, cut=len(data) // 2 if kind == "half" else None)

    def drip(self, request, first):
        response = b"HTTP/1.1 200 OK\r\nContent-Length: 400\r\n\r\n" + b" " * 400
        request.wfile.write(response[:first])
        for byte in response[first:]:
            if self.released.wait(0.05):
                break
            request.wfile.write(bytes([byte]))

    @staticmethod
    def send(request, status, data, headers=None, cut=None):
        request.send_response(status)
        for name, value in (headers or {}).items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data[:cut])
