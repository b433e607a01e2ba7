"""Prompts by their content (not their wording), and the strict reading of replies."""

import itertools
import json
import re
import textwrap
import time
from dataclasses import replace

import numpy as np
import pytest
from brute import bcz_payoffs

import prompts
from decisions import EFFORTS, LINKS
from games import Decision, State, complete_graph, form_links
from play import thoughts
from play.cast import make_expert
from play.expert_games import simulate
from prompts import PromptStyle, format_reply, messages, parse_reply, read_reply
from tools.check_game import all_graphs
from world.bcz import BCZ
from world.draws import Family, held_out_grid
from world.pgg import PGG

STYLES = [PromptStyle(i, b, h) for i in ("full", "local") for b in (True, False) for h in (True, False)]
ALPHA = (1.37, 2.91, 0.83, 1.79)  # numbers that occur nowhere else in a prompt
GAME = BCZ(ALPHA, 0.047, 0.213, 9.0, rounds=2)


def random_state(game, stages, rng):
    """A state after that many stages of random actions; efforts have two decimals."""
    state = State(game)
    for _ in range(stages):
        rows = rng.integers(0, 2, (game.N, game.N)) * complete_graph(game.N)
        efforts = rng.integers(1, int(game.caps.min() * 100), game.N) / 100
        state = state.step(rows if state.kind is LINKS else efforts)
    return state


def chat_of(state, seat=0, style=PromptStyle()):
    """The conversation of a seat that has answered x in every stage."""
    return messages(state, seat, ["x"] * len(state.history), style)


def question(state, seat=0, style=PromptStyle()):
    return chat_of(state, seat, style)[-1]["content"]


def text_of(chat):
    return "\n".join(m["content"] for m in chat)


def numbers_in(text):
    return {float(v) for v in re.findall(r"\d+(?:\.\d+)?", text)}


# --- prompts


def test_the_conversation_in_the_docstring_is_a_real_one():
    """Letter for letter, of a held-out instance; what stands to the right of a reply is a note."""
    game = BCZ((1.0, 1.0, 3.0, 3.0), 0.067, 0.268, 7.0)
    assert game in held_out_grid(4)
    play = (0, game, np.random.default_rng(0))
    *_, last = (r for r in simulate([play], make_expert("second-best"), PromptStyle()) if r.seat == 0)
    block = []
    for message in [*last.prompt, {"role": "assistant", "content": last.label}]:
        indent = f"    {message['role']:11}"
        for line in message["content"].split("\n"):
            block += textwrap.wrap(line, 108, initial_indent=indent, subsequent_indent=" " * 15)
            indent = " " * 15
    assert len(block) == 13
    assert "\n".join(block) in re.sub(r"(?<=[]\d]) {3,}\S.*", "", prompts.__doc__)


@pytest.mark.parametrize("style", STYLES, ids=str)
def test_an_agent_reads_its_own_numbers_and_under_full_information_everybodys_alpha(style):
    for seat in range(4):
        numbers = numbers_in(text_of(chat_of(State(GAME), seat, style)))
        assert {GAME.delta, GAME.c, GAME.cap, ALPHA[seat], 4.0, float(seat + 1)} <= numbers
        assert numbers & set(ALPHA) == (set(ALPHA) if style.information == "full" else {ALPHA[seat]})
    with pytest.raises(ValueError):
        messages(State(GAME), 0, [], PromptStyle("none"))


@pytest.mark.parametrize("style", STYLES, ids=str)
def test_local_prompts_are_the_same_letters_whatever_the_others_alphas_are(style):
    """The strongest form: no stage of two rounds lets any function of the others' alphas through."""
    state = random_state(GAME, 3, np.random.default_rng(0))
    for seat in range(4):
        alpha = [5.55, 6.66, 7.77, 8.88]
        alpha[seat] = ALPHA[seat]
        other = State(replace(GAME, alpha=tuple(alpha)), state.history)
        a, b = chat_of(state, seat, style), chat_of(other, seat, style)
        assert len(a) == 1 + 4 + 3 and (a == b) == (style.information == "local")


def test_with_think_an_agent_reads_its_answers_again_and_not_its_thoughts():
    style, two_lines = PromptStyle(think=40), "Belief: [0, 1, 0, 0]\nDecision: [0, 1, 1, 0]"
    state = random_state(GAME, 1, np.random.default_rng(0))
    for reply, read in (
        (f"Well.\nDecision: 3\n{two_lines} \nDone.", two_lines),
        ("I wonder", "Decision: none"),
    ):
        plain, thinking = (messages(state, 0, [reply], s) for s in (PromptStyle(), style))
        assert thinking[2]["content"] == read and plain[2]["content"] == reply
        assert thinking[1::2] == plain[1::2] and "Think first, then reply:" in thinking[0]["content"]
    assert style.reply_limit(4) == PromptStyle().reply_limit(4) + 40


@pytest.mark.parametrize("information", ["full", "local"])
@pytest.mark.parametrize("game", [GAME, PGG((4.0, 6.0, 9.0, 14.0), 1.2, 0.5, 3.0)])
def test_a_thought_is_what_the_hint_adds_to_the_question(game, information):
    rng = np.random.default_rng(1)
    for state, seat in itertools.product((random_state(game, k, rng) for k in (0, 1)), range(4)):
        style = PromptStyle(information, think=40)
        plain, hinted = (
            messages(state, seat, ["x"] * len(state.history), replace(style, hints=hints))[-1]["content"]
            for hints in (False, True)
        )
        thought = thoughts.thought(state, seat, style)
        assert bool(thought) == (plain != hinted) and thoughts.thought(state, seat, PromptStyle()) == ""
        assert not thought or (
            thought.endswith(".\n") and plain == hinted.replace(f". {thought[:-2]}", "", 1)
        )


def test_hints_give_the_worked_numbers_and_nothing_else_does():
    """Seat 1: a link to j earns delta x_1 x_j / c units of c, x the best replies to alphas if all link, as
    1.37 + 0.047 * (2.91 + 0.83 + 1.79) = 1.62991; linked with 0 and 3 it answers 2.91 + 0.047 * 3.16."""
    links = np.array([[0, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]])
    for state, worked in ((State(GAME), {1.11, 0.76, 1.39}), (State(GAME).step(links), {3.06})):
        hinted, plain = (numbers_in(question(state, 1, PromptStyle(hints=h))) for h in (True, False))
        assert worked <= hinted and not worked & plain and plain <= hinted
    # Under local information there is nothing to hint at; a cost of 0 is no unit.
    state = random_state(GAME, 3, np.random.default_rng(1))
    local = [chat_of(state, 2, PromptStyle("local", hints=h)) for h in (True, False)]
    assert local[0] == local[1]
    assert "earns" not in text_of(chat_of(State(replace(GAME, c=0.0))))


@pytest.mark.parametrize("information", ("full", "local"))
def test_every_graph_reads_differently_before_the_efforts(information):
    """And only the graph counts: a proposal that nobody answers is not in the text."""
    texts, style, game = set(), PromptStyle(information), replace(GAME, rounds=1)
    for links in all_graphs(4):
        in_vain = np.maximum(links, np.tri(4, k=-1, dtype=int))
        text, same = (question(State(game).step(P), 0, style) for P in (links, in_vain))
        assert text == same
        texts.add(text)
    assert len(texts) == 64


def test_the_second_round_tells_all_efforts_and_the_own_payoff():
    state = random_state(GAME, 2, np.random.default_rng(2))
    proposals, x = state.history
    pay = bcz_payoffs(GAME, form_links(proposals), x)
    assert not (proposals == proposals.T).all()
    for seat in range(4):
        text = question(state, seat, PromptStyle("local"))
        assert set(x) | {round(abs(pay[seat]), 2)} <= numbers_in(text) and "Round 2 links" in text


@pytest.mark.parametrize("stages", ("GGE", "GEE"))
def test_the_result_of_a_stage_is_told_before_the_next_of_the_same_kind(stages):
    """After each stage everybody sees the result: two different results, two different prompts."""
    state, links = State(replace(GAME, stages=stages)), complete_graph(4)
    a, b = state.step(links), state.step(0 * links)
    if stages == "GEE":
        a, b = a.step([1.11] * 4), a.step([2.22] * 4)
    assert all(question(a, seat) != question(b, seat) for seat in range(4))


@pytest.mark.parametrize("N", range(3, 9))
@pytest.mark.parametrize("style", STYLES, ids=str)
def test_prompts_of_all_sizes_over_two_rounds_grow_as_prefixes(N, style):
    """The prompt of stage k+1 is that of stage k, the reply and one user message: play may reuse its cache,
    and fine-tuning may train all decisions of a game in one pass."""
    rng = np.random.default_rng(N)
    end = random_state(Family("bcz", "GE", 2).make(rng.permutation(np.linspace(1, 3, N)), 0.25, 1.0), 4, rng)
    for seat in range(N):
        replies, before = [], None
        for k in range(4):
            chat = messages(end.before(k), seat, replies, style)
            assert [m["role"] for m in chat] == ["system"] + ["user", "assistant"] * k + ["user"]
            assert ("belief" in text_of(chat).lower()) == style.belief and "Decision:" in chat[0]["content"]
            if before is not None:
                assert chat[:-1] == before + [{"role": "assistant", "content": replies[-1]}]
            with pytest.raises(ValueError, match=f"{k} stages"):
                messages(end.before(k), seat, [*replies, "x"], style)
            before, replies = chat, [*replies, f"Decision: reply {k} of seat {seat}"]


# --- reading replies. `read` holds throughout that a reply breaks no rule exactly where a decision is read.


def read(reply, kind, seat=0, N=4, cap=3.0):
    decision, broken = read_reply(reply, kind, seat, N, cap)
    assert (broken is None) == (decision is not None)
    return decision


COMPLIANT = {
    "Decision: [0, 1, 0, 1]": [0, 1, 0, 1],
    "Decision:[0,1,0,1]": [0, 1, 0, 1],
    "  Decision:   [ 0 ,1 ,  0,1 ]  \n": [0, 1, 0, 1],
    "Belief: [0, 1, 1, 1]\r\nDecision: [0, 0, 0, 0]\r\n": [0, 0, 0, 0],
    "hm\nDecision: [0, 1, 1, 1]\nno, wait\nDecision: [0, 0, 1, 0]\nthank you": [0, 0, 1, 0],
    "Decision: nonsense\nDecision: [0, 1, 0, 0]": [0, 1, 0, 0],
    "Decision: [0, 1, 0, 1]\nThe decision: [1, 1, 1, 1]": [0, 1, 0, 1],
    **{f"Decision: {x}": float(x) for x in ("1.54", "0", "3", "3.00", "2.9999999", "15e-1", "1e-999")},
    **{"Decision:1.54": 1.54, "\tDecision:  1.54\t": 1.54, "Belief: junk\nDecision: 1": 1.0},
    **{"Decision: 2\nDecision: 1": 1.0, "Decision: 99\nDecision: 1": 1.0},
}


@pytest.mark.parametrize("reply", COMPLIANT)
def test_compliant_replies(reply):
    action = COMPLIANT[reply]
    kind = LINKS if isinstance(action, list) else EFFORTS
    decision = read(reply, kind)
    assert decision.kind is kind and np.array_equal(decision.action, action)
    assert isinstance(decision.action, float) if kind is EFFORTS else decision.action.dtype.kind == "i"


NEVER = ["", "\n\n", "I choose everybody.", "Belief: [0, 1, 0, 1]", "My Decision: 1", "Decision 1"]
NEVER += ["decision: [0, 1, 0, 1]\ndecision: 1", "Decision:", "Decision: ", "Decision: \x001"]
NEVER += [f"Decision: {text}" for text in ("9" * 5000, f"[0, {'9' * 5000}, 0, 0]")]
LINES = (  # also Arabic-Indic and fullwidth digits, which int() and float() would read, and a superscript
    "none | nan | [nan, 0, 0, 0] | inf | -inf | Infinity | 1e999 | [0, 1e999, 0, 0] | [0, 1, 0, 1] + [] | "
    "__import__('os').system('true') | [0, __import__('os'), 0, 0] | [0] * 4 | 1 + 1 | True | 1_0 | "
    "[False, True, False, True] | (0, 1, 0, 1) | [[0, 1, 0, 1]] | 1,5 | 1.2.3 | . | e1 | 1e | 0x1 | "
    "\u0661 | \uff11 | \u00b2 | [0, \u0661, 0, \uff11]"
)
NEVER += [f"Decision: {line}" for line in LINES.split(" | ")]


@pytest.mark.parametrize("kind", (LINKS, EFFORTS), ids="GE")
@pytest.mark.parametrize("reply", NEVER, ids=lambda reply: ascii(reply[:30]))
def test_never_compliant(reply, kind):
    assert read(reply, kind, cap=30.0) is None


BAD_ROWS = (
    "[0, 1, 0] | [0, 1, 0, 1, 0] | [] | [1, 1, 0, 1] | [0, 2, 0, 1] | [0, -1, 0, 1] | [0, 0.5, 0, 1] | 1 | "
    "[0, 0.999999, 0, 1] | [0, 1e-9, 0, 1] | [0, 1, 0, 1], | [0, 1, 0, 1]. | row [0, 1, 0, 1] | 0101 | "
    "[0, 1, 0, 1] since they pay | [0, 1, 0, 1 | 0, 1, 0, 1] | 0, 1, 0, 1 | 0 1 0 1 | [0 1 0 1] | "
    "[0, , 0, 1] | [0, 1, 0, 1,] | [,0, 1, 0, 1] | [0; 1; 0; 1]"
).split(" | ")
BAD_EFFORTS = (
    "-0.01 | -1 | 3.0000001 | 3.01 | 4 | 1e9 | 1.5 is my effort | 1.5. | 1.5, | about 1.5 | [1.5] | "
    "--1 | +-1 | [1.5, 1, 1, 1] | 1.5 1.5 | 1.5 / 2 | $1.5"
).split(" | ")


@pytest.mark.parametrize("line", BAD_ROWS + BAD_EFFORTS)
def test_lines_that_are_refused(line):
    kind, good = (LINKS, "[0, 1, 1, 0]") if line in BAD_ROWS else (EFFORTS, "1")
    assert read(f"Decision: {line}", kind) is None
    # A bad last line is mended neither by a good one before it nor by a good belief.
    assert read(f"Belief: [0, 1, 0, 1]\nDecision: {good}\nDecision: {line}", kind) is None


def test_the_own_position_and_the_cap_are_those_of_the_seat():
    game = PGG((10.0, 5.0, 8.0, 3.0), 1.3, 0.5, 2.0)
    before, after = State(game), State(game).step(np.zeros((4, 4), int))
    for seat, row in itertools.product(range(4), itertools.product((0, 1), repeat=4)):
        assert (read(f"Decision: {list(row)}", LINKS, seat) is None) == (row[seat] == 1)
        assert (parse_reply(f"Decision: {list(row)}", before, seat) is None) == (row[seat] == 1)
    for seat, cap in enumerate(game.endowment):
        assert parse_reply(f"Decision: {cap}", after, seat).action == cap
        assert parse_reply(f"Decision: {cap + 0.01}", after, seat) is None


RULES = [(LINKS, "", "no Decision line"), (LINKS, "1", "not one list of numbers")]
RULES += [(LINKS, "[0, 2]", "an entry that is not 0 or 1"), (LINKS, "[1, 0]", "wrong length")]
RULES += [(LINKS, "[1, 0, 1, 0]", "own position not 0"), (EFFORTS, "", "no Decision line")]
RULES += [(EFFORTS, "[0, 1]", "not one number"), (EFFORTS, "3.01", "number outside [0, cap]")]


@pytest.mark.parametrize("kind, text, rule", RULES)
def test_the_first_rule_that_a_reply_breaks(kind, text, rule):
    assert read_reply(f"Decision: {text}", kind, 0, 4, 3.0) == (None, rule)


M = 10**6
LONG = ["1" * M, "0." + "1" * M + "x", "1e" + "9" * M + "x", "[0" + ", 1" * (M // 3), "[0" + " " * M + "x"]
LONG += ["[" + "0   ,   " * (M // 8), "[" + "1" * M, "[0, 1, 0, 1]\nDecision: " * (M // 23) + "x"]
LONG = ["word " * (M // 5), "\n" * M, " " * M + "x", *(f"Decision: {text}" for text in LONG)]
LONG += ["Belief: [" + "1, " * (M // 3) + "\nDecision: x"]


@pytest.mark.parametrize("i", range(len(LONG)))
def test_long_replies_take_linear_time(i):
    """A million characters: quadratic time would be hours."""
    start = time.perf_counter()
    assert read(LONG[i], LINKS) is read(LONG[i], EFFORTS) is None
    assert time.perf_counter() - start < 5
    assert read("hm " * M + "\nDecision: 1.5", EFFORTS).action == 1.5


# --- beliefs


BELIEFS = [  # what is written, the kind of decision, what is read
    ("[0, 1, 0, 1]", LINKS, [0, 1, 0, 1]),
    ("[1, 1, 0, 1]", LINKS, [0, 1, 0, 1]),  # one's own position says nothing
    *((bad, LINKS, None) for bad in ("[0, 1, 0]", "[0, 2, 0, 1]", "[0, 0.5, 0, 1]", "[0, 1, 0, 1] I think")),
    *((bad, LINKS, None) for bad in ("they will", "")),
    ("[0, 1.2, 0.8, 2]", EFFORTS, [0, 1.2, 0.8, 2]),
    ("[9, 1.2, 0.8, 2]", EFFORTS, [0, 1.2, 0.8, 2]),
    *((bad, EFFORTS, None) for bad in ("[0, 1.2, 0.8]", "[0, nan, 0.8, 2]", "[0, 1e999, 0.8, 2]", "1.2")),
    ("[0, 1, 0, 0]\nBelief: [0, 0, 1, 1]", LINKS, [0, 0, 1, 1]),  # the last line here too
    ("[0, 1, 0, 0]\nBelief: ?", LINKS, None),
]


@pytest.mark.parametrize("belief, kind, expected", BELIEFS)
def test_the_belief_does_not_decide_compliance(belief, kind, expected):
    text, action = ("[0, 0, 1, 0]", [0, 0, 1, 0]) if kind is LINKS else ("1.25", 1.25)
    for reply in (f"Belief: {belief}\nDecision: {text}", f"Decision: {text}\nBelief: {belief}"):
        decision = read(reply, kind)
        assert np.array_equal(decision.action, action)
        assert decision.belief is None if expected is None else decision.belief.tolist() == expected
    assert read(f"Decision: {text}", kind).belief is None


# --- writing replies


@pytest.mark.parametrize("belief", (True, False))
def test_what_is_written_is_read_back(belief):
    rng, style = np.random.default_rng(4), PromptStyle(belief=belief)
    for _ in range(500):
        N = int(rng.integers(2, 13))
        seat, cap = int(rng.integers(N)), float(rng.integers(1, 30))
        row, expected = rng.integers(0, 2, (2, N))
        efforts = rng.integers(0, int(cap * 100) + 1, N) / 100
        row[seat] = expected[seat] = efforts[seat] = 0
        x = int(rng.integers(0, int(cap * 100) + 1)) / 100
        for kind, action, b in ((LINKS, row, expected), (EFFORTS, x, efforts)):
            text = format_reply(Decision(kind, action, b), style)
            back = read(text, kind, seat, N, cap)
            assert text.count("\n") == belief and np.array_equal(back.action, action)
            assert np.array_equal(back.belief, b) if belief else back.belief is None


# --- other games and stages


def test_what_a_player_of_the_public_goods_game_reads():
    """r 1.35, b 0.5, c 4.27, e 10: a group of k brings each 10 (1.35 sqrt(k) - 1): 9.09 for 2, 13.38 for 3,
    17 for 4, and the last member's share is 9.09 / c, (13.38 - 9.09) / c, (17 - 13.38) / c; a unit in a pair
    returns 1.35 / sqrt(2) to each. Agent 4 comes last among equals."""
    game = PGG((10.0, 10.0, 10.0, 10.0), 1.35, 0.5, 4.27)
    state = State(game).step(np.array([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]))
    system, asked, _, then = [m["content"] for m in chat_of(state, 3)]
    assert "r k^b / k of what it gets" in system and "alpha" not in system
    assert system.endswith("You are agent 4 of 4. r 1.35, b 0.5, c 4.27, effort x 0 to 10.")
    assert asked == (
        "Round 1 links. Your e 10 of [10, 10, 10, 10]. If you and all in riches up to an agent give all in "
        "one group, its link earns each [0.85, 1.00, 2.13, 0] c. Whom do you choose?"
    )
    assert then == (
        "Round 1 efforts. Links: 1-2, 3-4. Your e 10, your groups: 3-4. A unit you give returns 0.95 to you, "
        "1.91 to all. Your effort?"
    )
    plain = [m["content"] for m in chat_of(state, 3, PromptStyle("local", hints=False))]
    assert plain[1] == "Round 1 links. Your e 10. Whom do you choose?"
    assert plain[3] == "Round 1 efforts. Links: 1-2, 3-4. Your e 10, your groups: 3-4. Your effort?"


def test_what_a_link_earns_in_the_public_goods_game():
    """Agent 1 is the poorest: up to agent 2 (15) all three are in the group; agent 2 is then taken out."""
    game = PGG((5.0, 15.0, 8.0), 1.3, 0.5, 2.0)
    chats = [[m["content"] for m in chat_of(State(game), seat)] for seat in range(3)]
    assert all(chat[0].endswith(f"x 0 to {e:g}.") for chat, e in zip(chats, game.endowment, strict=True))
    pair = 13 * (1.3 * 2**0.5 - 1) / 2 / 2
    whole = (28 * (1.3 * 3**0.5 - 1) / 3 - 13 * (1.3 * 2**0.5 - 1) / 2) / 2
    assert f"its link earns each [0, {whole:.2f}, {pair:.2f}] c." in chats[0][1]
    assert "earns" not in question(State(replace(game, c=0.0)))


@pytest.mark.parametrize("game", ["bcz", "pgg"])
def test_the_hint_about_links_is_near_the_solution_and_is_not_the_solution(game):
    """The docstring of PromptStyle: "link where it earns its cost" is wrong about one in ten links."""
    right, rows = [], []
    for instance in held_out_grid(6, Family(game)):
        expert_N = instance.efficient_graph("nash" if game == "bcz" else "planner")[0][0]
        numbers = re.search(r"earns (?:each )?(\[.*\]) c", question(State(instance)))[1]
        row_N = np.array([v >= 1 for v in json.loads(numbers)])
        right.append((row_N == expert_N)[1:].mean())
        rows.append((row_N == expert_N).all())
    assert 0.85 < np.mean(right) < 0.95 and 0.6 < np.mean(rows) < 0.85


@pytest.mark.parametrize("stages", ("GE", "GEE", "GGE", "EG", "EGE"))
def test_a_payoff_is_told_when_a_round_begins_and_not_again(stages):
    """Also where a round begins with efforts, on nobody's links."""
    state = State(replace(GAME, stages=stages))
    while not state.done:
        text = question(state, 1)
        begins = len(state.history) == len(stages)
        assert ("Your payoff was" in text) == begins
        pay = bcz_payoffs(GAME, state.links, state.efforts)[1] if begins else 0.0
        assert not begins or round(abs(pay), 2) in numbers_in(text)
        assert ("Links: none" in text) == (state.kind is EFFORTS and state.last("G") is None)
        state = state.step(complete_graph(4) if state.kind is LINKS else [1.0, 2, 3, 4])
