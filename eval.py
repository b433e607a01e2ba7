"""Evaluation: held-out games with the policy in one seat and experts in the others.

    python eval.py --policy base runs/rft/sft/adapter runs/rft/adapter --json results.json
    python eval.py --seeds runs/seed0/eval.json runs/seed1/eval.json runs/seed2/eval.json

--policy takes `base` (the model without an adapter), adapter folders and `expert:NAME`. The rows `expert:random` and
that of the other seats' expert are always added. Every policy plays the same instances (the fixed held-out grid), in
the same seat, against the same draws of the experts, so rows can be compared game by game.

Metrics, [choice] where the paper only names them:
    U1      share of the policy's decisions that are compliant; Wilson interval
    s       graph score of the policy's graph decisions against the expert's: see rewards.py; 0 if not compliant
    row     share of the N-1 other agents for whom a graph decision is the expert's; 0 if not compliant. Unlike s it sees
            proposals that nobody answers
    U2      strategic efficiency of a decision: 1 - (u_best - u) / (u_best - u_worst) given what the others actually
            play: over all 2^(N-1) own rows (payoff at the Nash efforts of the graph that would form), or over all
            efforts in [0, cap]; 1 where u_best = u_worst
    U3      cooperative outcome of a game: realised welfare / welfare of the first best (planner)
    U3 gain (W - W_empty) / (W* - W_empty): 0 for nobody linking at Nash efforts, 1 for the first best; games without
            a difference are left out
    belief  graph: share of the others whose choice of the agent was foreseen; effort: mean over the others of
            max(0, 1 - |belief - effort| / max(effort, 0.05 cap)); 0 without a compliant reply that states one
The unit of analysis is the game instance: means over instances with 95 % t intervals. A reply that is not compliant
plays no links / effort 0, and counts; the columns `| ok` are U2 of compliant decisions and U3 of games in which every
decision of the policy was compliant. All of it is also reported for round 1 alone where games have more rounds.
"""

import argparse
import math
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

import experts
import games
import llm_experts
import lora
import ranks
from checkpoint import seeded
from games import Game, State
from instances import families, held_out_grid
from policy import Policy, put_adapter
from prompts import Decision, PromptStyle, fallback, format_reply, messages, parse_reply
from rewards import Target, accuracy, graph_score
from runs import InputError, number, positive_int, read_json, refuse_existing, reports_errors, seed_int, write_json
from shared_prefix import History
from train_sft import add_model_arguments, load_policy_of_rank

METRICS = ("U1", "s", "row", "U2", "U3", "U3 gain", "belief", "U2 | ok", "U3 | ok")
COMPARED = ("s", "row", "U2", "U3")  # those whose paired differences are printed


# ---------------------------------------------------------------------------------------------------------------------
# metrics


@lru_cache(maxsize=2**16)
def _nash_payoffs(game: Game, links: bytes) -> np.ndarray:
    links_NN = np.frombuffer(links, dtype=int).reshape(game.N, game.N)
    return game.payoffs(links_NN, game.nash_efforts(links_NN))


def strategic_efficiency(state: State, seat: int, actions: np.ndarray) -> float:
    """U2 of the decision that `seat` took among `actions`, all agents' actions of the stage."""
    game = state.game
    if state.kind == "G":

        def payoff(row_N):
            proposals_NN = actions.copy()
            proposals_NN[seat] = row_N
            return _nash_payoffs(game, games.form_links(proposals_NN).tobytes())[seat]

        u = payoff(actions[seat])
        all_u = [payoff(row_N) for row_N in games.own_rows(game.N, seat)]
        best, worst = max(all_u), min(all_u)
    else:

        def payoff(effort):
            efforts_N = actions.copy()
            efforts_N[seat] = effort
            return game.payoffs(state.links, efforts_N)[seat]

        u = payoff(actions[seat])
        best = payoff(game.best_response(state.links, actions)[seat])
        worst = min(payoff(0.0), payoff(game.caps[seat]))  # own payoff is concave in the own effort
    return 1.0 if best - worst < 1e-12 else 1 - (best - u) / (best - worst)


@lru_cache(maxsize=None)
def welfare_bounds(game: Game) -> tuple[float, float]:
    """(W* of the first best, W of nobody linking at Nash efforts)."""
    empty_NN = games.empty_graph(game.N)
    return game.efficient_graph("planner")[1], game.welfare(empty_NN, game.nash_efforts(empty_NN))


def belief_accuracy(decision: Decision | None, state: State, seat: int, actions: np.ndarray) -> float:
    if decision is None or decision.belief is None:
        return 0.0
    others = np.arange(state.game.N) != seat
    if state.kind == "G":
        return float((decision.belief == actions[:, seat])[others].mean())
    error_N = np.abs(decision.belief - actions) / np.maximum(actions, 0.05 * state.game.caps)
    return float(np.maximum(0, 1 - error_N)[others].mean())


# ---------------------------------------------------------------------------------------------------------------------
# play


@dataclass
class Turn:
    """One decision of the policy. decision is None for a reply that is not compliant."""

    round: int
    kind: str
    reply: str
    decision: Decision | None
    s: float | None  # graph decisions only
    row: float | None  # graph decisions only
    U2: float
    belief: float


@dataclass
class Played:
    """One finished game: the policy's turns, and realised welfare by round."""

    game: Game
    turns: list[Turn]
    welfares: list[float]


def policy_player(policy: Policy, style: PromptStyle, max_new_tokens, temperature: float, seed: int, batch: int = 64):
    """A player that answers with the policy: (states, seat, replies so far, stage) -> reply texts. It is for one play
    of games: of each conversation it keeps the keys and values from one decision to the next."""
    histories: dict[int, History] = defaultdict(History)

    def answer(states, seat, replies, stage):
        prompts = [policy.encode_prompt(messages(s, seat, r, style)) for s, r in zip(states, replies)]
        limit = max_new_tokens or default_max_new_tokens(max(s.game.N for s in states))
        texts = []
        for start in range(0, len(prompts), batch):
            generator = seeded(seed, 100, stage, start)
            part = prompts[start : start + batch]
            mine = ranks.share(range(len(part)))
            groups = policy.sample(part, 1, limit, temperature, generator, histories[start], mine)
            texts += ranks.whole(mine, [group[0].text for group in groups])
        return texts

    return answer


def expert_player(expert: str | experts.Expert, style: PromptStyle, seed: int):
    """A player that answers as an expert, in the same words as a policy would."""
    expert = experts.make_expert(expert) if isinstance(expert, str) else expert

    def answer(states, seat, replies, stage):
        rngs = [np.random.default_rng([seed, i, seat, stage]) for i in range(len(states))]
        decisions = experts.settle([expert(s, seat, rng, r) for s, rng, r in zip(states, rngs, replies)])
        return [format_reply(decision, style) for decision in decisions]

    return answer


def default_max_new_tokens(N: int) -> int:
    """Room for two lines of N entries."""
    return 20 + 7 * N


def play(
    instances: list[Game], player, seat: int, expert: str | experts.Expert, seed: int, label: str = ""
) -> list[Played]:
    """All games side by side, stage by stage; they must have the same stages and rounds. Draws of an expert belong to
    (seed, game, seat, stage), so they do not depend on the policy."""
    others = experts.make_expert(expert) if isinstance(expert, str) else expert
    states, past = [State(g) for g in instances], [[[] for _ in range(g.N)] for g in instances]
    replies = [of_game[seat] for of_game in past]
    turns: list[list[Turn]] = [[] for _ in instances]
    stages = len(instances[0].stages) * instances[0].rounds
    for stage in tqdm(range(stages), desc=f"playing {label}", unit="stage", leave=False, disable=not ranks.first()):
        texts = player(states, seat, replies, stage)
        # In a graph stage also what would have been played with the expert in the policy's seat too.
        asked = [(i, j) for i, s in enumerate(states) for j in range(s.game.N) if j != seat or s.kind == "G"]
        rngs = [np.random.default_rng([seed, i, j, stage]) for i, j in asked]
        decisions = experts.settle([others(states[i], j, rng, past[i][j]) for (i, j), rng in zip(asked, rngs)])
        of_expert = dict(zip(asked, decisions))
        for i, (state, text) in enumerate(zip(states, texts)):
            N = state.game.N
            decision = parse_reply(text, state.kind, seat, N, state.game.caps[seat])
            played = [(decision or fallback(state.kind, N)) if j == seat else of_expert[i, j] for j in range(N)]
            actions = np.array([d.action for d in played])
            efficiency = strategic_efficiency(state, seat, actions)
            belief = belief_accuracy(decision, state, seat, actions)
            s = row = None
            if state.kind == "G":
                expert_NN = actions.copy()
                expert_NN[seat] = of_expert[i, seat].action
                s = graph_score(decision, Target("G", seat, state.game.caps[seat], expert_NN))
                row = accuracy(decision.action, expert_NN[seat], seat) if decision else 0.0
            turns[i].append(Turn(state.round, state.kind, text, decision, s, row, efficiency, belief))
            for j in range(N):
                past[i][j].append(text if j == seat else of_expert[i, j])
            states[i] = state.step(actions)
    welfares = [[float(pay.sum()) for _, _, pay in s.round_results()] for s in states]
    return [Played(g, t, w) for g, t, w in zip(instances, turns, welfares)]


# ---------------------------------------------------------------------------------------------------------------------
# results


def mean_interval(values) -> dict:
    """Mean and 95 % t interval over instances; nan and None are left out."""
    x = np.array([v for v in values if v is not None and not math.isnan(v)], float)
    if len(x) == 0:
        return {"mean": None, "low": None, "high": None, "n": 0}
    half = _t95(len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan
    low, high = (None, None) if math.isnan(half) else (float(x.mean() - half), float(x.mean() + half))
    return {"mean": float(x.mean()), "low": low, "high": high, "n": len(x)}


def _t95(df: int) -> float:
    """The 0.975 quantile of Student's t (a table below 10 degrees of freedom, then the Cornish-Fisher expansion)."""
    table = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 6: 2.4469, 7: 2.3646, 8: 2.3060, 9: 2.2622}
    if df in table:
        return table[df]
    z = 1.959964
    return (
        z
        + (z**3 + z) / (4 * df)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * df**3)
    )


def wilson_interval(successes: int, n: int) -> dict:
    """Share and 95 % Wilson interval."""
    z = 1.959964
    share = successes / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return {"mean": share, "low": max(0.0, centre - half), "high": min(1.0, centre + half), "n": n}


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def per_instance(played: Played, rounds: int | None = None) -> dict:
    """The metrics of one game, over its first `rounds` rounds."""
    rounds = rounds or played.game.rounds
    turns = [t for t in played.turns if t.round <= rounds]
    first_best, empty = welfare_bounds(played.game)
    W = float(np.mean(played.welfares[:rounds]))
    gain = (W - empty) / (first_best - empty) if first_best - empty > 1e-9 else None
    ok = [t for t in turns if t.decision is not None]
    return {
        "U1": len(ok) / len(turns),
        "s": float(np.mean([t.s for t in turns if t.kind == "G"])),
        "row": float(np.mean([t.row for t in turns if t.kind == "G"])),
        "U2": float(np.mean([t.U2 for t in turns])),
        "U3": W / first_best,
        "U3 gain": gain,
        "belief": float(np.mean([t.belief for t in turns])),
        "U2 | ok": _mean([t.U2 for t in ok]),
        "U3 | ok": W / first_best if len(ok) == len(turns) else None,
        "U2 graph": float(np.mean([t.U2 for t in turns if t.kind == "G"])),
        "U2 effort": float(np.mean([t.U2 for t in turns if t.kind == "E"])),
    }


def summarise(games_played: list[Played]) -> dict:
    """{"all rounds" | "round 1": {metric: mean and interval}, "games": {game and stages: the same}, "instances": per
    instance, "replies": of some games, evenly spread}."""

    def table(rows, decisions):
        out = {m: mean_interval([row[m] for row in rows]) for m in rows[0] if m != "U1"}
        return {"U1": wilson_interval(sum(d is not None for d in decisions), len(decisions))} | out

    rows = [per_instance(p) for p in games_played]
    first = [per_instance(p, 1) for p in games_played]
    parts: dict[str, list[int]] = {}
    for i, p in enumerate(games_played):
        parts.setdefault(f"{p.game.name.upper()}-{p.game.stages}", []).append(i)

    def table_of(part):
        return table([rows[i] for i in part], [t.decision for i in part for t in games_played[i].turns])

    return {
        "all rounds": table(rows, [t.decision for p in games_played for t in p.turns]),
        "round 1": table(first, [t.decision for p in games_played for t in p.turns if t.round == 1]),
        "games": {label: table_of(part) for label, part in parts.items()},
        "instances": [{"instance": p.game.to_json()} | row for p, row in zip(games_played, rows)],
        "replies": [[t.reply for t in p.turns] for p in games_played[:: max(1, len(games_played) // 10)]],
    }


def paired_difference(a: dict, b: dict, metric: str) -> dict:
    """a - b of two summaries over the same instances: mean and interval of the differences."""
    pairs = [(x[metric], y[metric]) for x, y in zip(a["instances"], b["instances"])]
    return mean_interval([x - y for x, y in pairs if x is not None and y is not None])


def format_table(tables: dict[str, dict]) -> str:
    """One line per policy: mean [low, high] of every metric. tables: {policy: {metric: mean and interval}}."""

    def cell(v):
        if v["mean"] is None:
            return "-"
        return f"{v['mean']:.3f}" + (f" [{v['low']:.2f}, {v['high']:.2f}]" if v["low"] is not None else "")

    rows = [["policy", *METRICS]]
    rows += [[name, *(cell(table[m]) for m in METRICS)] for name, table in tables.items()]
    widths = [max(map(len, column)) + 2 for column in zip(*rows)]
    return "\n".join("".join(text.ljust(w) for text, w in zip(row, widths)).rstrip() for row in rows)


def report(results: dict[str, dict], rounds: int) -> str:
    """The tables that are printed, and the paired differences of the first row to every other."""
    first, *others = results
    text = format_table({name: summary["all rounds"] for name, summary in results.items()})
    if rounds > 1:
        text += "\n\nround 1 alone\n" + format_table({name: summary["round 1"] for name, summary in results.items()})
    labels = results[first]["games"]
    for label in labels if len(labels) > 1 else ():
        text += f"\n\n{label} alone\n" + format_table({name: summary["games"][label] for name, summary in results.items()})
    differences = {
        name: {metric: paired_difference(results[first], results[name], metric) for metric in COMPARED} for name in others
    }
    return text + f"\n\n{first} minus the others, paired by instance:" + _difference_lines(differences)


def _difference_lines(differences: dict[str, dict[str, dict]]) -> str:
    text = ""
    for name, of_metric in differences.items():
        line = f"\n  - {name}: ".ljust(max(map(len, differences)) + 7)
        for metric, d in of_metric.items():
            interval = f" [{d['low']:+.3f}, {d['high']:+.3f}]" if d["low"] is not None else ""
            line += f"{metric} {d['mean']:+.3f}{interval}".ljust(30)
        text += line.rstrip()
    return text


def report_seeds(runs: list[dict[str, dict]]) -> str:
    """The same of several runs that differ in their training seed: means over runs with 95 % t intervals over the runs'
    means, so they speak of training, not of one adapter. runs: the results of each."""
    names = [name for name in runs[0] if all(name in run for run in runs)]
    first, *others = names

    def over_runs(value):
        return mean_interval([value(run)["mean"] for run in runs])

    table = {name: {m: over_runs(lambda run: run[name]["all rounds"][m]) for m in METRICS} for name in names}
    differences = {
        name: {m: over_runs(lambda run: paired_difference(run[first], run[name], m)) for m in COMPARED} for name in others
    }
    text = f"{len(runs)} runs: means and 95 % t intervals over the means of the runs\n\n" + format_table(table)
    return text + f"\n\n{first} minus the others, paired by instance within each run:" + _difference_lines(differences)


# ---------------------------------------------------------------------------------------------------------------------
# command line


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("evaluation")
    group.add_argument("--eval-agents", type=positive_int, default=4, help="agents of the evaluation games")
    group.add_argument("--eval-games", type=positive_int, default=60, help="games of the grid (evenly spread; 60 = all)")
    group.add_argument("--eval-temperature", type=number(float, 0), default=1.0, help="0 is greedy; 1 is the law that is trained")
    group.add_argument("--max-new-tokens", type=positive_int, help="longest reply (default: 20 + 7 N)")
    group.add_argument("--eval-seed", type=seed_int, default=0, help="of sampling and expert draws in evaluation")


def held_out_instances(args) -> list[Game]:
    if not 3 <= args.eval_agents <= games.MAX_AGENTS or not 0 <= args.seat < args.eval_agents:
        raise InputError(f"--eval-agents must be 3 to {games.MAX_AGENTS}, and --seat one of 0 to agents - 1")
    grid = [game for family in families(args) for game in held_out_grid(args.eval_agents, family)]
    chosen = np.linspace(0, len(grid) - 1, min(args.eval_games, len(grid))).round().astype(int)
    return [grid[i] for i in chosen]


def evaluate(args, make_player, label: str) -> dict:
    """The summary of one kind of player on the held-out games of these arguments."""
    instances, others = held_out_instances(args), experts.expert_of(args)
    played: dict[int, Played] = {}
    for stages in dict.fromkeys((g.stages, g.rounds) for g in instances):
        part = [i for i, g in enumerate(instances) if (g.stages, g.rounds) == stages]
        of_part = play([instances[i] for i in part], make_player(), args.seat, others, args.eval_seed, label)
        played |= zip(part, of_part)
    return summarise([played[i] for i in range(len(instances))])


def evaluate_policy(args, policy: Policy, label: str) -> dict:
    settings = experts.style_of(args), args.max_new_tokens, args.eval_temperature, args.eval_seed
    return evaluate(args, lambda: policy_player(policy, *settings), label)


def evaluate_expert(args, name: str) -> dict:
    expert, style = experts.expert_of(args, name), experts.style_of(args)
    return evaluate(args, lambda: expert_player(expert, style, args.eval_seed), f"expert:{name}")


def read_results(path: str) -> dict[str, dict]:
    """The results in an eval.json. Raises InputError."""
    try:
        results = read_json(path)["results"]
        for summary in results.values():
            summary["instances"], [summary["all rounds"][m]["mean"] for m in METRICS]
    except (TypeError, KeyError, AttributeError):
        raise InputError(f"{path} is not an eval.json of this version; give those that train_rft.py or --json wrote") from None
    return results


@reports_errors
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description="Play held-out games with policies in a seat against experts.")
    add_model_arguments(parser)
    experts.add_style_arguments(parser)
    add_eval_arguments(parser)
    parser.add_argument("--policy", nargs="+", default=["base"], help="base, an adapter folder, or expert:NAME")
    parser.add_argument("--json", metavar="FILE", help="write the results, per instance too, to a new file")
    parser.add_argument("--seeds", nargs="+", metavar="EVAL_JSON", help="play nothing: combine these runs' eval.json")
    ranks.start()
    args = parser.parse_args(argv)
    if args.seeds:
        runs = [read_results(path) for path in args.seeds]
        played = [[i["instance"] for i in next(iter(run.values()))["instances"]] for run in runs]
        for path, of_run, run in zip(args.seeds, played, runs):
            if of_run != played[0]:
                raise InputError(f"{path} was played on other games than {args.seeds[0]}; give runs with the same flags")
            if list(run)[0] != list(runs[0])[0]:
                raise InputError(f"{path} is a run of {list(run)[0]}, {args.seeds[0]} of {list(runs[0])[0]}; give one kind")
        print(report_seeds(runs))
        return
    if args.json:
        refuse_existing(args.json)
    held_out_instances(args)  # complains about its flags before a model is loaded
    names = [*args.policy, f"expert:{args.expert}", "expert:random"]
    for name in names:
        if name.startswith("expert:"):
            experts.expert_of(args, name.removeprefix("expert:"))
        elif name != "base" and not Path(name).is_dir():
            raise InputError(f"--policy {name}: neither base, nor expert:NAME, nor an adapter folder")
    names = list(dict.fromkeys(names))
    adapters = [name for name in names if name != "base" and not name.startswith("expert:")]
    if adapters or "base" in names:
        policy = load_policy_of_rank(args)
    for name in adapters:  # a wrong one is found before the first game, not after the last
        put_adapter(policy, name)
        lora.remove(policy.model)
    results = {}
    for name in names:
        if name.startswith("expert:"):
            results[name] = evaluate_expert(args, name.removeprefix("expert:"))
        elif name == "base":
            results[name] = evaluate_policy(args, policy, name)
        else:
            put_adapter(policy, name)
            results[name] = evaluate_policy(args, policy, name)
            lora.remove(policy.model)
    print(report(results, args.rounds))
    llm_experts.print_report()
    if args.json and ranks.first():
        write_json(args.json, {"arguments": vars(args), "results": results})
        print(f"\nwritten: {args.json}")


if __name__ == "__main__":
    main()
