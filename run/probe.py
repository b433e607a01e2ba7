"""The probe: a fixed set of held-out prompts that the policy answers every few steps of SFT and RFT.

Every training batch has other prompts, so its rewards mostly show which prompts were drawn. The probe asks
the same questions each time with the same uniform random numbers (those of the run's seed, so that over seeds
their luck averages out), and changes nothing in training. Its levels (the expert's, random play's, the best
constant answer's) say what a value is worth.
"""

from pathlib import Path

import numpy as np

from experts import make_expert
from games import State, own_rows
from play.metrics import measured, strategic_efficiency
from policy import Policy
from prompts import Decision, fallback, format_reply, messages, parse_reply, reply_tokens
from rewards import Target
from run import checkpoint, dataset, ranks
from run.curves import plot_curves
from run.files import JsonLines
from world.draws import families, held_out_grid

FILE = "probe.jsonl"
GAMES = 20  # of the evaluation's held-out grid, evenly spread
EFFORTS = 4  # of every so many of them the efforts too: SFT already knows those, and a reply costs time
KEYS = ("U1", "row", "s", "U2", "belief")


def probe_targets(args) -> list[tuple[Target, list[dict]]]:
    """The decisions of one seat in held-out games among experts, and their prompts. Before each of them
    everybody, the seat too, has played the expert's decisions. For exact experts."""
    N, seat = args.agents[0], args.seat if isinstance(args.seat, int) else 0
    grid = [game for family in families(args) for game in held_out_grid(N, family)]
    chosen = [grid[i] for i in np.linspace(0, len(grid) - 1, min(GAMES, len(grid))).round().astype(int)]
    expert, style, found = dataset.expert_of(args), dataset.style_of(args), []
    for index, game in enumerate(chosen):
        state, replies = State(game), []
        while not state.done:
            rngs = [np.random.default_rng([0, 11, index, i, len(state.history)]) for i in range(N)]
            decisions = [expert(state, i, rng) for i, rng in enumerate(rngs)]
            target = Target(state, seat, np.array([d.action for d in decisions]))
            if target.kind == "G" or index % EFFORTS == 0:
                found.append((target, messages(state, seat, replies, style)))
            replies.append(format_reply(decisions[seat], style))
            state = state.step(target.actions)
    return found


def measure(decisions: list[Decision | None], targets: list[Target]) -> dict[str, float]:
    """The metrics of play/metrics.py, of decisions in the expert's games; one that is not compliant plays
    nothing."""
    values: dict[str, list[float]] = {key: [] for key in KEYS}
    for decision, target in zip(decisions, targets):
        actions = target.with_own(decision or fallback(target.kind, target.game.N))
        found = measured(decision, target.state, target.seat, actions, target.actions)
        for key, value in (found | {"U1": decision is not None}).items():
            if value is not None:
                values[key].append(value)
    return {key: float(np.mean(v)) for key, v in values.items()}


def levels(targets: list[Target]) -> dict[str, dict[str, float | None]]:
    """By name, what others reach on the same prompts: the expert, random play (mean of 20 draws), and of each
    metric the best answer that is the same everywhere (graph decisions: a row; effort decisions: an expert's
    effort)."""
    expert = [
        Decision(t.kind, t.actions[t.seat], t.actions[:, t.seat] if t.kind == "G" else t.actions)
        for t in targets
    ]
    rng, play = np.random.default_rng(0), make_expert("random")
    drawn = [measure([play(t.state, t.seat, rng) for t in targets], targets) for _ in range(20)]
    graph, effort = ([t for t in targets if t.kind == kind] for kind in "GE")
    rows = own_rows(targets[0].game.N, targets[0].seat)
    of_row = [measure([Decision("G", row)] * len(graph), graph) for row in rows]
    efforts = sorted({float(t.actions[t.seat]) for t in effort})
    of_effort = [
        np.mean(
            [strategic_efficiency(t.state, t.seat, t.with_own(Decision("E", min(x, t.cap)))) for t in effort]
        )
        for x in efforts
    ]
    constant = {key: max(m[key] for m in of_row) for key in ("row", "s")}
    best_U2 = max(m["U2"] for m in of_row) * len(graph) + max(of_effort, default=0.0) * len(effort)
    return {
        "expert": measure(expert, targets),
        "random play": {key: float(np.mean([m[key] for m in drawn])) for key in KEYS},
        "best constant answer": constant | {"U2": float(best_U2 / len(targets))},
    }


class Probe:
    """Asks the policy between the steps of a stage. RUN/probe.jsonl, shared by SFT and RFT, holds the levels,
    and a line for each time: the stage, how many of its steps are done, the seconds that its steps have
    taken, the values."""

    def __init__(self, args, policy: Policy, stage: str, steps: int, done: int):
        """steps: of the stage; done: how many a resumed stage has behind it."""
        self.policy, self.stage, self.folder, self.seed = policy, stage, Path(args.out), args.seed
        decisions = probe_targets(args)
        self.targets = [target for target, _ in decisions]
        self.prompts = [policy.encode_prompt(chat) for _, chat in decisions]
        given = getattr(args, "max_new_tokens", None)  # which train_sft.py has not
        self.limit = given or reply_tokens(max(t.game.N for t in self.targets))
        policy.check_length(max(map(len, self.prompts)), self.limit)
        self.at = {round(steps * k / args.probes) for k in range(1, args.probes + 1)}
        self.folder.mkdir(parents=True, exist_ok=True)
        before = lambda e: e.get("stage") != stage or (type(e.get("step")) is int and e["step"] <= done)
        self.log = JsonLines(self.folder / FILE, before, ranks.first())
        if not any("stage" in e for e in self.log.rows):  # else it begins with what the stage before ended in
            self.at.add(0)
        self.at -= {e["step"] for e in self.log.rows if e.get("stage") == stage}
        self.text = ""  # of the newest values, for the progress bar
        if ranks.first() and not self.log.rows:
            self.log.write({"levels": levels(self.targets)})

    def __call__(self, step: int, seconds: float) -> None:
        """Asks if it is time to, and was not asked before a resume."""
        if step not in self.at:
            return
        generator, mine = checkpoint.seeded(self.seed, 12), ranks.share(range(len(self.prompts)))
        groups = self.policy.sample(self.prompts, 1, self.limit, 1.0, generator, only=mine)
        texts = ranks.whole(mine, [group[0].text for group in groups])
        decisions = [parse_reply(text, *target.place) for text, target in zip(texts, self.targets)]
        values = measure(decisions, self.targets)
        self.text = f", probe: row {values['row']:.2f}, U2 {values['U2']:.2f}"
        if ranks.first():
            self.log.write({"stage": self.stage, "step": step, "seconds": round(seconds, 2)} | values)
            plot_curves(self.folder)
