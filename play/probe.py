"""The probe: a fixed set of held-out prompts that the policy answers every few steps of SFT and RFT.

Every training batch has other prompts, so its rewards mostly show which prompts were drawn. The probe asks
the same questions each time with the same uniform random numbers (those of the run's seed).
"""

from pathlib import Path

import numpy as np

from decisions import EFFORTS, LINKS, own_rows
from experts import Expert
from games import Decision
from play import dataset
from play.expert_games import simulate
from play.metrics import METRICS, Episode, Turn
from play.sampling import random_guesses, sample_texts
from policy import Policy
from prompts import PromptStyle, parse_reply
from rewards import Target
from run import ranks
from run.curves import plot_curves
from run.seeds import Stream, numpy_generator, torch_generator
from run.stage import Stage
from world.draws import Family, held_out_games

GAMES = 20  # of the evaluation's held-out grid, evenly spread; fewer where they have several rounds
EVERY = 4  # of every fourth game also decisions other than links: SFT knows them, and replies take time
KEYS = ("U1", "row", "s", "U2", "belief")


def probe_targets(
    families: tuple[Family, ...],
    N: int,
    seat: int,
    expert: Expert,
    style: PromptStyle,
    partners: Expert | None = None,
) -> list[tuple[Target, list[dict]]]:
    """The decisions of one seat in held-out games of N agents, and their prompts. Before each decision all
    agents, this seat too, have played the expert's decisions; with partners, these have played in the other
    seats, and this one at random, as in training. For exact experts."""
    games = held_out_games(families, N, max(1, GAMES // families[0].rounds))
    plays = [(k, game, numpy_generator(0, Stream.PROBE_GAMES, k)) for k, game in enumerate(games)]
    records = simulate(plays, expert, style, partners=partners, trained=[seat] * len(games))
    asked = dataset.targets(records, [r for r in records if r.seat == seat])
    return [(t, r.prompt) for r, t in asked if t.kind is LINKS or r.game % EVERY == 0]


def measure(decisions: list[Decision | None], targets: list[Target]) -> dict[str, float | None]:
    """The metrics of play/metrics.py, of decisions in the expert's games."""
    turns = []
    for decision, t in zip(decisions, targets, strict=True):
        actions = t.with_own(decision or t.kind.fallback(t.game.N))
        turns.append(Turn(t.state, t.seat, "", decision, decision, actions, t.actions))
    episode = Episode(targets[0].game, turns, [])
    return {key: METRICS[key](episode) for key in KEYS}


def levels(targets: list[Target]) -> dict[str, dict[str, float | None]]:
    """By name, what others reach on the same prompts, which tells how good a value is: the expert, random
    play (mean of 20 draws), and of each metric the best answer that is the same everywhere (link decisions: a
    row; effort decisions: one of the expert's efforts)."""
    expert = [t.kind.expert_decision(t.actions, t.game, t.seat) for t in targets]
    rng = np.random.default_rng(0)
    random_play = [measure([t.kind.random(t.game, t.seat, rng) for t in targets], targets) for _ in range(20)]
    graph, effort = ([t for t in targets if t.kind is kind] for kind in (LINKS, EFFORTS))
    rows = own_rows(targets[0].game.N, targets[0].seat)
    by_row = [measure([Decision(LINKS, row_N)] * len(graph), graph) for row_N in rows]
    by_effort = [
        measure([Decision(EFFORTS, min(x, t.cap)) for t in effort], effort)["U2"]
        for x in sorted({float(t.actions[t.seat]) for t in effort})
    ]
    constant = {key: max(values[key] for values in by_row) for key in ("row", "s", "U2")}
    total = constant["U2"] * len(graph) + max(by_effort, default=0.0) * len(effort)
    return {
        "expert": measure(expert, targets),
        "random play": {key: float(np.mean([values[key] for values in random_play])) for key in KEYS},
        "best constant answer": constant | {"U2": float(total / (len(graph) + len(effort)))},
    }


class Probe:
    """To be set as `stage.probe`. Asks the policy every `every` steps, at the end, and before the first step
    if no stage of the run was asked before. FOLDER/probe.jsonl, which the stages of a run share, holds the
    levels, and a line of values for each time."""

    def __init__(
        self, stage: Stage, name: str, every: int, policy: Policy, targets, style, folder: Path, seed: int
    ):
        """targets: as of `probe_targets`. Raises InputError if the model's context is too short for them."""
        self.stage, self.name, self.every, self.policy, self.folder = stage, name, every, policy, folder
        self.seed, self.targets = seed, [target for target, _ in targets]
        self.prompts = [policy.encode_prompt(chat) for _, chat in targets]
        self.guesses = random_guesses(policy, [(t.state, t.seat) for t in self.targets], style)
        self.limit = style.reply_limit(max(target.game.N for target in self.targets))
        policy.check_length(max(map(len, self.prompts)), self.limit)

        def is_done(row):  # also the lines of other stages
            return row.get("stage") != name or row["step"] <= stage.steps_done

        folder.mkdir(parents=True, exist_ok=True)
        self.log = stage.open_log("probe", is_done, folder)
        self.asked = {row["step"] for row in self.log.rows if row.get("stage") == name}
        if any("stage" in row for row in self.log.rows):
            self.asked.add(0)  # the stage before ended in the policy that this one begins with
        self.text = ""
        if ranks.first() and not self.log.rows:
            self.log.write({"levels": levels(self.targets)})

    def __call__(self, step: int, seconds: float) -> str:
        """Returns the newest values as text."""
        if step not in self.asked and (step % self.every == 0 or self.stage.finished):
            generator = torch_generator(self.seed, Stream.PROBE_REPLIES)
            texts = sample_texts(self.policy, self.prompts, self.guesses, self.limit, 1.0, generator)
            pairs = zip(texts, self.targets, strict=True)
            values = measure([parse_reply(text, t.state, t.seat) for text, t in pairs], self.targets)
            self.text = f", probe: row {values['row']:.2f}, U2 {values['U2']:.2f}"
            self.log.write({"stage": self.name, "step": step, "seconds": round(seconds, 2)} | values)
            if ranks.first():
                plot_curves(self.folder)
        return self.text
