"""A small chat-completions server that runs a real model, to try openai:... without any other software:

    python tests/teachers/serve_policy.py --model smollm2-135m-instruct --adapter runs/tompo/adapter
    OPENAI_BASE_URL=http://127.0.0.1:8000/v1 python -m tools.expert_games --expert openai:any --games 126

It answers one question after another, and counts no tokens. It is not for the open network: it has no key.
"""

import argparse
import sys
import threading
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))

from chat_server import ChatServer  # noqa: E402

from models.load import load_policy, put_adapter  # noqa: E402


def answers(policy):
    """The script of a ChatServer that answers with what the policy samples."""
    generator = torch.Generator().manual_seed(0)

    def answer(question, n):
        uniforms_11S = torch.rand(1, 1, min(256, question.get("max_tokens", 64)), generator=generator)
        prompt = policy.encode_prompt(question["messages"])
        [[reply]] = policy.sample([prompt], uniforms_11S, question.get("temperature", 1.0))
        return "text", reply.text

    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description="A small chat-completions server that runs a real model.")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="as in train_rft.py")
    parser.add_argument("--adapter", help="folder of an adapter")
    parser.add_argument("--port", type=int, default=8000, help="on 127.0.0.1")
    args = parser.parse_args()
    policy = load_policy(args.model)
    if args.adapter:
        put_adapter(policy, args.adapter)

    with ChatServer(answers(policy), usage=None, port=args.port) as server:
        print(f"listening on {server.url}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
