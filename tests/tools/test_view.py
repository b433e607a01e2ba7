"""The page of a run: its numbers are those of the files, model text stays text, and it works in a browser.

Browser tests drive headless Chromium (Debian: chromium and chromium-driver) with selenium; they are skipped
where either is not there. The run is made of real parts without a model: expert games, replies by rule,
rewarded and logged by the functions of training.
"""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tables import STYLE, evaluation_of, expert
from whole_runs import lines_of

import train_rft
from decisions import payoffs_with_row, row_payoffs
from eval import play_among_experts
from games import State, game_from_json
from play import rft_log
from play.cast import make_expert
from play.dataset import Prompt, targets
from play.expert_games import history_from_text, simulate
from play.metrics import METRICS
from play.report import summarise
from prompts import Reply, format_reply, messages, parse_reply
from rewards import WEIGHTS, Memory, Sample, expert_rewards
from run.files import JsonLines, write_json
from tompo import group_normalise
from tools import view
from tools.page import learned
from tools.page.text import clean, escaped, thinned
from world.draws import draw_game

M = 4
HOSTILE = (
    "<script>document.title = 'owned'; fetch('http://x.org/')</script></script><img src=x onerror=alert(1)>",
    "\x1b[31mred\x1b[0m \u202eright to left \u2028 \u2029 &amp; ]]> --> \x00",
    "\ud800 half a pair \udfff",
    "x" * 2**20,
)
CONFIG = dict(script="train_rft.py", model="none", algo="tompo", steps=4, prompts=[3, 1], m=M, seed=0)
CONFIG |= dict(expert="second-best", objective=None, lr=1e-4, label="<b>bold</b>")
NEW = dict(weights=["belief=0.5", "A_S=0.7", "A_G=0.3"], reward_from="expert")


def log_file(folder, name):
    return JsonLines(folder / f"{name}.jsonl", lambda row: True)


def made_run(folder, hostile=(), seed=0):
    """A run folder as training leaves it, of 4 steps with 3 link and 1 effort decisions. Replies are the
    expert's or random ones, some break the format."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    plays = [(i, draw_game(rng, 4, "train"), np.random.default_rng([seed, i])) for i in range(6)]
    records = simulate(plays, make_expert("second-best"), STYLE, noise=0.2)
    asked = [Prompt(r, [1], t) for r, t in targets(records, [r for r in records if r.seat == 0])]
    log = rft_log.RFTLog(SimpleNamespace(open_log=lambda name: log_file(folder, name)))
    memory, metrics, left = Memory(), log_file(folder, "metrics"), list(hostile)
    for step in range(4):
        batch = []
        for letter, count in (("G", 3), ("E", 1)):
            choices = [p for p in asked if p.target.kind.letter == letter]
            batch += [choices[k] for k in rng.permutation(len(choices))[:count]]
        groups = [[sample(p, rng, left) for _ in range(M)] for p in batch]
        decided = [p.target for p in batch]
        expert_rewards(decided, groups, memory, weights=WEIGHTS | {"belief": 0.5})
        A_S, A_G = (
            [group_normalise(torch.tensor([o.rewards.get(name, 0.0) for o in g])) for g in groups]
            for name in ("r_S", "R_G")
        )
        both = [0.7 * a_S + 0.3 * a_G for a_S, a_G in zip(A_S, A_G, strict=True)]
        train_rft.write_advantages(groups, [*both[:3], A_S[3]], A_S, dict(enumerate(A_G)))
        memory.update(decided, groups)
        log.write(step, batch, groups)
        metrics.write({"step": step} | rft_log.step_metrics(batch, groups, {}))
    write_json(folder / "config.json", CONFIG | NEW)
    timing = {"seconds": {"RFT": 90.0}, "peak_memory_gib": 1.5, "machine": "a <machine>"}
    write_json(folder / "timing.json", timing)
    return folder


def sample(prompt, rng, hostile):
    t, text = prompt.target, prompt.record.label
    if rng.random() < 0.6:
        text = format_reply(t.kind.random(t.game, t.seat, rng), STYLE)
    if rng.random() < 0.1 or hostile:
        text = hostile.pop() if hostile else "Decision: perhaps"
    return Sample(Reply(text, [2, 3], [-1.0, -1.0], True), parse_reply(text, t.state, t.seat))


def evaluated(folder, games=5):
    names = {"tompo": "noisy:second-best:0.2", "sft": "noisy:second-best:0.6"}
    names |= {"expert:second-best": "second-best", "expert:always-link": "always-link"}
    settings = evaluation_of("second-best", games)
    results = {
        label: summarise(play_among_experts(settings, label, lambda name=name: expert(name, 7)))
        for label, name in names.items()
    }
    write_json(folder / "eval.json", {"arguments": {}, "results": results})
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return evaluated(made_run(tmp_path_factory.mktemp("made") / "a-run"))


def results_of(folder):
    return json.loads((folder / "eval.json").read_text())["results"]


ROWS = {"tompo": "RFT policy", "sft": "SFT policy"}
ROWS |= {f"expert:{name}": f"expert {name}" for name in ("second-best", "always-link")}


def place(line):
    return line["game"], line["stage"], line["seat"]


def groups_of(folder):
    samples = lines_of(folder / "samples.jsonl")
    return [samples[k : k + M] for k in range(0, len(samples), M)]


def data_of(page):
    """What stands in the page, read as a browser reads it: up to the first end of a script."""
    text = page.read_text(encoding="utf-8").split('id="data">')[1].split("</script")[0]
    return json.loads(text)


# -------------------- files


def test_a_real_run_leaves_a_page_with_all_its_replies(full):
    page = full.folder / "run.html"
    assert f"the run as a page: {page}" in full.said and page.stat().st_size < 3e6
    (run,) = data_of(page)
    samples, groups = full.lines("samples.jsonl"), run["groups"]
    at = groups["columns"].index
    shown = [r for g in groups["groups"] for r in g["replies"]]
    assert [r[at("text")] for r in shown] == [clean(s["reply"]) for s in samples]
    for name in ("r_S", "R_G", "A_S", "A_G", "advantage"):
        assert [r[at(name)] for r in shown] == [pytest.approx(s.get(name), abs=1e-6) for s in samples]
    assert not run["missing"] and len(run["games"]["games"]) == 2
    assert all(len(g["replies"]) == 4 for g in groups["groups"])


def test_the_values_of_choices_are_exact(made):
    run, results = view.run_data(made, view.PAGE), results_of(made)
    for shown in run["games"]["games"]:
        for name, player in shown["players"].items():
            (row,) = (summary for key, summary in results.items() if ROWS[key] == name)
            game = game_from_json(row["instances"][shown["number"]]["instance"])
            end = history_from_text(game, row["actions"][shown["number"]])
            for k, stage in enumerate(player["stages"]):
                (d,), state = stage["decisions"], end.before(k)
                U2 = state.kind.efficiency(state, 0, end.history[k])
                assert d["U2"] == pytest.approx(U2, abs=1e-4) and d["regret"] >= -1e-9
                assert d["regret"] == pytest.approx(d["value"] - d["chosen"], abs=2e-4)
                for row, value, _ in d.get("rows", ()):
                    proposals = end.history[k].copy()
                    proposals[0] = list(map(int, row))
                    links = proposals & proposals.T
                    exact = game.payoffs(links, game.nash_efforts(links))[0]
                    assert value == pytest.approx(exact, abs=1e-4) and d["count"] == 8
            payoffs = end.round_results()[-1][2].tolist()
            assert player["stages"][-1]["payoffs"] == pytest.approx(payoffs, abs=1e-4)


def test_links_are_counted_by_the_number_in_the_prompt(made, tmp_path):
    """Independently: the number is read in the prompt, the choice in the reply."""
    table, choices = view.run_data(made, view.PAGE)["learned"], []
    assert list(table["bins"]) == ["before RFT", "after RFT", "expert"]
    own = results_of(made)["tompo"]
    for row, replies in zip(own["instances"], own["replies"], strict=True):
        question = messages(State(game_from_json(row["instance"])), 0, [], STYLE)[-1]["content"]
        worth = json.loads(question.split("a link earns ")[1].split("]")[0] + "]")
        chosen = json.loads(replies[0].split("Decision: ")[1])
        choices += [(worth[j], chosen[j]) for j in (1, 2, 3)]
    edges, counted = [-np.inf, *learned.EDGES, np.inf], table["bins"]["after RFT"]
    for (linked, n), low, high in zip(counted, edges[:-1], edges[1:], strict=True):
        inside = [row for worth, row in choices if low <= worth < high]
        assert (linked, n) == (sum(inside), len(inside))
    best = table["thresholds"]["after RFT"]
    agreed = lambda t: np.mean([(worth >= t) == row for worth, row in choices])
    assert best["n"] == len(choices)
    assert best["agreed"] == pytest.approx(max(map(agreed, np.linspace(-1, 9, 4001))), abs=1e-5)
    assert best["agreed"] == pytest.approx(agreed(best["t"])) and best["even"] == pytest.approx(agreed(1))
    assert table["breakEven"] == 1
    for row in (results := results_of(made))["tompo"]["instances"]:
        row["instance"] = row["instance"] | {"fee": 0.5}
    table = learned.learned(results, "second-best")
    assert table["breakEven"] == 1.5
    assert table["thresholds"]["after RFT"]["even"] == pytest.approx(agreed(1.5))
    shutil.copytree(made, tmp_path / "run")
    write_json(tmp_path / "run/config.json", CONFIG | NEW | {"expert": "random"})  # coin flips: no measure
    assert len(view.run_data(tmp_path / "run", view.PAGE)["learned"]["bins"]) == 2


@pytest.mark.parametrize("hint", ["", "worth [1, 0.80, 0.67]", "worth [c, 1 c, 2 c, 3 c]", "1, 2, 3, 4"])
def test_a_hint_without_a_number_for_each_agent_is_not_counted(hint, monkeypatch):
    state = State(draw_game(np.random.default_rng(0), 4))
    monkeypatch.setattr(type(state.game), "link_hint", lambda *seen: hint)
    assert learned.worked_numbers(state, 0) == []
    monkeypatch.setattr(type(state.game), "link_hint", lambda *seen: "of [1, 2] worth [0, 0.80, 0.67, 1.5] c")
    assert learned.worked_numbers(state, 0) == [0, 0.8, 0.67, 1.5]


def test_a_term_of_the_runs_own_file_is_in_the_sums(made, tmp_path):
    """The page is also made without that file, as by tools/view.py."""
    run = shutil.copytree(made, tmp_path / "run")
    write_json(run / "config.json", CONFIG | NEW | {"weights": ["belief=0.5", "short=0.25"]})
    lines = [line | {"short": -0.5, "r_S": line["r_S"] - 0.125} for line in lines_of(run / "samples.jsonl")]
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    groups = view.run_data(run, view.PAGE)["groups"]
    assert groups["optional"] == {"belief": 0.5, "short": 0.25}
    columns = [groups["columns"].index(name) for name in ("compliance", "sample", "belief", "short", "r_S")]
    for group in groups["groups"]:
        for reply in group["replies"]:
            compliance, own, belief, short, r_S = (reply[k] or 0 for k in columns)
            assert r_S == pytest.approx(compliance + own + 0.5 * belief + 0.25 * short, abs=1e-3)


def test_intervals_are_possible(made):
    overview = view.run_data(made, view.PAGE)["overview"]
    (told,) = (row for name, row in overview["differences"].items() if name == "RFT policy - SFT policy")
    for row in overview["table"].values():
        assert all(v["low"] >= 0 and v["high"] <= 1 for v in row[:4] if v["low"] is not None)
    assert min(v["high"] for v in told[:4]) <= 1 and told[0]["low"] is not None  # U1 has an interval, too


def test_a_run_without_an_evaluation_has_its_groups(made, tmp_path):
    run, folder = view.run_data(made, view.PAGE), tmp_path / "run"
    shutil.copytree(made, folder)
    (folder / "eval.json").unlink()
    (folder / "timing.json").unlink()
    write_json(folder / "config.json", CONFIG | NEW | {"reward_from": "credit"})
    alone = view.run_data(folder, view.PAGE)
    assert alone["missing"] == ["eval.json: the run has not been evaluated (yet)"]
    assert not alone["games"]["games"] and not alone["learned"]["bins"]
    assert run["groups"]["rule"]["weights"] == [0.7, 0.3] and not run["groups"]["rule"]["credit"]
    assert alone["groups"] == run["groups"] | {"rule": run["groups"]["rule"] | {"credit": True}}


def test_prompts_that_were_lost_cost_their_groups_alone(made, tmp_path):
    """One damaged line, then the whole file."""
    folder = tmp_path / "run"
    shutil.copytree(made, folder)
    first, *rest = (folder / "prompts.jsonl").read_text().splitlines()
    (folder / "prompts.jsonl").write_text("\n".join([first[:20], *rest]) + "\n")
    whole, damaged = (view.run_data(f, view.PAGE) for f in (made, folder))
    assert 0 < len(damaged["groups"]["groups"]) < len(whole["groups"]["groups"]) and not damaged["missing"]
    (folder / "prompts.jsonl").unlink()
    lost = view.run_data(folder, view.PAGE)
    assert lost["missing"] == ["prompts.jsonl: no groups"] and not lost["groups"]["groups"]


def test_a_page_that_cannot_be_written_costs_one_line(made, tmp_path, refused):
    assert view.of_run(tmp_path).startswith("no page of the run: ")
    assert "is not the folder of a run" in refused(view.main, [tmp_path])
    assert "cannot write" in refused(view.main, [made, "-o", tmp_path / "nowhere" / "run.html"])
    broken = tmp_path / "broken"
    shutil.copytree(made, broken)
    (broken / "samples.jsonl").write_text('{"step": 0}\n')
    assert "files that are not those of a run" in refused(view.main, [broken])


# -------------------- text


def test_no_text_can_end_its_script_or_stay_broken():
    text = escaped([clean(t) for t in HOSTILE])
    assert not set("<>&\u2028\u2029") & set(text) and text.isascii() and len(text) < 10_000
    markup, controls, halves, long = json.loads(text)
    assert markup == HOSTILE[0] and "\x1b" not in controls and "␛[31mred" in controls
    assert halves.encode() and "half a pair" in halves
    assert long.endswith("[... 1,048,576 characters, cut here]") and len(long) < 2_100


def test_the_newest_quarter_is_kept_longest():
    expected = {80: list(range(8)), 50: [0, 2, 4, 6, 7], 30: [0, 6, 7], 20: [0, 7], 5: []}
    assert {budget: thinned(8, lambda part: 10 * len(part), budget) for budget in expected} == expected


def test_many_replies_make_a_small_page_that_says_what_it_left_out(tmp_path):
    folder = made_run(tmp_path / "long")
    samples = lines_of(folder / "samples.jsonl")
    many = [s | {"step": 4 * k + s["step"]} for k in range(160) for s in samples]
    (folder / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in many))
    assert len(many) > 10_000 and view.write_page([folder], tmp_path / "run.html") < 3e6
    (run,) = data_of(tmp_path / "run.html")
    shown, steps = run["groups"]["steps"]
    numbers = sorted({g["step"] for g in run["groups"]["groups"]})
    assert shown == len(numbers) < steps == 640 and numbers[-1] == 639 and numbers[0] == 0


# -------------------- in a browser


@pytest.fixture(scope="module")
def browser():
    no_selenium = "no selenium: pip install -r requirements-test.txt"
    webdriver = pytest.importorskip("selenium.webdriver", reason=no_selenium)
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium")
    if not driver or not chromium:
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as browser:
        yield browser


class Page:
    """A page in the browser; texts are those that a reader sees."""

    def __init__(self, browser, path):
        self.browser = browser
        browser.get_log("browser"), browser.get_log("performance")
        browser.get(path.as_uri())

    def run(self, script, *args):
        return self.browser.execute_script(script, *args)

    def text(self, selector):
        return self.run("return document.querySelector(arguments[0])?.innerText", selector)

    def texts(self, selector):
        return self.run("return [...document.querySelectorAll(arguments[0])].map(e => e.innerText)", selector)

    def options(self, name):
        return self.run("return [...document.getElementById(arguments[0]).options].map(o => o.text)", name)

    def choose(self, name, value):
        """As a person does it with the keyboard: the select changes and says so."""
        self.run(
            "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
            "e.dispatchEvent(new Event('change', {bubbles: true}))",
            *(name, value),
        )

    def click(self, name):
        self.browser.find_element("id", name).click()

    def check_quiet(self):
        """No message in the console, no request but for the page itself."""
        assert self.browser.get_log("browser") == []
        events = [json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance")]
        asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        assert [url for url in asked if not url.startswith("file://")] == []


@pytest.fixture(scope="module")
def page_file(made, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "run.html"
    view.write_page([made], path)
    return path


@pytest.fixture
def page(browser, page_file):
    page = Page(browser, page_file)
    yield page
    page.check_quiet()


def test_the_overview_is_that_of_the_files_and_what_was_learned_is_a_chart_and_a_table(page, made):
    cells = page.run(
        "const rows = [...document.querySelectorAll('#overview-body tr')];"
        "return rows.map(r => [...r.cells].map(c => c.innerText))"
    )
    for name, summary in results_of(made).items():
        row = next(r for r in cells if r[0] == ROWS[name])
        for metric, text in zip(METRICS, row[1:], strict=True):
            assert text.split("\n")[0] == f"{summary['all rounds'][metric]['mean']:.3f}"
    assert "a <machine>" in page.text("#overview-body") and "RFT 1.5 min" in page.text("#overview-body")
    assert "no constant answer is good" in page.text("#overview-body")
    assert "3 about links, 1 about efforts; 4 replies to each" in page.text("#overview-body")
    assert page.texts("h2") == ["What it learned", "Overview", "Groups", "Games"]
    told = page.text("#learned-body")
    even = {who: own["even"] for who, own in view.run_data(made, view.PAGE)["learned"]["thresholds"].items()}
    assert f"describes {100 * even['before RFT']:.1f} % of the choices before RFT" in told
    points = round(100 * (even["after RFT"] - even["expert"]))
    word = "more strictly than" if points > 0 else "less strictly than" if points < 0 else "as strictly as"
    assert f"follows the number {word} the expert" in told
    circles = page.run("return document.querySelectorAll('#learned-body svg circle').length")
    assert "best described by" in page.text("#learned-body") and circles


def test_every_group_can_be_reached_and_its_numbers_add_up(page, made):
    groups = groups_of(made)
    assert len(page.options("g-group")) == len(groups) == 16
    opposed = [max(-s["A_S"] * s["A_G"] for s in group) for group in groups]
    first = int(page.run("return document.getElementById('g-group').value"))
    assert opposed[first] == pytest.approx(max(opposed), abs=1e-5) and max(opposed) > 0
    assert "signs of AS and AG differ" in page.text("#groups-body")  # with raised letters
    page.choose("g-group", "0")
    for k, group in enumerate(groups):
        replies, r_S = page.texts(".reply"), np.array([s["r_S"] for s in group])
        title = f"Step {group[0]['step']}, training game {group[0]['game']}:"
        assert page.text("#group h3").startswith(title)
        for s, text in zip(group, replies, strict=True):
            sign = "+" if s["advantage"] > 0 and f"{s['advantage']:.3f}" != "0.000" else ""
            assert f"A {sign}{s['advantage']:.3f}".replace("-0.000", "0.000") in text.split("\n")[0]
            assert s["reply"].split("\n")[-1] in text and f"= rS {s['r_S']:.3f}" in text
            assert f"({s['r_S']:.3f} - {r_S.mean():.3f}) / ({r_S.std():.3f} + 0.0001)" in text
            total = s["compliance"] + s["sample"] + 0.5 * s["belief"]
            assert s["r_S"] == pytest.approx(total) and f"+ 0.5 × belief {s['belief']:.3f}" in text
            if s["kind"] == "G":
                assert f"local {s['local']:.3f} + global {s['global']:.3f} = RG {s['R_G']:.3f}" in text
                assert ("of 8 rows" in text) == (s["broken"] is None)
        if k < len(groups) - 1:
            page.click("g-group-after")
    assert page.run("return document.getElementById('g-group-after').disabled")


def test_filters_show_what_they_say(page, made):
    groups = groups_of(made)
    expected = {
        "idle": sum(not any(s["advantage"] for s in g) for g in groups),
        "live": sum(any(s["advantage"] for s in g) for g in groups),
        "broken": sum(any(s["broken"] for s in g) for g in groups),
        "apart": sum(any(round(s["A_S"], 6) * round(s["A_G"], 6) < 0 for s in g) for g in groups),
    }
    for name, count in expected.items():
        page.choose("g-show", name)
        assert len(page.options("g-group")) == count and (page.text("#g-none") is None) == (count > 0)
    page.choose("g-show", "all")
    page.choose("g-kind", "E")
    assert len(page.options("g-group")) == 4 and "effort" in page.text("#group h3")
    page.choose("g-kind", "all")
    page.choose("g-step", "2")
    assert len(page.options("g-group")) == 4
    page.choose("g-step", "all")
    page.choose("g-order", "apart")
    largest = max(max(abs(s["A_S"] - s["A_G"]) for s in g) for g in groups if g[0]["kind"] == "G")
    assert f"{largest:.2f} apart" in page.options("g-group")[0]
    label = page.options("g-instance")[1]
    page.choose("g-instance", page.run("return document.getElementById('g-instance').options[1].value"))
    number = int(label.split(":")[0].removeprefix("game "))
    assert len(page.options("g-group")) == sum(g[0]["game"] == number for g in groups)
    assert "This instance through training" in page.text("#groups-body")


def test_instances_can_be_searched_for(page, made):
    label = page.options("g-instance")[1]
    typed, number = label.split("; ", 1)[1], len({place(s)[0] for group in groups_of(made) for s in group})
    assert f"Search the {number} instances" in page.text("#groups-body") and "; c 0" not in label
    page.browser.find_element("id", "g-search").send_keys(typed.upper())
    assert page.options("g-instance")[1:] == [label]
    assert page.run("return document.activeElement.value") == typed.upper()
    game = int(label.split(":")[0].removeprefix("game "))
    assert len(page.options("g-group")) == sum(g[0]["game"] == game for g in groups_of(made))
    page.browser.find_element("id", "g-search").send_keys("?")
    assert page.text("#g-none") == "No group is like that."


BROKEN = {  # a reply of the first seat, and what is marked in it
    "Belief: [0, 1, 1, 1]\nDecision: [0, 1, 3, 1.5]\n": ["3", "1.5"],
    "Decision: [1, 0, 1, 1]": ["1"],
    "Decision: [0, 1, 1]": ["0", "1", "1"],
    "Decision: all <b>of them": ["all", "<b>of", "them"],
    "Decision: [1, 1, 0, 0]\nDecision: perhaps": ["perhaps"],
    "I link with all": ["I link with all"],
    "Decision:": ["Decision:"],
}


def test_what_is_wrong_in_a_reply_is_marked_and_what_stands_before_it_folded(browser, tmp_path):
    """None of these replies is compliant; their texts stay as they are."""
    thinks = "Two or three?\nI say two.\nDecision: [0, 1, 1]"
    folder = made_run(tmp_path / "run", hostile=reversed([*BROKEN, thinks]))
    view.write_page([folder], tmp_path / "run.html")
    page, marked, folded = Page(browser, tmp_path / "run.html"), {}, []
    page.choose("g-group", "0")
    for _ in range(2):
        marked |= page.run(
            "return Object.fromEntries([...document.querySelectorAll('.reply pre')].map(e => "
            "[e.textContent, [...e.querySelectorAll('mark')].map(m => m.textContent)]))"
        )
        folded += page.run(
            "return [...document.querySelectorAll('.reply pre details')].map(e => "
            "[e.open, e.lastChild.textContent, e.parentElement.textContent])"
        )
        page.click("g-group-after")
    assert {text: marked[text] for text in BROKEN} == BROKEN
    assert folded == [[False, thinks.split("Decision")[0], f"thought{thinks}"]]
    page.check_quiet()


def test_games_show_regret_and_the_best_row(page, made):
    results = results_of(made)
    assert len(page.options("p-game")) == 5
    for i in range(5):
        page.choose("p-game", str(i))
        players = page.texts(".player")
        assert [text.split("\n")[0] for text in players] == [ROWS[name] for name in results]
        game = game_from_json(results["tompo"]["instances"][i]["instance"])
        end = history_from_text(game, results["tompo"]["actions"][i])
        worth = row_payoffs(end.before(0), 0, end.history[0])
        chosen = payoffs_with_row(end.before(0), 0, end.history[0], end.history[0][0])[0]
        assert f"Regret {worth.max() - chosen:.3f}" in players[0] and f"worth {worth.max():.3f}" in players[0]
        assert results["tompo"]["replies"][i][0].split("\n")[-1] in players[0]
    page.click("p-game-before")
    assert page.text("#game h3").startswith("Held-out game 4:")
    assert page.run("return document.activeElement.id") == "p-game-before"
    page.choose("p-order", "low")
    U2 = [float(text.split("U2 ")[1].split(",")[0]) for text in page.options("p-game")]
    assert U2 == sorted(U2)


def test_it_can_be_read_without_eyes_or_mouse(page):
    """Every picture has words, every control a label, and all that takes the focus is in reach."""
    pictures = page.run(
        "const words = e => e.getAttribute('aria-label') || e.getAttribute('aria-hidden');"
        "return [...document.querySelectorAll('svg')].map(words)"
    )
    assert len(pictures) > 20 and all(pictures)
    for selector, condition in (
        ("select", "e.labels.length === 1"),
        ("button", "e.type === 'button' && e.innerText"),
        ("table", "e.getAttribute('aria-label')"),
    ):
        assert page.run(f"return [...document.querySelectorAll('{selector}')].every(e => {condition})")


def test_several_runs_share_the_charts_and_take_turns(browser, made, tmp_path):
    other = made_run(tmp_path / "other", seed=1)
    view.main([str(made), str(other), "-o", str(tmp_path / "two.html")])
    page = Page(browser, tmp_path / "two.html")
    caption = page.text("#overview-body figcaption")
    assert "a-run:" in caption and "other:" in caption
    first = page.text("#groups-body")
    page.choose("run", "1")
    assert page.text("#groups-body") != first and "No games" in page.text("#games-body")
    page.check_quiet()


def test_hostile_replies_do_nothing(browser, tmp_path):
    folder = evaluated(made_run(tmp_path / "<img src=x onerror=alert(1)>", hostile=HOSTILE), games=1)
    results = results_of(folder)
    results["tompo"]["replies"][0][0] = HOSTILE[0]
    write_json(folder / "eval.json", {"results": results})
    view.write_page([folder], tmp_path / "run.html")
    page = Page(browser, tmp_path / "run.html")
    page.choose("g-group", "0")
    shown = []
    for _ in range(len(page.options("g-group")) - 1):
        shown += page.texts(".reply pre")
        page.click("g-group-after")
    assert HOSTILE[0] in shown and HOSTILE[0] in page.texts(".player pre")
    for text in ("1,048,576 characters", "half a pair"):
        assert any(text in reply for reply in shown)
    assert page.browser.title == "Run <img src=x onerror=alert(1)>"
    assert page.run("return [document.images.length, document.scripts.length]") == [0, 2]
    page.check_quiet()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_it_fits_every_width_in_light_and_dark(browser, page_file, width, scheme):
    page = Page(browser, page_file)
    command = browser.execute_cdp_cmd
    command("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    command("Emulation.setDeviceMetricsOverride", size)
    try:
        assert page.run("return document.documentElement.scrollWidth") <= width
        sizes = page.run(
            "const scale = e => e.getBoundingClientRect().width / e.viewBox.baseVal.width;"
            "const texts = [...document.querySelectorAll('svg text')];"
            "return texts.map(e => scale(e.ownerSVGElement) * parseFloat(getComputedStyle(e).fontSize))"
        )
        assert min(size for size in sizes if size) >= 11
        page.run("window.scrollTo(0, 5000); document.querySelector('.top').click()")
        assert page.run("return window.scrollY") < 100
        colours = page.run("const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]")
        back, fore = (sum(map(int, c.strip("rgb()").split(","))) for c in colours)
        assert (back < fore) == (scheme == "dark") and abs(back - fore) > 400
        assert len(browser.get_screenshot_as_png()) > 10_000
    finally:
        command("Emulation.clearDeviceMetricsOverride", {})
        command("Emulation.setEmulatedMedia", {"features": []})
    page.check_quiet()
