"""A small chat-completions server that runs a real model, to try openai:... without any other software:

    python tests/teachers/serve_policy.py --model smollm2-135m-instruct --adapter runs/tompo/adapter
    OPENAI_BASE_URL=http://127.0.0.1:8000/v1 python -m tools.expert_games --expert openai:any --games 126

It answers one question after another. It is not for the open network: it asks for no key.
"""

import argparse
import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models.load import load_policy, put_adapter  # noqa: E402


def answer(policy, question: dict, generator: torch.Generator) -> dict:
    prompt = policy.encode_prompt(question["messages"])
    uniforms_PMS = torch.rand(1, 1, min(256, question.get("max_tokens", 64)), generator=generator)
    [[reply]] = policy.sample([prompt], uniforms_PMS, question.get("temperature", 1.0))
    usage = {"prompt_tokens": len(prompt), "completion_tokens": len(reply.ids)}
    choice = {"message": {"role": "assistant", "content": reply.text}}
    choice["finish_reason"] = "stop" if reply.ended else "length"
    return {"object": "chat.completion", "model": question["model"], "choices": [choice], "usage": usage}


def main() -> None:
    parser = argparse.ArgumentParser(description="A small chat-completions server that runs a real model.")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="as in train_rft.py")
    parser.add_argument("--adapter", help="folder of an adapter")
    parser.add_argument("--port", type=int, default=8000, help="on 127.0.0.1")
    args = parser.parse_args()
    policy, generator = load_policy(args.model), torch.Generator().manual_seed(0)
    if args.adapter:
        put_adapter(policy, args.adapter)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            data = json.dumps(answer(policy, question, generator)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    HTTPServer.request_queue_size = 128
    server = HTTPServer(("127.0.0.1", args.port), Handler)
    print(f"listening on http://127.0.0.1:{server.server_port}/v1", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
