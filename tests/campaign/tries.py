"""What is tried: each kind yields (what, a function that returns None where all held, else what did not)."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
from campaign import children
from campaign.children import Watch, finish, flags, fork, new_folder, not_the_same, wrong
from chat_server import KEY, ChatServer
from safetensors.torch import load_file, save
from whole_runs import edited, ended, given, start, tree, wait_for_lines

from decisions import LINKS
from games import Decision, State, empty_graph
from play.repair import repair_reply
from prompts import PromptStyle, format_reply, parse_reply, read_reply
from world.bcz import BCZ


def prepare(root):
    """The runs that were never stopped, of one process and of two, and the operations of the first."""
    global FULL, TWO, STOPPED, GAMES, ANSWERED, OPERATIONS, SECONDS
    FULL, TWO, STOPPED, counted = root / "full", root / "two", root / "stopped", root / "operations"
    began = time.time()
    status, said = fork(flags(FULL), root / "said")
    SECONDS = time.time() - began
    assert status == 0, said
    fork(flags(root / "counted"), root / "said", before=partial(Watch, root / "counted", count=counted))
    OPERATIONS = counted.read_text().splitlines()
    third = next(k for k, line in enumerate(OPERATIONS) if "step-000003" in line and "/sft/" not in line)
    fork(flags(STOPPED), root / "said", before=partial(Watch, STOPPED, third, signal.SIGKILL))
    GAMES, games = root / "games.jsonl", "--games 4 --agents 3 --noise 0.3 --seed 3".split()
    fork([*games, "--out", GAMES], root / "said", script="tools.expert_games")
    (root / "asked").mkdir()
    with ChatServer() as server:
        assert ask(root / "asked", server)[0] == 0
    ANSWERED = (root / "asked" / "games.jsonl").read_bytes()
    statuses = ended(start(flags(TWO), root / "said", 2, method="fork"))
    assert statuses == [0, 0], (root / "said").read_text()


def at_operation(act, k, again=None):
    """A run that has `act` at its k-th operation, and the one that resumes at its `again`-th, if given."""
    with new_folder() as folder:
        run = folder / "run"
        killed = isinstance(act, signal.Signals)
        end = fork(flags(run), folder / "said", before=partial(Watch, run, k, act))
        bad = None if killed and end[0] == -act else wrong(*end, allowed=(0, 2, 130))
        if bad is None and again is not None:
            end = finish(run, before=partial(Watch, run, again, act))
            bad = None if end[0] == -act else wrong(*end)
        return bad or not_the_same(run, FULL, finish(run))


def kills(rng):
    """SIGKILL at every file operation of a run; after every third one another in the run that resumes it"""
    for k, operation in enumerate(OPERATIONS):
        again = rng.randrange(len(OPERATIONS) - k) if k % 3 == 0 else None
        yield f"{k} {operation}, {again}", partial(at_operation, signal.SIGKILL, k, again)


def at_moment(numbers, after):
    """Signals, a second and a bit apart, to a run; then it is resumed."""
    with new_folder() as folder:
        run = folder / "run"
        (folder / "said").write_text("")
        processes = start(flags(run), folder / "said", method="fork")
        time.sleep(after)
        for n, number in enumerate(numbers):
            time.sleep(1.05 * (n > 0))
            if processes[0].is_alive():
                os.kill(processes[0].pid, number)
        (status,) = ended(processes, 120)
        bad = wrong(status, (folder / "said").read_text(), allowed=(0, 130, -numbers[0]))
        return bad or not_the_same(run, FULL, finish(run))


def moments(rng):
    """KILL, TERM, INT, two INT, two TERM at a random moment, then --resume"""
    INT, TERM = signal.SIGINT, signal.SIGTERM
    for signals in 12 * [[signal.SIGKILL], [TERM], [INT], [INT, INT], [TERM, TERM]]:
        after = rng.uniform(0, SECONDS)
        yield f"{[s.name for s in signals]} after {after:.2f} s", partial(at_moment, signals, after)


def on_small_disk(size):
    with new_folder() as folder:
        disk = folder / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", disk]
        subprocess.run(mount, check=True, timeout=20)
        try:
            bad = wrong(*fork(flags(disk / "run"), folder / "said"))  # a page may be said to be lost
            subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True, timeout=20)
            return bad or not_the_same(disk / "run", FULL, finish(disk / "run"))
        finally:
            subprocess.run(["umount", "-l", disk], check=True)


def disks(rng):
    """ENOSPC from an operation on, EIO at one; as root real full disks; then --resume with room"""
    for error in (errno.ENOSPC, errno.EIO):
        for k in range(rng.randrange(5), len(OPERATIONS), 5):
            name = f"{errno.errorcode[error]} at {k} {OPERATIONS[k]}"
            yield name, partial(at_operation, error, k)
    for size in (16, 40, 60, 90, 120, 160, 200, 240, 280, 320, 360, 400) if os.geteuid() == 0 else ():
        yield f"a disk of {size} KiB", partial(on_small_disk, size)


def two_at_once(resumed):
    """Of two processes in one folder one runs, and the other says so."""
    with new_folder() as folder:
        run, outputs = folder / "run", [folder / "a", folder / "b"]
        if resumed:
            halfway = partial(Watch, run, len(OPERATIONS) // 2, signal.SIGKILL)
            fork(flags(run), folder / "said", before=halfway)
        argv = ["--resume", str(run)] if resumed else flags(run)
        both = [start(argv, output, method="fork")[0] for output in outputs]
        statuses = ended(both, 120)
        ends = [(s, output.read_text()) for s, output in zip(statuses, outputs, strict=True)]
        bad = next(filter(None, (wrong(*end) for end in ends)), None)
        if bad is None and sorted(statuses) != [0, 2]:
            bad = f"exit statuses {statuses}"
        return bad or not_the_same(run, FULL, finish(run))


def folders(rng):
    """two processes at once in one folder: two starts, two --resume"""
    for n in range(6):
        yield f"two starts {n}", partial(two_at_once, False)
        yield f"two --resume {n}", partial(two_at_once, True)


def lost_rank(rank, after):
    with new_folder() as folder:
        run = folder / "run"
        processes = start(flags(run), folder / "said", 2, method="fork")
        wait_for_lines(run / after[0], after[1])
        os.kill(processes[rank].pid, signal.SIGKILL)
        began = time.time()
        statuses = ended(processes)
        said = (folder / "said").read_text(errors="replace")
        bad = wrong(statuses[1 - rank], said, allowed=(2,))
        if time.time() - began > 20:
            bad = f"the other one waited {time.time() - began:.0f} s"
        return bad or not_the_same(run, TWO, finish(run, ranks=2))


def groups(rng):
    """groups of two processes of which one is killed; then two resume"""
    for log, lines in (("sft/metrics.jsonl", 3), ("metrics.jsonl", 3)):
        for count in range(1, 1 + lines):
            for rank in (0, 1):
                yield f"rank {rank} after {log} {count}", partial(lost_rank, rank, (log, count))


BYTES = {"empty": b"", "a list": b"[]", "nul": b"\0" * 99, "ff fe": b"\xff\xfe\n"}
BYTES["nested"] = b"[" * 100_000 + b"\n"
LINES = BYTES | {"odd steps": b'{"step": "a"}\n{"step": 1e999}\n5\nnull\n'}
LINES["half a character"] = b'{"step": 0, "stage": "SFT", "reply": "\\ud800"}\n'
TEMPLATES = {t: t.encode() for t in ("{{ raise_exception(1) }}", "{% if", "", "{{ 1 / 0 }}")}


def refused(script, argv, copies=(), edit=None, allowed=(2,)):
    """One line, in time and before any training, and what was there is as it was. copies: of what FOLDER/NAME
    is; edit: (path, change) of one of them."""
    with new_folder() as folder:
        for source in copies:
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, folder / source.name)
        (folder / "list").write_text("[]")
        if edit:
            (folder / edit[0]).write_bytes(edit[1])
        before = tree(folder)
        argv = [str(a).replace("FOLDER", str(folder)) for a in argv]
        bad = wrong(*fork(argv, f"{folder}.said", script=script), allowed)
        after = tree(folder)
        lost = [name for name in before if after.get(name) != before[name]]
        trained = [name for name in after if "checkpoints" in name and allowed == (2,)]
        problems = {"changed": lost, "only after training:": trained[:1]}
        return bad or " ".join(f"{what} {names}" for what, names in problems.items() if names) or None


def resumed_after(path, change):
    """A stopped run of which a file was changed is refused, or ends the same, or says what is lost."""
    with new_folder() as folder:
        run = Path(shutil.copytree(STOPPED, folder / "run"))
        for file in run.glob(path):
            text = change if isinstance(change, bytes) else edited(file.read_text(), change)
            file.write_bytes(text)
        status, said = finish(run)
        reports = [word for word in ("has lost", "is damaged", "was changed after") if word in said]
        return wrong(status, said) or (None if status or reports else not_the_same(run, FULL, (status, said)))


def nan():
    """An adapter's file with a weight that is no number."""
    tensors = load_file(FULL / "sft/adapter/adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = math.nan
    return save(tensors)


def inputs(rng):
    """flags, data sets, adapters, models, edited files of a run: one line and nothing changed, or a report"""
    run = flags("FOLDER/run")
    for flag in [*given("flags"), "out nul\0", f"out {'x' * 300}"]:
        yield f"--{flag[:60]}", partial(refused, "train_rft", [*run, *f"--{flag}".split(" ")])
    for line in given("scripts"):
        script, *argv = line.split()
        if script.split(".")[-1] in ("eval", "crossplay", "others", "merge"):
            argv += ["--model", children.MODEL]
        yield line, partial(refused, script, argv, [FULL / "adapter"])
    edits = [("config.json", edit) for edit in given("config.json")]
    edits += [("checkpoints/*/state.json", edit) for edit in given("state.json")]
    for path in "config.json checkpoints/*/state.json checkpoints/*3/state.json checkpoints/*/t*".split():
        edits += [(path, data) for data in BYTES.values()]
    for path in "metrics.jsonl samples.jsonl prompts.jsonl probe.jsonl".split():
        edits += [(path, data) for data in LINES.values()]
    for path, edit in edits:
        yield f"{path} {edit[:40]}", partial(resumed_after, path, edit)
    games, sft = GAMES.read_text().splitlines(), FULL / "sft" / "adapter"
    sets = {"twice": 2 * games, "no first": games[1:], "no last": games[:-1]}
    sets |= {"no stage": games[:3] + games[6:]}
    sets |= {f"only {kind}": [g for g in games if f'"kind": "{kind}"' in g] for kind in "GE"}
    sets = {name: "\n".join(lines).encode() for name, lines in sets.items()} | LINES
    for at, section in ((0, "record"), (3, "efforts")):
        rest = "\n".join(games[:at] + games[at + 1 :]).encode()
        sets |= {edit: edited(games[at], edit) + b"\n" + rest for edit in given(section)}
    config = (sft / "adapter_config.json").read_text()
    configs = BYTES | {edit: edited(config, edit) for edit in given("adapter")}
    changes = [("--games", GAMES, "games.jsonl", sets)]
    changes += [("--sft-adapter", sft, "adapter/adapter_config.json", configs)]
    changes += [("--sft-adapter", sft, "adapter/adapter_model.safetensors", BYTES | {"nan": nan()})]
    changes += [("--model", children.MODEL, "model/chat_template.jinja", TEMPLATES)]
    for file in ("config.json", "tokenizer.json", "model.safetensors"):
        changes += [("--model", children.MODEL, f"model/{file}", BYTES)]
    for flag, source, file, contents in changes:
        for what, data in contents.items():
            copy = [*run, flag, f"FOLDER/{source.name}"]
            yield f"{file} {what}", partial(refused, "train_rft", copy, [source], (file, data))
    slow = "adapter/adapter_config.json", edited(config, "target_modules='(a|a|a)*$|(.*.*.*.*)*x'")
    argv = [*run, "--sft-adapter", "FOLDER/adapter"]
    yield "a slow pattern", partial(refused, "train_rft", argv, [sft], slow, (0, 2))


PIECES = "Decision:|Belief:|[|]|,|0|1|0, 1, 0|1.5|-0|+1|1e999|nan|inf|\n|\r|\t| |\0|\u0661".split("|")
PIECES += "\ud800|\u2028|x|[[|]]|\x1b[2J|01|1.|.5|1_0|None|Decision: [0, 1, 0]|Decision: 1.20".split("|")
PIECES += ["9" * 5000, "[" * 2000, "1," * 2000, " " * 3000]


def replies_hold(seed, count):
    """No reply raises, takes long, or is read against the rules; what is written is read back."""
    rng, slow = np.random.default_rng(seed), 0.0
    for _ in range(count):
        N, cap = int(rng.integers(2, 9)), float(rng.uniform(0.1, 9))
        state, seat = State(BCZ((1.0,) * N, 0.01, 0.1, cap)), int(rng.integers(N))
        state = state.step(empty_graph(N)) if rng.integers(2) else state
        text, began = "".join(rng.choice(PIECES, rng.integers(12))), time.perf_counter()
        strict, broken = read_reply(text, state.kind, seat, N, cap)
        if (strict is None) != isinstance(broken, str):
            return f"{text[:80]!r}: the rule that is broken does not go with the decision"
        decisions = [strict, repair_reply(text, state, seat)]
        slow = max(slow, time.perf_counter() - began)
        for decision in filter(None, decisions):
            a, b = decision.action, decision.belief
            if state.kind is LINKS:
                allowed = a.shape == (N,) and set(a.tolist()) <= {0, 1} and a[seat] == 0
            else:
                allowed = 0 <= a <= cap
            if not allowed or (b is not None and not np.isfinite(b).all()):
                return f"{text[:80]!r} was read as {decision}"
        links = state.kind is LINKS
        action = rng.integers(0, 2, N) * (np.arange(N) != seat) if links else round(cap * 0.9, 2)
        written = format_reply(Decision(state.kind, action), PromptStyle())
        if not np.array_equal(parse_reply(written, state, seat).action, action):
            return f"{written!r} is not read back"
    return f"a reply took {slow:.1f} s" if slow > 2 else None


def replies(rng):
    """2,000 random replies each: the parser, repair, the name of the rule that is broken; the way back"""
    for seed in range(100):
        yield f"seed {seed}", partial(replies_hold, [rng.randrange(10**6), seed], 2000)


ERROR = json.dumps({"error": {"message": f"\x1b[2J\x07 {KEY} bad"}}).encode()
USAGE = b'"usage": {"prompt_tokens": 1%b, "completion_tokens": 1}'
COUNTED = b'{"choices": [{"message": {"content": "x"}}], ' + USAGE + b"}"
BODIES = {"nothing": b"", "deep": b"[" * 100_000, "no JSON": b"\xff", "a list": b"[]"}
BODIES |= {"no choice": b'{"choices": []}'}
BODIES |= {"count": COUNTED % (b"0" * 400), "huge": COUNTED.replace(b'"x"', b'"' + b"x" * 10**6 + b'"') % b""}
CODES = (301, 302, 307, 400, 401, 403, 404, 408, 429, 500, 503)
FAULTS = {str(code): ("status", code, {}, ERROR) for code in CODES}
FAULTS |= {name: ("body", body) for name, body in BODIES.items()} | {"half": ("half",), "close": ("close",)}
FAULTS |= {"a day": ("status", 429, {"Retry-After": "86400"}, ERROR), "slow": ("slow", 4.0)}
FAULTS |= {"elsewhere": ("status", 307, {"Location": "http://127.0.0.1:9/v1"}, b"")}
FAULTS |= {"escapes": ("text", "\x1b[2J")}


def ask(folder, server):
    argv = ["--games", "2", "--agents", "3", "--expert", "openai:m", "--out", folder / "games.jsonl", "--ask"]
    argv += ["retries=1", "timeout=2", "attempts=1", "concurrency=2", f"record={folder / 'answers.jsonl'}"]
    own = {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": KEY}
    return fork(argv, f"{folder}.said", script="tools.expert_games", environment=own)


def through_faults(fault, often):
    """A server that fails as often as that: the data set is whole, or a line says why not, and then the same
    command with a healthy server ends in the same data set, and asks for no answer twice."""
    with new_folder() as folder:
        answered, reports = Counter(), ""
        for script in (lambda body, n: FAULTS[fault] if n <= often else None, lambda body, n: None):
            with ChatServer(script) as server:
                status, said = ask(folder, server)
            answered, reports = answered + server.answered, reports + said
            if status == 0:
                break
            if bad := wrong(status, said):
                return bad
        if KEY in reports + "".join(p.read_text() for p in folder.iterdir()) or "\x1b" in reports:
            return "the key, or what steers a terminal, was printed or written"
        if max(answered.values(), default=0) > 1:
            return "an answer was asked for twice"
        same = fault in ("escapes", "huge", "count") or (folder / "games.jsonl").read_bytes() == ANSWERED
        return wrong(status, said, (0,)) or (None if same else "another data set")


def servers(rng):
    """every fault of a server, once, twice or always; then the same command with a healthy one"""
    for fault in FAULTS:
        for often in (1, 2, 99):
            yield f"{fault}, {often} times", partial(through_faults, fault, often)


KINDS = {f.__name__: f for f in (kills, moments, disks, folders, groups, inputs, replies, servers)}
QUICK = dict(kills=6, moments=3, disks=4, folders=1, groups=1, inputs=24, replies=4, servers=5)
