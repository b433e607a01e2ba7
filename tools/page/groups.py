"""The groups of RFT: prompts with what their replies have in common, and the replies with every number."""

import math
from pathlib import Path

from games import game_from_json
from play import hindsight
from prompts import parse_reply, read_belief
from rewards import TERMS, WEIGHTS, accuracy, f1
from run.files import read_lines
from tools.page.games import decision_of
from tools.page.text import LONGEST, clean, escaped, rounded, tell_game, thinned
from world.draws import named_numbers

COLUMNS = "text broken action expected f1 accuracy compliance sample r_S s local global R_G A_S A_G advantage"


def prompts_of(folder: Path, samples: list[dict]) -> dict[tuple, dict]:
    """{(game, stage, seat): what its replies have in common}; in the order in which they were first asked."""
    found = {}
    for s in samples:
        key = s["game"], s["stage"], s["seat"]
        if key not in found:
            lists = [text.count(",") + 1 for text in s["expert"].split("\n") if "[" in text]
            bare = {"kind": s["kind"], "game": s["game"], "stage": s["stage"], "seat": s["seat"]}
            found[key] = bare | {"N": max(lists, default=0), "label": clean(s["expert"])}
    for line in read_lines(folder / "prompts.jsonl"):
        key = line["game"], line["stage"], line["seat"]
        if key not in found:
            continue
        game = game_from_json(line["instance"])
        state = hindsight.read_history(game, line["before"])
        found[key] |= {
            "N": game.N,
            "cap": float(game.caps[line["seat"]]),
            "types": game.types,
            "type": game.type_name,
            "instance": tell_game(game),
            "key": game.key,
            "chat": [[m["role"], clean(m["content"], 20 * LONGEST)] for m in line["prompt"]],
            "experts": hindsight.read_history(game, [*line["before"], line["experts"]]).history[-1],
            "links": state.links,
            "state": state,
        }
        experts, label = found[key]["experts"], found[key]["label"]
        found[key]["values"] = decision_of(state, line["seat"], experts, label)
    return found


def reply_row(s: dict, prompt: dict, weights: dict) -> list:
    """One reply, by COLUMNS, with what was read in it; the optional terms behind."""
    kind, seat, N, text = s["kind"], s["seat"], prompt["N"], s["reply"]
    action = f1_ = agree = None
    decision = None if s["broken"] else parse_reply(text, kind, seat, N, prompt.get("cap", math.inf))
    if decision:
        action = decision.action
    if decision and kind == "G":
        expert = parse_reply(prompt["label"], kind, seat, N, math.inf)
        if expert:
            f1_, agree = (score(decision.action, expert.action, seat) for score in (f1, accuracy))
        action = "".join(map(str, action))
    expected = read_belief(text, kind, seat, N) if decision else None
    read = {"text": clean(text), "action": action, "expected": expected, "f1": f1_, "accuracy": agree}
    values = s | read
    return rounded([values.get(name) for name in (*COLUMNS.split(), *weights)])


def groups_of(config: dict, samples: list[dict], prompts: dict[tuple, dict], budget: int) -> dict:
    """Every group of m replies, of all steps or of those that fit on the page."""
    numbers = {key: k for k, key in enumerate(prompts)}
    weights = WEIGHTS | named_numbers(config.get("reward"), "--reward")
    optional = {name: weights.get(name, 0) for name in TERMS}
    steps, m, last = {}, config.get("m", 8), None
    for s in samples:
        key = s["game"], s["stage"], s["seat"]
        groups = steps.setdefault(s["step"], [])
        if last != (s["step"], key) or len(groups[-1]["replies"]) == m:
            groups.append({"step": s["step"], "prompt": numbers[key], "replies": []})
        last = s["step"], key
        groups[-1]["replies"].append(reply_row(s, prompts[key], optional))
    told = [rounded({k: v for k, v in p.items() if k not in ("state", "cap")}) for p in prompts.values()]
    groups, of_prompt = list(steps.values()), [len(escaped(p)) for p in told]
    of_step = [(len(escaped(of_one)), {group["prompt"] for group in of_one}) for of_one in groups]

    def size(kept):
        return sum(of_step[i][0] for i in kept) + sum(of_prompt[k] for k in asked(kept))

    def asked(kept):
        return set().union(*(of_step[i][1] for i in kept))

    kept = thinned(len(groups), size, budget)
    shown, used = [group for i in kept for group in groups[i]], asked(kept)
    objective = dict(text.split("=", 1) for text in config.get("objective") or ())
    return {
        "columns": [*COLUMNS.split(), *optional],
        "optional": optional,
        "rule": {
            "weights": config.get("level_weights", [0.8, 0.2]),
            "algo": config.get("algo", "tompo"),
            "advantage": objective.get("advantage", "std"),
            "credit": config.get("credit") is not None,
        },
        "groups": shown,
        "steps": [len(kept), len(steps)],
        "prompts": [p if k in used else None for k, p in enumerate(told)],
    }
