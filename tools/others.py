"""Does a player read the others? Seven questions, with exact players as floor and ceiling.

    python -m tools.others --policy base runs/tompo/sft/adapter runs/tompo/adapter --rounds 3 \\
        --partners second-best always-link never-link selfish --fix c=0.12 fee=1 --unmet reciprocal

The player has one seat of every held-out game, and its own history; partners with drawn rules have the other
seats, so that from round 2 on it depends on what those did before which links pay. Values are means over
games with 95 % t intervals. Floor: `constant`, the best row that is the same everywhere, and `second-best`,
which looks at types alone. Ceiling: `best-reply` to the last round, `bayes`, which knows the list of rules,
and `oracle`, which knows what the others choose (tools/readers.py). Questions that are asked again in another
form have the same random numbers. A reply that is not compliant plays no links.

    python -m tools.others --seeds results/others/seed*.json      # of --json: several training seeds
"""

import run.threads  # isort: skip  # noqa: F401 (before torch: how idle threads wait)
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product

import numpy as np

import settings as flags
from decisions import LINKS, own_rows
from eval import instances, make_cast, play_held_out, playing_parser
from experts import Expert
from games import State
from play import human
from play.cast import Partners, make_expert
from play.intervals import UNKNOWN, mean_interval
from play.metrics import Episode, Turn
from play.players import Ask, Player, expert_player
from play.report import format_table
from prompts import PromptStyle, format_reply, messages, news, observe, parse_reply, read_belief
from run import ranks
from run.curves import png
from run.errors import InputError, library_errors, reports_errors
from run.files import read_json, refuse_existing, write_atomic, write_json
from run.seeds import Stream, numpy_generator
from settings import Settings
from tools.page.text import rounded
from tools.readers import NO_DRAWS, BestReply, Constant, Halves, best_row, exact_players, worth

DRAWS = 3  # random first rounds of each game, for questions 3 and 4
SWITCHES = "switch:always-link:never-link", "switch:never-link:always-link"  # question 5, in 6 rounds
MAX_AGENTS = 6  # `bayes` enumerates what all others may do together
TITLES = {
    "1": "U2 of links; placebo: after the history of another game; lost: by it, mean of\n"
    "   rounds 2 to T; gained: that mean above round 1",
    "2": "share of the others with this rule who are treated as the best reply treats them",
    "3": "share of decisions about j in round 2 that change with whether j chose the player in round 1;\n"
    "   a: the best reply to round 1 changes, too, b: it does not; follows: toward it - away from it",
    "4": "after a forced Belief line in round 2: entries of the decision that equal it, and U2",
    "5": "U2 of links where all others switch between always-link and never-link after round 3",
    "6": "as 2, of a rule that is not one of --partners",
    "7": "Brier score of the Belief lines, and U2 of the best reply to them; unread: share without a belief",
}
# The settings in which files that are combined must not differ.
SAME = "game stages rounds types fix partners unmet agents seat eval_games eval_temperature".split()
SAME += "information belief hints think".split()
Cell = dict  # that of mean_interval, and its values in "games"; over several runs, the means of the runs
Make = Callable[[], Player]  # a new player


class Play:
    """Held-out games of these settings, with `others`, who draw nothing, in all seats but the player's."""

    def __init__(self, settings: Settings, others: Expert):
        self.settings, self.others, self.style = settings, others, settings.players.style
        self.seat, self.seed = settings.evaluation.seat, settings.evaluation.seed
        self.games = instances(settings.games, settings.evaluation)

    def player(self, expert: Expert) -> Make:
        return lambda: expert_player(expert, self.style, self.seed)

    def played(self, name: str, make: Make) -> list[Episode]:
        return play_held_out(self.settings, self.seat, {True: make, False: self.player(self.others)}, [name])

    def actions(self, state: State, own) -> np.ndarray:
        """Those of all agents, where the player does `own`."""
        seats = range(state.game.N)
        return np.array([own if j == self.seat else self.others(state, j, NO_DRAWS).action for j in seats])


def rows_of(player: Player, asks: list[Ask]) -> list[np.ndarray]:
    """What the player chooses in each of these decisions about links, (N,)."""
    decisions = [parse_reply(text, ask.state, ask.seat) for text, ask in zip(player(asks), asks, strict=True)]
    return [(d or LINKS.fallback(ask.state.game.N)).action for d, ask in zip(decisions, asks, strict=True)]


def cell(values: Iterable[float | None]) -> Cell:
    values = [None if v is None else float(v) for v in values]
    return mean_interval(values) | {"games": values}


def link_turns(played: Episode) -> list[Turn]:
    return [turn for turn in played.turns if turn.state.kind is LINKS]


def by_round(played: list[Episode], value: Callable[[Turn], float | None], name="round") -> dict[str, Cell]:
    rounds = range(played[0].game.rounds)
    return {f"{name} {r + 1}": cell(value(link_turns(p)[r]) for p in played) for r in rounds}


# -------------------- questions 1, 2, 6 and 7: plays


def with_other_history(ask: Ask, other: Ask, style: PromptStyle) -> Ask:
    """The same question after the history of another game: all messages between the system message and this
    question, and the news at its head, are of the other game."""
    system = messages(ask.state, ask.seat, ask.replies, style)[0]
    between = messages(other.state, other.seat, other.replies, style)[1:-1]
    seen, there = (observe(a.state, a.seat, style.information) for a in (ask, other))
    last = {"role": "user", "content": news(there) + seen.kind.question(seen, style)}
    return replace(ask, state=State(ask.state.game, other.state.history), chat=[system, *between, last])


def regret(play: Play, make: Make, played: list[Episode]) -> dict[str, Cell]:
    columns, lost = by_round(played, lambda turn: turn.U2), []
    for r in range(1, played[0].game.rounds):
        turns = [link_turns(p)[r] for p in played]
        before = [played[k].turns[: len(turn.state.history)] for k, turn in enumerate(turns)]
        asks = [Ask(k, t.state, t.seat, [b.reply for b in before[k]]) for k, t in enumerate(turns)]
        half = len(asks) // 2  # games of other types
        changed = [with_other_history(ask, asks[k - half], play.style) for k, ask in enumerate(asks)]
        rows = rows_of(make(), changed)
        values = [worth(t.state, t.seat, t.actions, row_N) for t, row_N in zip(turns, rows, strict=True)]
        columns[f"placebo {r + 1}"] = cell(values)
        lost.append([turn.U2 - value for turn, value in zip(turns, values, strict=True)])
    later = [np.mean([turn.U2 for turn in link_turns(p)[1:]]) - link_turns(p)[0].U2 for p in played]
    return columns | {"lost": cell(np.mean(lost, 0)), "gained": cell(later)}


def by_rule(others: Partners, played: list[Episode], rule: str) -> dict[str, Cell]:
    """Share of the others with this rule whom the player treats as the best reply does."""

    def share(turn: Turn) -> float | None:
        right_N = turn.actions[turn.seat] == best_row(turn.state, turn.seat, [turn.actions])
        seats = [j for j in range(len(right_N)) if others.rule(turn.state.game, j).name == rule]
        right = [right_N[j] for j in seats if j != turn.seat]
        return np.mean(right) if right else None

    return by_round(played, share)


def beliefs(played: list[Episode]) -> dict[str, Cell]:
    def stated(turn: Turn) -> np.ndarray | None:
        return read_belief(turn.reply, LINKS, turn.seat, turn.state.game.N)

    def brier(turn: Turn) -> float | None:
        belief_N, true_N = stated(turn), turn.actions[:, turn.seat]
        return None if belief_N is None else ((belief_N - true_N) ** 2).sum() / (len(true_N) - 1)

    def best(turn: Turn) -> float | None:
        """U2 of the best reply to the belief, and to what the others really choose among themselves."""
        belief_N, believed_NN = stated(turn), turn.actions.copy()
        if belief_N is None:
            return None
        believed_NN[:, turn.seat] = belief_N
        return worth(turn.state, turn.seat, turn.actions, best_row(turn.state, turn.seat, [believed_NN]))

    unread = cell(np.mean([stated(turn) is None for turn in link_turns(p)]) for p in played)
    return by_round(played, brier, "Brier") | by_round(played, best, "U2") | {"unread": unread}


# -------------------- questions 3 and 4: decisions in round 2, of which nothing is the player's own


def second_rounds(play: Play) -> list[Ask]:
    """DRAWS decisions about links in round 2 of each game, in which the player's seat was random before."""
    asks = []
    for (k, game), draw in product(enumerate(play.games), range(DRAWS)):
        state, replies = State(game), []
        while state.round == 1:
            rng = numpy_generator(play.seed, Stream.OTHERS, k, draw, len(state.history))
            own = state.kind.random(game, play.seat, rng)
            replies.append(format_reply(own, play.style))
            state = state.step(play.actions(state, own.action))
        asks.append(Ask(k, state, play.seat, replies))
    return asks


def flipped(ask: Ask, j: int) -> Ask:
    """The same decision after a round 1 in which only one thing was otherwise: whether agent j chose the
    player."""
    proposals_NN, *later = ask.state.history
    changed_NN = proposals_NN.copy()
    changed_NN[j, ask.seat] = 1 - changed_NN[j, ask.seat]
    return replace(ask, state=State(ask.state.game, (changed_NN, *later)))


def flips(asks: list[Ask]) -> dict[tuple[int, int], bool]:
    """The pairs of question 3, (k, j): a. They are the k-th decision and the flipped one, for every agent j
    that the player did not choose in round 1. a: whether the best reply to round 1 chooses j in only one of
    the two."""
    pairs = {}
    for k, ask in enumerate(asks):
        for j in np.flatnonzero(ask.state.history[0][ask.seat] == 0).tolist():
            if j != ask.seat:
                both = (BestReply()(x.state, ask.seat, NO_DRAWS).action[j] for x in (ask, flipped(ask, j)))
                pairs[k, j] = len(set(both)) == 2
    return pairs


def ratio(values_P: np.ndarray, game_P: np.ndarray, games: int) -> np.ndarray:
    """(games,) numbers whose mean is the mean of all values, and whose spread is right for an interval over
    games, of which each has none, one or many of the values (linearised); nan without values."""
    if not len(values_P):
        return np.full(games, np.nan)
    sums, counts = np.bincount(game_P, values_P, games), np.bincount(game_P, minlength=games)
    return values_P.mean() + (sums - values_P.mean() * counts) / counts.mean()


def counterfactual(player: Player, asks: list[Ask], pairs: dict[tuple[int, int], bool]) -> dict[str, Cell]:
    """The player reads each decision, and then again with one agent flipped; where there is no such pair, it
    is only asked again, so that it always continues the same conversations."""
    before, after = rows_of(player, asks), {}
    for j in sorted({j for _, j in pairs}):
        asked = [flipped(ask, j) if (k, j) in pairs else ask for k, ask in enumerate(asks)]
        after[j] = rows_of(player, asked)
    games, step_P = asks[-1].game + 1, []
    for k, j in pairs:  # how the decision about j changes with j's choice
        sign = -1 if asks[k].state.history[0][j, asks[k].seat] else 1
        step_P.append(sign * (int(after[j][k][j]) - int(before[k][j])))
    step_P = np.array(step_P)
    game_P, a_P = np.array([(asks[k].game, a) for (k, _), a in pairs.items()]).T
    a, b = (ratio(abs(step_P)[a_P == k], game_P[a_P == k], games) for k in (1, 0))
    follows = ratio(step_P[a_P == 1], game_P[a_P == 1], games)
    return {"a": cell(a), "b": cell(b), "a - b": cell(a - b), "a: follows": cell(follows)}


def after_beliefs(play: Play, player: Player, asks: list[Ask]) -> dict[str, Cell]:
    """Forced are: by whom the player is really chosen, the opposite, and what is true in another game."""
    others, half, columns = np.arange(play.games[0].N) != play.seat, len(play.games) // 2 * DRAWS, {}
    really = [play.actions(ask.state, np.zeros(len(others), int)) for ask in asks]
    true = np.array([actions_NN[:, play.seat] for actions_NN in really])
    for name, forced in {
        "true": true,
        "opposite": others * (1 - true),
        "other": np.roll(true, half, 0),
    }.items():
        begins = [f"Belief: {LINKS.write_belief(belief_N)}\nDecision:" for belief_N in forced]
        rows = rows_of(player, [replace(ask, begin=begin) for ask, begin in zip(asks, begins, strict=True)])
        equal = (np.array(rows) == forced)[:, others].mean(1)
        earned = [worth(a.state, a.seat, *given) for a, *given in zip(asks, really, rows, strict=True)]
        for label, values in (("equal", equal), ("U2", earned)):
            columns[f"{name}: {label}"] = cell(np.reshape(values, (-1, DRAWS)).mean(1))
    return columns


# -------------------- several seeds, and the command


def over_seeds(paths: list[str]) -> dict[str, dict]:
    """The tables of several files of --json, which differ in the seed of their policies: means over the means
    of the files that have the question, with intervals over files. The k-th policies of all files belong
    together, under the name that the first file has for them. Raises InputError for files of different kinds.
    """
    runs, asked, counts = [], [], {}
    for path in paths:
        with library_errors(f"{path} is no file that --json wrote"):
            written = read_json(path)
            runs.append(written["questions"])
            asked.append({name: written["arguments"].get(name) or None for name in SAME})
            for rows in runs[-1].values():
                [cell["mean"] for columns in rows.values() for cell in columns.values()]
            [columns["lost"] for columns in runs[-1]["1"].values()]
        for question, rows in runs[-1].items():
            if len(rows) != counts.setdefault(question, len(rows)):
                raise InputError(f"{path} and {paths[0]} are not of as many policies")
        if other := [name for name in SAME if asked[-1][name] != asked[0][name]]:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in other)
            raise InputError(f"{path} and {paths[0]} differ in {flags}")
    tables: dict[str, dict] = {}
    for question in sorted(counts, key=lambda question: question[0]):  # the first file may lack some
        having = [run[question] for run in runs if question in run]
        tables[question] = {}
        for name, *rows in zip(having[0], *(questions.values() for questions in having), strict=True):
            columns = {column: [row.get(column, UNKNOWN)["mean"] for row in rows] for column in rows[0]}
            tables[question][name] = {column: cell(means) for column, means in columns.items()}
    return tables


def draw(tables: dict[str, dict]) -> bytes:
    """U2 of links by round as PNG, of tables of `over_seeds`: of a policy the mean and, thin, its runs;
    dashed, the mean after the history of another game; dotted, exact players, which no run changes."""
    from matplotlib.figure import Figure  # it needs no screen

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axis = figure.subplots()

    def line(columns: dict, word: str, run: int | None = None, **look):
        """The mean of the runs, or one of them."""
        cells = {int(c.split()[1]): cell for c, cell in columns.items() if c.startswith(word)}
        values = [cell["mean"] if run is None else cell["games"][run] for cell in cells.values()]
        axis.plot(list(cells), values, **look)

    for k, (name, columns) in enumerate(tables["1"].items()):
        color, runs = f"C{k}", columns["round 1"]["games"]
        if len(runs) > 1 and max(runs) == min(runs):
            line(columns, "round", label=name, ls=":", marker=".", color=color)
            continue
        for seed in range(len(runs)):
            line(columns, "round", seed, alpha=0.4, lw=0.8, color=color)
        line(columns, "round", label=name, marker="o", lw=2, color=color)
        line(columns, "placebo", ls="--", marker="o", lw=2, color=color)
    axis.set(xlabel="round", ylabel="U2 of links", ylim=(0, 1.02))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=9)
    return png(figure, dpi=120)


def means_of(tables: dict) -> dict:
    """The tables without the values of each game, with four digits."""
    if "games" in tables:
        return rounded({key: value for key, value in tables.items() if key != "games"}, 4)
    return {key: means_of(value) for key, value in tables.items()}


def print_tables(tables: dict[str, dict], runs: bool = False) -> None:
    for question, rows in tables.items():
        columns = list(max(rows.values(), key=len)) or ["no language model"]
        n = max((cell["n"] for row in rows.values() for cell in row.values()), default=0)
        over = f" ({n} runs)" if runs else ""
        print(f"\n{question}{over}: {TITLES[question[0]]}\n{format_table(rows, columns)}")


def best_constant(play: Play) -> np.ndarray:
    def mean(row_N: np.ndarray) -> float:
        played = play.played("constant", play.player(Constant(row_N)))
        return float(np.mean([turn.U2 for p in played for turn in link_turns(p)]))

    return max(own_rows(play.games[0].N, play.seat), key=mean)


def answers(plays: dict[str, Play], makers: dict[str, Make], name: str, is_exact, asks, pairs) -> dict:
    """{question: {column: cell}} of one player. makers: for each play; asks, pairs: of questions 3 and 4
    (not asked if empty), which one player is asked, so that a policy reads their conversations
    once. An exact one has no reply that could be forced to begin with a belief."""
    play, make = plays["main"], makers["main"]
    played = {key: own.played(name, makers[key]) for key, own in plays.items()}
    tables = {"1": regret(play, make, played["main"])}
    for rule in dict.fromkeys(rule.name for rule in play.others.rules):
        tables[f"2 {rule}"] = by_rule(play.others, played["main"], rule)
    if asks:
        player = make()
        tables["3"] = {} if name == "oracle" else counterfactual(player, asks, pairs)
        tables["4"] = {} if is_exact else after_beliefs(play, player, asks)
    if "switching" in plays:
        tables["5"] = by_round(played["switching"], lambda turn: turn.U2)
    if "unmet" in plays:
        others, rule = plays["unmet"].others, plays["unmet"].others.rules[-1].name
        tables[f"6 {rule}"] = by_rule(others, played["unmet"], rule)
    return tables | {"7": beliefs(played["main"])}


def check(args) -> None:
    """Raises InputError for flags with which the questions make no sense."""
    for name in filter(None, [*(args.partners or ()), args.unmet]):
        if {"random", "noisy", "openai", "hf", "self"} & set(name.split(":")):
            raise InputError(f"{name}: the others must follow rules that draw nothing, see experts.py")
    if not args.partners or args.unmet in args.partners:
        raise InputError("give the rules of the others as --partners, and as --unmet none of them")
    if len(args.game) > 1 or len(args.stages) > 1 or args.stages[0].rfind("G"):
        raise InputError("give one --game, and one string of --stages with its only G at the beginning")
    if args.rounds < 2 or args.agents > MAX_AGENTS:
        raise InputError(f"the questions need --rounds from 2, and --agents to {MAX_AGENTS}")
    if not args.belief or human.NAME in args.policy:
        raise InputError("the questions need Belief lines (no --no-belief) and are too many for a human")


@reports_errors
def main(argv=None) -> None:
    parser = playing_parser("Does a player read the others?")
    add = parser.add_argument
    add("--policy", nargs="+", default=["base"], help="as in eval.py")
    add("--unmet", metavar="EXPERT", help="question 6: a rule that was not met in training")
    add("--quick", action="store_true", help="leave out questions 3, 4 and 5, which take the most time")
    add("--json", metavar="FILE", help="write means and intervals to a new file")
    add("--seeds", nargs="+", metavar="FILE", help="play nothing: combine files of --json")
    add("--figure", metavar="PNG", help="with --seeds: draw U2 by round")
    ranks.start()
    args = parser.parse_args(argv)
    if args.figure and not args.seeds:
        raise InputError("--figure goes with --seeds")
    if args.seeds and args.json:
        raise InputError("--seeds reads files of --json and writes none: leave out --json")
    if args.seeds:
        print(f"{len(args.seeds)} runs: means and 95 % t intervals over the means of the runs")
        print_tables(tables := over_seeds(args.seeds), runs=True)
        if args.figure:
            write_atomic(args.figure, draw(tables))
        return
    if args.json:
        refuse_existing(args.json)
    check(args)
    settings = flags.resolve(args)
    play, rules = Play(settings, settings.players.partners), settings.players.partners.rules
    if len(play.games) < 2:
        raise InputError("the placebo needs another game: these flags leave only one")
    plays = {"main": play}
    if not args.quick:
        halves = Halves(play.games, *map(make_expert, SWITCHES))
        plays["switching"] = Play(replace(settings, games=replace(settings.games, rounds=6)), halves)
    if args.unmet:
        plays["unmet"] = Play(settings, Partners([*rules, make_expert(args.unmet)]))
    asks = [] if args.quick else second_rounds(play)
    pairs, cast, row_N, tables = flips(asks), make_cast(settings, args.policy), best_constant(play), {}
    exact = {key: exact_players(row_N, rules, own.others) for key, own in plays.items()}
    for name in (*cast, *exact["main"]):
        makers = {key: cast.get(name) or own.player(exact[key][name]) for key, own in plays.items()}
        is_exact = name not in cast or name.startswith("expert:")
        for question, columns in answers(plays, makers, name, is_exact, asks, pairs).items():
            tables.setdefault(question, {})[name] = columns
    others, a = ", ".join(args.partners), sum(pairs.values())
    print(f"{len(play.games)} games of {args.agents}, the player in seat {args.seat}, among {others}")
    if asks:
        print(f"pairs of question 3: {a} in a, {len(pairs) - a} in b")
    print_tables(tables)
    if args.json and ranks.first():
        write_json(args.json, {"arguments": settings.flags, "questions": means_of(tables)})
        print(f"\nwritten: {args.json}")


if __name__ == "__main__":
    main()
