"""The groups of RFT: prompts with what their replies have in common, and the replies with every number."""

from pathlib import Path

from decisions import EFFORTS, LINKS
from games import game_from_json
from play.expert_games import history_from_text
from prompts import read_reply
from rewards import TERMS, Target, accuracy, f1
from run.files import read_lines
from settings import KNOWN_WEIGHTS
from tools.page.games import decision_of
from tools.page.text import LONGEST, clean, escaped, rounded, tell_game, thinned

COLUMNS = "text broken action expected f1 accuracy compliance sample r_S s local global R_G A_S A_G advantage"


def read_prompts(folder: Path) -> dict[tuple, tuple[Target, list[dict]]]:
    """{(game, stage, seat): (the decision, with what the experts do there, and its prompt)}, from
    prompts.jsonl. Raises ValueError for lines that no game allows."""
    asked = {}
    for line in read_lines(folder / "prompts.jsonl"):
        state = history_from_text(game_from_json(line["instance"]), line["before"])
        experts = state.kind.check(state.kind.from_text(line["experts"]), state.game)
        target = Target(state, line["seat"], experts, line["game"])
        asked[line["game"], line["stage"], line["seat"]] = target, line["prompt"]
    return asked


def prompt_data(s: dict, target: Target, chat: list[dict]) -> dict:
    """What the replies to a prompt have in common. s: a line of samples.jsonl."""
    label, game = clean(s["expert"]), target.game
    return {key: s[key] for key in ("kind", "game", "stage", "seat")} | {
        "label": label,
        "N": game.N,
        "types": game.types,
        "type": game.type_name,
        "instance": tell_game(game),
        "key": game.key,
        "chat": [[message["role"], clean(message["content"], 20 * LONGEST)] for message in chat],
        "experts": target.actions,
        "values": decision_of(target.state, target.seat, target.actions, label),
    }


def reply_row(s: dict, target: Target, optional: dict[str, float]) -> list:
    """One reply, by COLUMNS, with what was read in it; the optional terms follow."""
    kind, seat = target.kind, target.seat
    values, how = s | {"text": clean(s["reply"])}, (kind, seat, target.game.N, target.cap)
    decision, expert = (read_reply(s[key], *how)[0] for key in ("reply", "expert"))
    if decision and not s["broken"]:
        values |= {"action": kind.write(decision.action), "expected": decision.belief}
        if kind is EFFORTS:
            values["action"] = decision.action
        elif kind is LINKS:
            rows = decision.action, expert.action, seat
            values |= {"action": "".join(map(str, decision.action)), "f1": f1(*rows)}
            values["accuracy"] = accuracy(*rows)
    return rounded([values.get(name) for name in (*COLUMNS.split(), *optional)])


def groups_of(config: dict, samples: list[dict], asked: dict[tuple, tuple], budget: int) -> dict:
    """Every group of m replies whose prompt is known, of all steps or of those that fit on the page. asked:
    of read_prompts; budget: in characters."""
    named = [text.partition("=") for text in config.get("weights") or ()]
    weights = KNOWN_WEIGHTS | {name: float(weight) for name, _, weight in named}
    m = config.get("m", 8)
    own = [name for name in weights if name not in KNOWN_WEIGHTS | TERMS]  # terms of the run's own file
    optional = {name: weights.get(name, 0) for name in (*TERMS, *own)}
    numbers, prompts, steps = {}, [], {}
    for s in samples:
        place = s["game"], s["stage"], s["seat"]
        if place not in asked:  # prompts.jsonl was lost or damaged
            continue
        target, chat = asked[place]
        if place not in numbers:
            numbers[place] = len(prompts)
            prompts.append(rounded(prompt_data(s, target, chat)))
        number, groups = numbers[place], steps.setdefault(s["step"], [])
        if not groups or groups[-1]["prompt"] != number or len(groups[-1]["replies"]) == m:
            groups.append({"step": s["step"], "prompt": number, "replies": []})
        groups[-1]["replies"].append(reply_row(s, target, optional))
    groups = list(steps.values())
    prompt_sizes, step_sizes = ([len(escaped(part)) for part in parts] for parts in (prompts, groups))

    def used(chosen):
        return {group["prompt"] for i in chosen for group in groups[i]}

    def size(chosen):
        return sum(step_sizes[i] for i in chosen) + sum(prompt_sizes[k] for k in used(chosen))

    chosen = thinned(len(groups), size, budget)
    shown = used(chosen)
    objective = dict(text.split("=", 1) for text in config.get("objective") or ())
    return {
        "columns": [*COLUMNS.split(), *optional],
        "optional": optional,
        "rule": {
            "weights": [weights["A_S"], weights["A_G"]],
            "algo": config.get("algo", "tompo"),
            "advantage": objective.get("advantage", "std"),
            **{name: config.get("reward_from") == name for name in ("game", "welfare", "credit")},
        },
        "instances": len({prompt["key"] for prompt in prompts}),
        "groups": [group for i in chosen for group in groups[i]],
        "steps": [len(chosen), len(steps)],
        "prompts": [prompt if k in shown else None for k, prompt in enumerate(prompts)],
    }
