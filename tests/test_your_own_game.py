"""What docs/your-own-game.md promises: a game and a reward term that are added from outside are everywhere at
once."""

import itertools
import json
import re

import numpy as np
import pytest
import torch
from brute import all_graphs, random_graph, star_graph
from whole_runs import ROOT, fake_parse, flags, lines_of, run_rft

import experts
import rewards
import tompo
import train_rft
from docs.coordination import Coordination
from games import GAMES, GameError, State, complete_graph, empty_graph, game_from_json
from play import expert_games
from prompts import PromptStyle, messages
from rewards import Target, graph_score
from run.dataset import simulate_many
from world.draws import Family, draw_game, held_out_grid, split_of

del GAMES[
    Coordination.name
]  # importing the file registered it; other tests know the games of the project alone


def symmetry(decision, target):
    """Share of the others towards whom the agent does what it expects of them; a term as the tutorial writes
    one."""
    if decision is None or target.kind == "E":
        return 0.0
    return float(
        (decision.action == target.actions[:, target.seat])[np.arange(target.game.N) != target.seat].mean()
    )


@pytest.fixture
def added(monkeypatch):
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


# --- the game against brute force


def test_payoffs_are_those_of_the_equation_and_links_gain_what_they_add():
    rng = np.random.default_rng(0)
    for _ in range(50):
        game, links_NN = random_game(rng, 4), random_graph(rng, 4)
        x = rng.uniform(0, game.cap, 4)
        np.testing.assert_allclose(game.payoffs(links_NN, x), loop_payoffs(game, links_NN, x), atol=1e-12)
        i, j = rng.permutation(4)[:2]
        with_it, without = links_NN.copy(), links_NN.copy()
        with_it[[i, j], [j, i]], without[[i, j], [j, i]] = 1, 0
        change = loop_payoffs(game, with_it, x) - loop_payoffs(game, without, x)
        assert game.link_gains(links_NN, x)[i, j] == pytest.approx(change[i])


def test_best_responses_are_the_best_of_a_grid():
    rng, kinds = np.random.default_rng(1), set()
    for _ in range(60):
        game, links_NN = random_game(rng, 4), random_graph(rng, 4, 0.7)
        x = rng.choice(halves(game), 4)
        for i, best in enumerate(game.best_response(links_NN, x)):
            own = [loop_payoffs(game, links_NN, [*x[:i], e, *x[i + 1 :]])[i] for e in (*halves(game), best)]
            assert own[-1] == pytest.approx(max(own)) and best in halves(game)
            kinds.add("none" if best == 0 else "another's" if best in x[links_NN[i] == 1] else "alpha k")
    assert len(kinds) == 3


@pytest.mark.parametrize("N", [2, 3])
def test_nash_efforts_are_the_greatest_equilibrium(N):
    """Among all profiles of halves, where nobody gains by any other half: it is one, and not below any
    other."""
    rng, several = np.random.default_rng(2), 0
    for _ in range(25):
        game, links_NN = random_game(rng, N), random_graph(rng, N, 0.8)

        def is_equilibrium(x):
            pi = loop_payoffs(game, links_NN, x)
            others = ((i, [*x[:i], e, *x[i + 1 :]]) for i in range(N) for e in halves(game))
            return all(loop_payoffs(game, links_NN, other)[i] <= pi[i] + 1e-9 for i, other in others)

        nash = game.nash_efforts(links_NN)
        found = [x for x in itertools.product(halves(game), repeat=N) if is_equilibrium(x)]
        assert tuple(nash) in found and (np.array(found) <= nash).all()
        several += len(found) > 1
    assert several > 10


@pytest.mark.parametrize("N", [3, 4])
def test_planner_efforts_maximise_welfare(N):
    """Welfare is concave: nothing on a grid, nor near, is better."""
    rng, levels = np.random.default_rng(3), set()
    for k in range(30):
        game, links_NN = random_game(rng, N), star_graph(N) if k == 0 else random_graph(rng, N, 0.6)
        x = game.planner_efforts(links_NN)
        best = loop_payoffs(game, links_NN, x).sum()
        grid = np.array(list(itertools.product(np.linspace(0, game.cap, 6), repeat=N)))
        near = np.clip(x + rng.normal(scale=0.05, size=(50, N)), 0, game.cap)
        assert max(loop_payoffs(game, links_NN, other).sum() for other in (*grid[::3], *near)) <= best + 1e-9
        levels.add(len(set(x)))
    assert levels >= {1, 2}


def test_efforts_by_hand():
    """The planner's are those of the densest part, and then of the densest addition to it. Of nobody's links
    nobody's."""
    for solution in ("nash", "planner"):
        assert not Coordination((1.0, 2.0, 3.0), 0.5, 9.0).efforts(solution, empty_graph(3)).any()
    tail = np.array(
        [[0, 1, 1, 0], [1, 0, 1, 0], [1, 1, 0, 1], [0, 0, 1, 0]]
    )  # a triangle, 3 links x 2 / 3; then 2 / 1
    assert Coordination((1.0,) * 4, 0.1, 9.0).planner_efforts(tail).tolist() == [2, 2, 2, 2]
    rich = Coordination((2.0, 2.0, 2.0, 1.0), 0.1, 9.0)  # 3 links x 4 / 3 = 4; then 3 / 1
    assert rich.planner_efforts(tail).tolist() == [4, 4, 4, 3] and rich.nash_efforts(tail).tolist() == [
        4,
        4,
        4,
        1,
    ]


@pytest.mark.parametrize("efforts", ["nash", "planner"])
def test_the_efficient_graph_is_the_best_of_all(efforts):
    rng, links = np.random.default_rng(4), set()
    for k in range(20):
        game = random_game(rng, 2 + k % 3)
        G, W = game.efficient_graph(efforts)
        assert loop_payoffs(game, G, game.efforts(efforts, G)).sum() == pytest.approx(W)
        best = max(loop_payoffs(game, g, game.efforts(efforts, g)).sum() for g in all_graphs(game.N))
        assert W == pytest.approx(best)
        links.add(int(G.sum()))
    assert len(links) > 2
    with pytest.raises(GameError, match="at most 5"):
        Coordination((1.0,) * 6, 0.1, 3.0).efficient_graph()


def test_where_nobody_can_do_better_than_nothing_the_welfare_score_is_a_number():
    target = Target(State(Coordination((1.0, 1.0), 5.0, 3.0)), 0, complete_graph(2))
    rows = [train_rft.parse_reply(f"Decision: [0, {v}]", "G", 0, 2, 3.0) for v in (0, 1)]
    assert [graph_score(row, target, "welfare") for row in rows] == [1, 0]


# --- everywhere at once


def test_draws_data_prompts_and_experts_know_it(added):
    family, rng = Family("coordination", "GGE", 2), np.random.default_rng(5)
    grid = held_out_grid(3, family)
    assert len(grid) == 60 and {split_of(game) for game in grid} == {"held-out"}
    assert split_of(draw_game(rng, 3, family=family)) == "train"
    assert game_from_json(json.loads(json.dumps(grid[7].to_json()))) == grid[7]
    fixed = Family("coordination", types=(1.0, 2.0, 1.0), fixed=(("cap", 4.0), ("c", 0.5)))
    assert draw_game(rng, 3, family=fixed) == Coordination((1.0, 2.0, 1.0), 0.5, 4.0)
    for expert in ("second-best", "nash", "myopic", "selfish", "noisy:planner:0.3"):
        records = simulate_many(2, expert, 0, PromptStyle(), (3, 4), families=(family,))
        assert {r.instance["game"] for r in records} == {"coordination"}


def test_what_an_agent_reads(added):
    """alpha 1, 2, 3: if all give half of 2 x 2, the link of 1 and 2 earns 1.5 x 2 on average, that is 6 c,
    the one of 1 and 3 earns 4 = 8 c. With links 1-3 and 2-3 agent 3 gives 3 x 2, and agent 1 answers alpha x
    1 link."""
    game = Coordination((1.0, 2.0, 3.0), 0.5, 9.0)
    state = State(game).step([[0, 0, 1], [0, 0, 1], [1, 1, 0]])
    system, asked, _, then = (m["content"] for m in messages(state, 0, ["x"], PromptStyle()))
    assert Coordination.payoff_rule in system and system.endswith("agent 1 of 3. c 0.5, effort x 0 to 9.")
    assert "earns its ends on average [0, 6.00, 8.00] c" in asked and "If all give 2.00" in asked
    assert "1 links to alphas [3]. Best reply if each gives alpha times its links: 1.00." in then
    local = messages(state, 0, ["x"], PromptStyle("local"))[-1]["content"]
    assert "Your alpha 1, 1 links. Your effort?" in local


def test_training_and_evaluation_know_the_game_and_the_term(added, model_dir, tmp_path, capsys):
    settings = dict(
        model=model_dir, game="coordination", expert="planner", games=4, agents=3, seat="all", rank=4
    )
    settings |= dict(
        eval_agents=3, eval_games=2, sft_steps=2, steps=2, prompts=[2, 2], m=4, max_new_tokens=14
    )
    run_rft([*flags(settings), "--reward", "symmetry=0.5", "--out", str(tmp_path / "run")])
    metrics, samples = (lines_of(tmp_path / "run" / f"{name}.jsonl") for name in ("metrics", "samples"))
    paid = [line["symmetry"] for line in samples]
    assert [np.mean(paid[:16]), np.mean(paid[16:])] == pytest.approx([line["symmetry"] for line in metrics])
    assert len(set(paid)) > 2 and all(line["grad_norm"] > 1e-4 for line in metrics)
    for line in samples:
        assert line["r_S"] == pytest.approx(line["compliance"] + line["sample"] + 0.5 * line["symmetry"])
        decision = fake_parse(line["reply"], line["kind"], line["seat"], 3, 9.0)
        assert line["symmetry"] == 0 or decision is not None and line["kind"] == "G"
    results = json.loads((tmp_path / "run" / "eval.json").read_text())["results"]
    assert {i["instance"]["game"] for of_one in results.values() for i in of_one["instances"]} == {
        "coordination"
    }
    assert results["expert:planner"]["all rounds"]["U3"]["mean"] == pytest.approx(1)
    assert "expert:planner" in capsys.readouterr().out


def test_help_and_refusals_name_them(added, capsys):
    with pytest.raises(SystemExit):
        train_rft.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "coordination: cap, c" in said and "symmetry=0" in said
    with pytest.raises(SystemExit):
        train_rft.main(["--game", "bcz", "--fix", "cap=3"])
    assert "--fix cap: bcz cannot fix it" in capsys.readouterr().err


def test_an_expert_is_one_line_of_the_table(monkeypatch):
    """Links to the next seat, and effort 1: known by its name, alone and among noise."""
    rule = (lambda s: np.roll(np.eye(s.game.N, dtype=int), 1, axis=1), lambda s: np.ones(s.game.N))
    monkeypatch.setitem(experts.RULES, "ring", rule)
    for name in ("ring", "noisy:ring:0"):
        actions = [
            expert_games.label_decision(r).action for r in simulate_many(1, name, 0, PromptStyle(), noise=0)
        ]
        assert np.array_equal(actions[:4], np.roll(np.eye(4), 1, axis=1)) and actions[4:] == [1.0] * 4


def test_an_advantage_and_a_loss_are_one_line_of_a_table(monkeypatch):
    """r - mean, which is 3 here; rho A without a clip, whose slope in log pi is rho A."""
    monkeypatch.setitem(tompo.ADVANTAGES, "mean", lambda r_M: r_M - r_M.mean())
    monkeypatch.setitem(tompo.LOSSES, "plain", lambda ratio_T, logp_T, A_T, low, high: ratio_T * A_T)
    A_M, _, _ = tompo.dual_level_advantages(torch.tensor([1.0, 3, 5, 3]), None, advantage="mean")
    assert A_M.tolist() == [-2, 0, 2, 0]
    logp_T = torch.log(torch.tensor([1.5, 0.5])).requires_grad_()
    weights = torch.tensor([0.5, 0.5])
    inputs = logp_T, torch.zeros(2), None, torch.tensor([2.0, -2]), weights
    loss, _ = tompo.objective_loss(*inputs, loss="plain")
    loss.backward()
    assert loss.item() == pytest.approx(-1) and logp_T.grad.tolist() == pytest.approx([-1.5, 0.5])


def test_without_it_nothing_knows_it(capsys):
    with pytest.raises(SystemExit):
        train_rft.main(["--game", "coordination"])
    assert "invalid choice: 'coordination'" in capsys.readouterr().err


def test_no_other_file_mentions_the_game():
    own = {ROOT / "docs" / "coordination.py", ROOT / "tests" / "test_your_own_game.py"}
    packages = [
        entry for entry in ROOT.iterdir() if (entry / "__init__.py").is_file() or entry.name == "tests"
    ]
    found = [*ROOT.glob("*.py"), *(path for folder in packages for path in folder.rglob("*.py"))]
    code = [
        path for path in found if path not in own
    ]  # a virtual environment in the checkout is not searched
    assert len(code) > 40
    assert not [path for path in code if re.search("[\"'.]coordination|Coordination", path.read_text())]
