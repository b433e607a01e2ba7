"""A small chat-completions server that runs a real model, to try openai:... without any other software:

    python tests/teachers/serve_policy.py --model smollm2-135m-instruct --adapter runs/tompo/adapter
    OPENAI_BASE_URL=http://127.0.0.1:8000/v1 python -m tools.expert_games --expert openai:any --games 126

It answers the questions that are waiting together, in one batch. Every answer is also a line of --log: the
question and its tokens, so that what was asked can be counted on this side too. Not for the open network:
it asks for no key.
"""

import argparse
import hashlib
import json
import queue
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models.load import load_policy, put_adapter  # noqa: E402


class Waiting:
    """One question, and the thread that waits for its answer."""

    def __init__(self, body: dict):
        self.body, self.done, self.answer = body, threading.Event(), None


def handler(waiting: queue.Queue) -> type:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            question = Waiting(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            waiting.put(question)
            question.done.wait()
            data = json.dumps(question.answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    return Handler


def temperature_of(question: Waiting) -> float:
    return question.body.get("temperature", 1.0)


def answer(policy, questions: list[Waiting], generator: torch.Generator) -> None:
    """All of one temperature."""
    prompts = [policy.encode_prompt(q.body["messages"]) for q in questions]
    limit = min(256, max(q.body.get("max_tokens", 64) for q in questions))
    groups = policy.sample(prompts, 1, limit, temperature_of(questions[0]), generator)
    for q, prompt, (reply,) in zip(questions, prompts, groups):
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(reply.reply_ids)}
        choice = {"message": {"role": "assistant", "content": reply.text}}
        choice["finish_reason"] = "stop" if reply.ended else "length"
        q.answer = {"object": "chat.completion", "model": q.body["model"]}
        q.answer |= {"choices": [choice], "usage": usage}


def main() -> None:
    parser = argparse.ArgumentParser(description="A small chat-completions server that runs a real model.")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="as in train_rft.py")
    parser.add_argument("--adapter", help="folder of an adapter")
    parser.add_argument("--port", type=int, default=8000, help="on 127.0.0.1")
    parser.add_argument("--batch", type=int, default=16, help="most questions that are answered together")
    parser.add_argument("--log", help="file to which a line per answer is appended")
    args = parser.parse_args()
    policy = load_policy(args.model)
    if args.adapter:
        put_adapter(policy, args.adapter)
    waiting: queue.Queue = queue.Queue()
    ThreadingHTTPServer.request_queue_size = 128
    server = ThreadingHTTPServer(("127.0.0.1", args.port), handler(waiting))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"listening on http://127.0.0.1:{server.server_port}/v1", flush=True)
    generator = torch.Generator().manual_seed(0)
    while True:
        questions = [waiting.get()]
        try:
            while len(questions) < args.batch:
                questions.append(waiting.get(timeout=0.02))
        except queue.Empty:
            pass
        for temperature in set(map(temperature_of, questions)):
            answer(policy, [q for q in questions if temperature_of(q) == temperature], generator)
        for q in questions:
            if args.log:
                key = hashlib.sha256(json.dumps(q.body, sort_keys=True).encode()).hexdigest()
                with open(args.log, "a") as f:
                    f.write(json.dumps({"question": key, "usage": q.answer["usage"]}) + "\n")
            q.done.set()


if __name__ == "__main__":
    main()
