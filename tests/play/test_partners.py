"""Partners in the other seats: who they are, the data they give, what is rewarded, and whole runs."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from whole_runs import interrupted, lines_of, rft_flags, run_rft

from decisions import EFFORTS, LINKS, own_rows
from experts import Expert
from games import Decision, Kind, State, complete_graph, form_links, game_from_json
from play.cast import Partners, make_expert
from play.dataset import simulate_many, targets
from play.expert_games import label_decision, simulate
from play.probe import probe_targets
from play.records import check_seats
from prompts import PromptStyle, Reply, parse_reply
from rewards import WEIGHTS, Memory, Sample, Target
from run.errors import InputError
from variants.game import game_rewards
from world.draws import Family, draw_game, held_out_grid

STYLE, FAMILY = PromptStyle(), Family(rounds=3, fee=0.1)
NAMES = ("always-link", "never-link", "reciprocal")
PARTNERS = Partners([make_expert(name) for name in NAMES])


def drawn(seed=0, **changes):
    return replace(draw_game(np.random.default_rng(seed), 4, family=FAMILY), **changes)


def choice(rule, state, seat=0):
    return rule(state, seat, np.random.default_rng(0)).action


def samples(kind, actions):
    decisions = [None if action is None else Decision(kind, action) for action in actions]
    return [Sample(Reply("", [7], [-1.0], True), decision) for decision in decisions]


# --- who they are


def test_reciprocal_does_to_others_what_they_did():
    state, rule = State(drawn()), make_expert("reciprocal")
    assert choice(rule, state).tolist() == [0, 1, 1, 1]
    P = np.array([[0, 1, 1, 1], [0, 0, 0, 1], [1, 0, 0, 1], [1, 0, 0, 0]])
    after = state.step(P).step(state.game.nash_efforts(form_links(P)))
    for seat in range(4):
        assert (choice(rule, after, seat) == P[:, seat]).all()


def test_a_partner_switches_after_half_of_the_rounds():
    rule = make_expert("switch:always-link:never-link")
    for rounds, first in ((1, 0), (3, 1), (4, 2)):
        state, sizes = State(drawn(rounds=rounds)), []
        while not state.done:
            sizes.append(int(choice(rule, state).sum()))
            P = complete_graph(4)
            state = state.step(P).step(state.game.nash_efforts(P))
        assert sizes == [3] * first + [0] * (rounds - first)
    for name in ("switch:nash", "switch:nash:nobody", "switch:nash:planner:nash"):
        with pytest.raises(InputError, match="choose from"):
            make_expert(name)


def test_the_rule_of_a_seat_belongs_to_the_instance_and_all_rules_are_drawn():
    games = held_out_grid(4, FAMILY)
    rules = [[PARTNERS.rule(game, seat).name for seat in range(4)] for game in games]
    assert rules == [[PARTNERS.rule(replace(game), seat).name for seat in range(4)] for game in games]
    counts = [sum(row.count(name) for row in rules) for name in NAMES]
    assert all(count > 0.7 * 4 * len(games) / 3 for count in counts)
    assert len({tuple(row) for row in rules}) > 20  # seats differ


# --- the data


@pytest.mark.parametrize("seat", [0, 2, "random"])
def test_the_data_of_partners(seat):
    """The trained seat plays at random, and its labels are the expert's. All others play their rules. Every
    Belief line says what the others do in that stage."""
    nash = make_expert("nash")
    records = simulate_many(6, nash, 5, STYLE, families=(FAMILY,), partners=PARTNERS, seat=seat)
    assert len(records) == 6 * 4 * 6
    played = {(r.game, r.stage, r.seat): r.reply for r in records}
    own = {r.game: r.seat for r in records if r.replaced}
    assert len(own) == 6 and (len(set(own.values())) > 1 if seat == "random" else set(own.values()) == {seat})
    assert all(r.replaced == (r.seat == own[r.game]) for r in records)
    for r, target in targets(records, records):
        replies = [parse_reply(played[r.game, r.stage, i], target.state, i) for i in range(4)]
        truth, label = np.array([decision.action for decision in replies]), label_decision(r)
        others = np.arange(4) != r.seat
        assert (label.belief == (truth[:, r.seat] if target.kind is LINKS else truth * others)).all()
        rule = nash if r.replaced else PARTNERS.rule(game_from_json(r.instance), r.seat)
        assert np.allclose(label.action, choice(rule, target.state, r.seat))
        if r.replaced:  # what the rewards take for the others' decisions
            assert (target.actions[others] == truth[others]).all()
    assert len({r.reply for r in records if r.replaced and r.kind == "G"}) > 8


def test_the_probe_asks_among_partners():
    moments = probe_targets((FAMILY,), 4, 1, make_expert("nash"), STYLE, PARTNERS)
    for target, _ in moments:
        for seat in (0, 2, 3):
            assert np.allclose(target.actions[seat], choice(PARTNERS, target.state, seat))
    own = {tuple(t.state.last("G")[1]) for t, _ in moments if t.state.history}
    assert len(own) > 4  # the own past is random


# --- rewards


def test_rewards_for_links_from_the_game_against_all_rows():
    state, P = State(drawn()), complete_graph(4)
    P[2, 0] = P[3, 1] = 0
    target, rows = Target(state, 0, P), own_rows(4, 0)

    def payoffs(row):
        proposals = np.array([row, *P[1:]])
        return state.game.round_payoffs(proposals, state.game.nash_efforts(form_links(proposals)))

    own, common = (np.array([f(payoffs(row)) for row in rows]) for f in (lambda pi: pi[0], np.sum))
    group = samples(LINKS, [*rows, None])
    game_rewards([target], [group], Memory(), weights=WEIGHTS)
    *r_S, refused = (o.rewards["r_S"] for o in group)
    np.testing.assert_allclose(r_S, 0.5 + 2 * (own - own.min()) / np.ptp(own))
    s = [o.rewards["s"] for o in group]
    np.testing.assert_allclose(s, [*(common - common.min()) / np.ptp(common), 0], atol=1e-12)
    assert refused == -0.5 and group[-1].rewards["R_G"] == 0
    P = P.copy()
    P[0] = 0  # what the expert would do in this seat
    again = samples(LINKS, [*rows, None])
    game_rewards([Target(state, 0, P)], [again], Memory(), weights=WEIGHTS)
    assert [o.rewards for o in again] == [o.rewards for o in group]


@pytest.mark.parametrize("stages, later", [("EG", False), ("GEG", False), ("EGE", True)])
def test_links_after_the_efforts_of_a_round_are_worth_what_they_pay_at_these(stages, later):
    state, P, x = State(drawn(stages=stages, rounds=1)), complete_graph(4), np.array([0.1, 0.2, 0.1, 0.3])
    for kind in stages[: stages.rindex("G")]:
        state = state.step(x if kind == "E" else P)
    for row in own_rows(4, 0):
        proposals = np.array([row, *P[1:]])
        x_N = state.game.nash_efforts(form_links(proposals)) if later else x
        paid = state.game.round_payoffs(proposals, x_N)[0]
        assert LINKS.stakes(state, 0, proposals).chosen == pytest.approx(paid)
        if not later:  # it is what the round pays
            assert state.step(proposals).round_results()[-1][2][0] == pytest.approx(paid)


def test_what_is_played_is_what_the_reply_says():
    """A player may choose more decimals than a reply has."""

    class Fine(Expert):
        name = "fine"

        def __call__(self, state, seat, rng, past=()):
            return Decision(state.kind, complete_graph(4)[seat] if state.kind is LINKS else 1.23456)

    game = drawn(rounds=1)
    records = simulate([(0, game, np.random.default_rng(0))], Fine(), STYLE)
    assert {r.reply for r in records if r.kind == "E"} == {"Decision: 1.23"}
    paid = game.round_payoffs(complete_graph(4), np.full(4, 1.23))
    assert records[-1].efforts == [1.23] * 4 and records[-1].payoffs == pytest.approx(paid.tolist(), abs=1e-6)


def test_the_two_levels_of_an_effort_disagree_and_have_a_memory_of_their_own():
    state, x = State(drawn()).step(complete_graph(4)), np.array([1.0, 1.5, 2.0, 0.5])
    target, first = Target(state, 0, x), Target(State(drawn()), 0, complete_graph(4))
    best, social = (
        f(complete_graph(4), x)[0] for f in (target.game.best_response, target.game.planner_response)
    )
    assert 0 < best < social < target.cap
    groups, memory = (
        [samples(EFFORTS, [float(best), float(social)]), samples(LINKS, own_rows(4, 0))],
        Memory(),
    )
    game_rewards([target, first], groups, memory, weights=WEIGHTS)
    (a, b), _ = groups
    assert a.rewards["sample"] == pytest.approx(2) and b.rewards["s"] == pytest.approx(1)
    assert b.rewards["sample"] < 2 and a.rewards["s"] < 1
    memory.update([target, first], groups)
    assert set(memory.best) == {state.game.key, f"{state.game.key} E"}


@pytest.mark.parametrize("order", [(None, "yes"), ("yes", None)])
def test_a_kind_that_pays_nothing_has_no_graph_level(order):
    state, kind = State(drawn()), Kind()
    kind.letter, kind.beliefs = "M", False
    target = SimpleNamespace(kind=kind, state=state, seat=0, game=state.game, actions=["", "", "", ""])
    target.with_own = lambda decision: target.actions
    group = samples(kind, list(order))
    game_rewards([target], [group], Memory(), weights=WEIGHTS)
    assert not any("R_G" in o.rewards for o in group)
    assert [o.rewards["r_S"] for o in group] == [0.5 if action else -0.5 for action in order]


def test_equally_good_rows_have_equal_rewards():
    """With homogeneous types the other agents can be exchanged, and rounding must not tell them apart."""
    for seed in range(20):
        state = State(draw_game(np.random.default_rng(seed), 4, family=Family(patterns=("homogeneous",))))
        group = samples(LINKS, own_rows(4, 0))
        game_rewards([Target(state, 0, complete_graph(4))], [group], Memory(), weights=WEIGHTS)
        by_size = {}
        for o in group:
            by_size.setdefault(int(o.decision.action.sum()), set()).add((o.rewards["r_S"], o.rewards["R_G"]))
        assert all(len(values) == 1 for values in by_size.values())


def test_a_data_set_of_other_partners_or_another_seat_is_refused():
    nash = make_expert("nash")
    alone = simulate_many(3, nash, 0, STYLE, families=(FAMILY,))
    among = simulate_many(3, nash, 0, STYLE, families=(FAMILY,), partners=PARTNERS, seat=1)
    check_seats("file", alone, False, 0, 0)
    check_seats("file", among, True, 1, 0)
    for records, partners, seat in ((alone, True, 1), (among, True, 0), (among, False, 1)):
        with pytest.raises(InputError, match="made with"):
            check_seats("file", records, partners, seat, 0)


# --- whole runs

OTHERS = dict(partners=["always-link", "reciprocal"], seat=0, rounds=2, fix="fee=0.1", expert="random")
SELF = dict(partners="self", seat="all", rounds=2)


@pytest.fixture(scope="module", params=[OTHERS, SELF], ids=["partners", "self"])
def ended_run(request, model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("partners") / "run"
    argv = rft_flags(model_dir, folder, reward_from="game", **request.param)
    run_rft(argv)
    return request.param, folder, argv


def test_a_run_learns_from_the_game(ended_run):
    how, folder, _ = ended_run
    samples, prompts = (lines_of(folder / f"{name}.jsonl") for name in ("samples", "prompts"))
    live = [r for r in samples if r["advantage"]]
    assert len(live) > len(samples) / 4 and {r["kind"] for r in live} == {"G", "E"}
    assert all("R_G" in r for r in samples)  # efforts have a graph level, too
    assert {r["seat"] for r in samples} == ({0} if how is OTHERS else {0, 1, 2})
    fee = ["every choice costs 0.1 c" in r["prompt"][0]["content"] for r in prompts]
    assert set(fee) == {how is OTHERS}
    if how is SELF:  # every step has new games
        first, last = ({r["game"] for r in samples if r["step"] == step} for step in (0, 5))
        assert first and last and not first & last
        asked = [(r["step"], r["game"], r["stage"], r["seat"]) for r in samples]
        assert {asked.count(place) for place in asked} == {4}  # m replies, and no question twice in a step
        links = {(r["step"], r["game"]) for r in samples if r["kind"] == "G"}
        assert len(links) * 4 == sum(r["kind"] == "G" for r in samples)  # each of another game


def test_it_goes_on_bit_for_bit(ended_run, tmp_path, monkeypatch):
    _, folder, argv = ended_run
    argv = [str(tmp_path / "run") if text == str(folder) else text for text in argv]
    interrupted(monkeypatch, argv, tmp_path / "run" / "metrics.jsonl", 3)
    run_rft(["--resume", str(tmp_path / "run")])
    for file in ("adapter/adapter_model.safetensors", "samples.jsonl"):
        assert (tmp_path / "run" / file).read_bytes() == (folder / file).read_bytes()
