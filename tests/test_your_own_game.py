"""What docs/your-own-game.md promises: a game and a reward term from outside are everywhere at once."""

import itertools
import json
import re

import numpy as np
import pytest
import torch
from whole_runs import ROOT, fake_parse, flags, lines_of, parsed, run_rft

import experts
import rewards
import train_rft
from docs.coordination import Coordination
from games import GAMES, GameError, State, complete_graph, game_from_json
from play.cast import make_expert
from play.dataset import simulate_many
from play.expert_games import label_decision
from prompts import PromptStyle, messages, parse_reply
from rewards import Target
from tools import check_game
from tools.check_game import check_efficient_graph, check_nash, check_payoffs, check_planner, check_replies
from variants import objective
from variants.game import welfare
from variants.objective import per_group
from world.draws import Family, draw_game, held_out_grid, split_of

# Importing the file registered it, and other tests expect the project's games.
GAMES.pop(Coordination.name, None)


def symmetry(sample, target):
    """Share of the others to whom the agent does what the experts do to it; as the tutorial writes a term."""
    if sample.decision is None or target.kind.letter != "G":
        return 0.0
    others = np.arange(target.game.N) != target.seat
    return float((sample.decision.action == target.actions[:, target.seat])[others].mean())


@pytest.fixture
def added(monkeypatch):
    for name in GAMES:  # after the test they are as they were
        monkeypatch.setitem(GAMES, name, GAMES[name])
    monkeypatch.setitem(GAMES, "coordination", Coordination)
    monkeypatch.setitem(rewards.TERMS, "symmetry", symmetry)


def loop_payoffs(game, links_NN, x):
    """The equation at the top of the file, term by term."""
    pi = []
    for i in range(game.N):
        links = [game.alpha[i] * min(x[i], x[j]) - game.c for j in range(game.N) if links_NN[i][j]]
        pi.append(sum(links) - x[i] ** 2 / 2)
    return np.array(pi)


def random_game(rng, N):
    alpha = rng.choice([0.5, 1, 1.5, 2], N)  # so that all equilibria are on the grid of halves
    return Coordination(tuple(alpha.tolist()), round(rng.uniform(0, 2), 2), float(rng.choice([1, 2, 3])))


def halves(game):
    return np.arange(0, game.cap + 0.1, 0.5)


def test_payoffs_are_those_of_the_equation():
    check_payoffs(random_game, loop_payoffs)


def test_efforts_are_the_best():
    check_replies(random_game)
    check_nash(random_game)
    assert {len(set(planner)) for _, planner in check_planner(random_game)} >= {1, 2}


def is_equilibrium(game, links_NN, x):
    """Nobody gains by any other half."""
    pi = loop_payoffs(game, links_NN, x)
    others = ((i, [*x[:i], e, *x[i + 1 :]]) for i in range(game.N) for e in halves(game))
    return all(loop_payoffs(game, links_NN, other)[i] <= pi[i] + 1e-9 for i, other in others)


@pytest.mark.parametrize("N", [2, 3])
def test_nash_efforts_are_the_greatest_equilibrium(N):
    """Of all profiles of halves that are equilibria none is above it, and it is one of them."""
    rng, several = np.random.default_rng(2), 0
    for _ in range(25):
        game, links_NN = random_game(rng, N), check_game.random_graph(rng, N, 0.8)
        nash, profiles = game.nash_efforts(links_NN), itertools.product(halves(game), repeat=N)
        equilibria = [x for x in profiles if is_equilibrium(game, links_NN, x)]
        assert tuple(nash) in equilibria and (np.array(equilibria) <= nash).all()
        several += len(equilibria) > 1
    assert several > 10


@pytest.mark.parametrize("solution", ["nash", "planner"])
def test_the_efficient_graph_is_the_best_of_all(solution):
    assert len(set(check_efficient_graph(random_game, solution))) > 1
    with pytest.raises(GameError, match="at most 5"):
        Coordination((1.0,) * 6, 0.1, 3.0).efficient_graph()


ALPHAS, FIRST = "np.tile(self.alpha, (self.N, 1))", "payoffs, link gains and the fee"
MISTAKES = [  # in a copy of the file: what stands there instead, the check that finds it, and what it says
    ("x**2 / 2 - self.link_cost", "x**2 / 2 - self.c", FIRST, "the payoff with a fee of 0.3 is ["),
    ("efforts_N) - self.link_cost", "efforts_N)", FIRST, "what a link gains is ["),
    ("- x**2 / 2", "+ x**2 / 2", "payoffs are concave", "the payoff is not concave in the effort of agent "),
    (f"{ALPHAS}.T", ALPHAS, "best replies", "best_response: "),
    ("np.add.outer(self.alpha, self.alpha), l", f"{ALPHAS}, l", "best replies", "planner_response: "),
    ("best_reply(worth_N[row_N], x[row_N])", "self.cap + 1", "best replies", "is not from 0 to its cap"),
    ("x, self.best_response(links_NN, x)", "x, x", "Nash efforts", "nash_efforts: "),
    ("= density.max()", "= density.max() / 2", "planner efforts", "planner_efforts: "),
    ("return np.minimum(x, self.cap)", "return x", "planner efforts", "are not from 0 to the caps"),
    ("W > best_welfare + 1e-9", "best_links is None", "efficient graph at nash efforts", "the best are "),
    ("links, best_welfare\n", "links, 0.0\n", "efficient graph at planner efforts", "that efficient_graph "),
    ("self.c, self.cap]", "self.c]", "the key", "the key '["),
    ("self.c, self.cap]", "round(self.c, 2), self.cap]", "the key", "the key '["),
    ("self.c, self.cap]", "self.c, self.cap, self.rounds]", "the key", "the key '["),
    ("sorted(self.alpha), self.c", "self.alpha, self.c", "the key", "the key '["),
    ("sorted(self.alpha), self.c", "sorted(set(self.alpha)), self.c", "the key", "the key '["),
    ("[self.name, sorted", "[id(self), sorted", "the key", "the key '["),
    ("[self.name, sorted", "[sorted", "the key", "lacks the name coordination"),
    ("(0.3, 0.5, 0.7, 0.9, 1.1)", "(9.0,)", "the held-out games differ", "the best in all 12 of them"),
]


@pytest.mark.parametrize("right, wrong, check, said", MISTAKES)
def test_a_mistake_in_a_game_is_found_and_said(right, wrong, check, said, added, tmp_path):
    text = (ROOT / "docs" / "coordination.py").read_text()
    assert right in text
    (tmp_path / "mine.py").write_text(text.replace(right, wrong))
    held_out_grid.cache_clear()  # here several games have this name
    assert check_game.games_in(tmp_path / "mine.py") == ["coordination"]
    with pytest.raises(check_game.Disagreement) as found:
        check_game.checks_of("coordination")[check]()
    held_out_grid.cache_clear()
    assert said in str(found.value) and "\n" not in str(found.value)


def test_the_command_says_what_agrees_and_what_does_not(added, tmp_path, capsys, refused):
    text = (ROOT / "docs" / "coordination.py").read_text()
    (tmp_path / "mine.py").write_text(text.replace("previous, x = x, self.best_response(", "best_replies("))
    with pytest.raises(SystemExit) as stop:
        check_game.main([str(tmp_path / "mine.py")])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 1 and len(lines) == 9 and lines[2][:20] == "ok     coordination,"
    assert lines[3] == "wrong  coordination, Nash efforts: NameError: name 'best_replies' is not defined"
    (tmp_path / "empty.py").write_text("")
    assert "registers no game" in refused(check_game.main, [tmp_path / "empty.py"])
    assert "cannot be imported: FileNotFoundError" in refused(check_game.main, [tmp_path / "none.py"])
    (tmp_path / "exits.py").write_text("import sys; sys.exit(3)")
    assert "cannot be imported: SystemExit: 3" in refused(check_game.main, [tmp_path / "exits.py"])
    assert "is no Python file" in refused(check_game.main, [tmp_path / "game.txt"])


@pytest.mark.parametrize("file", ["docs/coordination.py", "world/bcz.py", "world/pgg.py"])
def test_the_games_of_the_project_agree_with_all_checks(file, added, capsys):
    held_out_grid.cache_clear()
    check_game.main([str(ROOT / file)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9 and all(line.startswith("ok     ") for line in lines)


def test_where_nobody_can_do_better_than_nothing_the_welfare_score_is_a_number():
    target = Target(State(Coordination((1.0, 1.0), 5.0, 3.0)), 0, complete_graph(2))
    rows = [parse_reply(f"Decision: [0, {v}]", target.state, 0) for v in (0, 1)]
    assert [welfare(row, target) for row in rows] == [1, 0]


def test_draws_data_prompts_and_experts_know_it(added):
    family, rng = Family("coordination", "GGE", 2), np.random.default_rng(5)
    grid = held_out_grid(3, family)
    assert len(grid) == 60 and {split_of(game) for game in grid} == {"held-out"}
    assert split_of(draw_game(rng, 3, family=family)) == "train"
    assert game_from_json(json.loads(json.dumps(grid[7].to_json()))) == grid[7]
    fixed = Family("coordination", types=(1.0, 2.0, 1.0), fixed=(("cap", 4.0), ("c", 0.5)))
    assert draw_game(rng, 3, family=fixed) == Coordination((1.0, 2.0, 1.0), 0.5, 4.0)
    for name in ("second-best", "nash", "myopic", "selfish", "noisy:planner:0.3"):
        records = simulate_many(2, make_expert(name), 0, PromptStyle(), (3, 4), families=(family,))
        assert {r.instance["game"] for r in records} == {"coordination"}


def test_what_an_agent_reads(added):
    """alpha 1, 2, 3: if all give half of 2 x 2, the link of 1 and 2 earns 1.5 x 2 on average, that is 6 c,
    the one of 1 and 3 earns 4 = 8 c. With links 1-3 and 2-3 agent 3 gives 3 x 2, agent 1 answers alpha."""
    game = Coordination((1.0, 2.0, 3.0), 0.5, 9.0)
    state = State(game).step([[0, 0, 1], [0, 0, 1], [1, 1, 0]])
    system, asked, _, then = (m["content"] for m in messages(state, 0, ["x"], PromptStyle()))
    assert Coordination.payoff_rule in system and system.endswith("agent 1 of 3. c 0.5, effort x 0 to 9.")
    assert "earns its ends on average [0, 6.00, 8.00] c" in asked and "If all give 2.00" in asked
    assert "1 links to alphas [3]. Best reply if each gives alpha times its links: 1.00." in then
    local = messages(state, 0, ["x"], PromptStyle("local"))[-1]["content"]
    assert "Your alpha 1, 1 links. Your effort?" in local


def test_training_and_evaluation_know_the_game_and_the_term(added, model_dir, tmp_path, capsys):
    settings = dict(model=model_dir, game="coordination", expert="planner", games=4, agents=3, seat="all")
    settings |= dict(rank=4, sft_steps=2, steps=2, prompts=[2, 2], m=4, max_new_tokens=14, eval_games=2)
    run_rft([*flags(settings), "--weights", "symmetry=0.5", "--out", str(tmp_path / "run")])
    metrics, samples = (lines_of(tmp_path / "run" / f"{name}.jsonl") for name in ("metrics", "samples"))
    paid = [line["symmetry"] for line in samples]
    assert [np.mean(paid[:16]), np.mean(paid[16:])] == pytest.approx([line["symmetry"] for line in metrics])
    assert len(set(paid)) > 2 and all(line["grad_norm"] > 1e-4 for line in metrics)
    for line in samples:
        assert line["r_S"] == pytest.approx(line["compliance"] + line["sample"] + 0.5 * line["symmetry"])
        compliant = fake_parse(line["reply"], State(Coordination((1.0,) * 3, 1.0, 9.0)), line["seat"])
        assert line["symmetry"] == 0 or compliant and line["kind"] == "G"
    results = json.loads((tmp_path / "run" / "eval.json").read_text())["results"]
    games = {row["instance"]["game"] for summary in results.values() for row in summary["instances"]}
    assert games == {"coordination"}
    assert results["expert:planner"]["all rounds"]["U3"]["mean"] == pytest.approx(1)
    assert "expert:planner" in capsys.readouterr().out


def test_help_and_refusals_name_them(added, refused, capsys):
    with pytest.raises(SystemExit):
        train_rft.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "coordination: cap, c" in text and "symmetry=0" in text
    assert "--fix cap: no such name" in refused(train_rft.main, ["--game", "bcz", "--fix", "cap=3"])


def test_an_expert_is_one_line_of_the_table(monkeypatch):
    """Links to the next seat, and effort 1: known by its name, alone and among noise."""
    rule = (lambda s: np.roll(np.eye(s.game.N, dtype=int), 1, axis=1), lambda s: np.ones(s.game.N))
    monkeypatch.setitem(experts.RULES, "ring", rule)
    for name in ("ring", "noisy:ring:0"):
        records = simulate_many(1, make_expert(name), 0, PromptStyle(), noise=0)
        actions = [label_decision(r).action for r in records]
        assert np.array_equal(actions[:4], np.roll(np.eye(4), 1, axis=1)) and actions[4:] == [1.0] * 4


def test_an_advantage_and_a_loss_are_one_line_of_a_table(monkeypatch):
    monkeypatch.setitem(objective.ADVANTAGES, "rank", per_group(lambda r_M: r_M.argsort().argsort()))
    monkeypatch.setitem(objective.LOSSES, "plain", lambda ratio_T, logp_T, A_T, low, high: ratio_T * A_T)
    cfg = parsed(["--objective", "advantage=rank", "loss=plain"])[1].rft
    (A_M,) = cfg.advantage([torch.tensor([1.0, 5.0, 3.0])])
    assert A_M.tolist() == [0, 2, 1]
    assert cfg.loss(torch.tensor([1.5]), None, torch.tensor([2.0]), 0.8, 1.2).tolist() == [3.0]


def test_no_other_file_mentions_the_game_or_the_stage():
    own = {ROOT / "tests" / "test_your_own_game.py", ROOT / "tests" / "test_your_own_stage.py"}
    # A virtual environment in the checkout is not searched.
    packages = [path for path in ROOT.iterdir() if (path / "__init__.py").is_file() or path.name == "tests"]
    code = {*ROOT.glob("*.py"), *(path for folder in packages for path in folder.rglob("*.py"))} - own
    assert len(code) > 40
    names = "[\"'.]coordination|Coordination|(?i:cheap.talk)"
    assert not [path for path in code if re.search(names, path.read_text())]
