"""A run, or several, as one page: what the policy did, looked at closely.

    python -m tools.view runs/tompo                          # writes runs/tompo/run.html
    python -m tools.view runs/tompo runs/grpo -o both.html

The page opens from the disk and needs no network. It shows what was run and what came of it, the groups of
replies of every step of RFT with the numbers that made their advantages, the games of the evaluation with the
exact value of every choice that was not taken, and whom the policy links to before and after RFT. All of it
comes from the files of the run. What they lack is left out, and the page says so.

This file and tools/page/ read the files and compute values; tools/view.html draws them. What a model wrote is
data there: it is embedded as escaped JSON and becomes text, never markup.
"""

import argparse
from pathlib import Path

import world  # noqa: F401  (it registers the games that the files name)
from games import KINDS
from play.intervals import UNKNOWN
from play.metrics import METRICS
from play.report import about_constant, paired_difference, possible
from run.errors import InputError, one_line, reports_errors
from run.files import read_json, read_lines, write_atomic
from tools.page.games import games_of
from tools.page.groups import groups_of, read_prompts
from tools.page.learned import learned
from tools.page.text import clean, escaped, rounded

TEMPLATE = Path(__file__).with_suffix(".html")
ALGORITHMS = {"tompo": "ToMPO", "grpo": "GRPO"}
PLAYERS = dict.fromkeys(ALGORITHMS, "RFT policy") | {"sft": "SFT policy", "base": "base model"}
PLAYERS["expert:random"] = "random play"  # of the table, apart from the name of the algorithm
PAGE = 2_700_000  # characters of data on a page; half of a run's share is for groups, a third for games


def overview(config: dict, timing: dict, results: dict, folder: Path) -> dict:
    """What was run, and what came of it."""
    minutes = [f"{stage} {s / 60:.1f} min" for stage, s in timing.get("seconds", {}).items()]
    memory, kinds = timing.get("peak_memory_gib"), [kind.noun for kind in KINDS.values()]
    prompts = [f"{n} about {kind}" for n, kind in zip(config.get("prompts") or (), kinds, strict=False)]
    facts = {
        "algorithm": ALGORITHMS.get(config.get("algo"), config.get("algo")),
        "training": f"{config.get('steps')} steps; prompts of a step: {', '.join(prompts)}; "
        f"{config.get('m')} replies to each; seed {config.get('seed')}",
        "model": config.get("model"),
        "expert": config.get("expert"),
        "time": ", ".join(minutes) or "not logged: the run has not ended",
        "peak memory": f"{memory:.1f} GiB" if memory else "not logged",
        "machine": timing.get("machine", "not logged by the version that made this run"),
    }

    def cell(metric, summary):
        return possible(metric, summary["all rounds"].get(metric, UNKNOWN))

    def difference(metric, name):
        return possible(metric, paired_difference(results[first], results[name], metric), True)

    first, *others = [*results] or [None]
    differences = {f"{first} - {name}": [difference(m, name) for m in METRICS] for name in others}
    steps, sft, probe = (read_lines(folder / f"{n}.jsonl") for n in ("metrics", "sft/metrics", "probe"))
    shown = {k: v for k, v in config.items() if v is not None and k not in ("script", "out")}
    return {
        "facts": facts,
        "settings": {k: " ".join(map(str, v)) if isinstance(v, list) else str(v) for k, v in shown.items()},
        "metrics": [*METRICS],
        "table": {name: [cell(m, summary) for m in METRICS] for name, summary in results.items()},
        "differences": differences,
        "levels": next((line["levels"] for line in probe if "levels" in line), {}),
        "probe": [line for line in probe if "stage" in line],
        "sft": [[line["step"], line["loss"]] for line in sft if "loss" in line],
        "steps": [{k: v for k, v in line.items() if isinstance(v, (int, float))} for line in steps],
    }


def run_data(folder: Path, budget: int) -> dict:
    """All that the page says about a run, in about as many characters as the budget. Raises InputError for a
    folder that holds no run."""
    if not (folder / "config.json").exists() or not (folder / "samples.jsonl").exists():
        raise InputError(f"{folder} is not the folder of a run of train_rft.py: it has no samples.jsonl")
    files = (folder / f"{name}.json" for name in ("config", "timing", "eval"))
    config, timing, evaluation = (read_json(file) if file.exists() else {} for file in files)
    try:
        samples, found = read_lines(folder / "samples.jsonl"), evaluation.get("results", {})
        results = {PLAYERS.get(n, n.replace("expert:", "expert ")): row for n, row in found.items()}
        asked = read_prompts(folder)
        missing = {
            "prompts.jsonl: no groups": not asked,
            "eval.json: the run has not been evaluated (yet)": not found,
        }
        return {
            "name": clean(folder.name or str(folder)),
            "missing": [what for what, lacking in missing.items() if lacking],
            "overview": rounded(overview(config, timing, results, folder)),
            "constant": about_constant(found),
            "groups": groups_of(config, samples, asked, budget // 2),
            "games": games_of(results, budget // 3, config.get("partners")),
            "learned": rounded(learned(found, config.get("expert"))),
        }
    except (LookupError, TypeError, AttributeError, ValueError) as e:
        what = f"{type(e).__name__}: {one_line(e)}"
        raise InputError(f"{folder} holds files that are not those of a run ({what})") from None


def write_page(folders: list[Path], out: Path) -> int:
    """Writes the page and returns its size in bytes. Raises InputError."""
    data = escaped([run_data(folder, PAGE // len(folders)) for folder in folders])
    page = TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/", data, 1).encode()
    write_atomic(out, page)
    return len(page)


def of_run(folder: Path) -> str:
    """For the end of a run: writes FOLDER/run.html, and says where it is or why it could not be written."""
    try:
        write_page([Path(folder)], Path(folder) / "run.html")
    except Exception as e:  # whatever it is, it must not cost the user the end of a long run
        return f"no page of the run: {one_line(e)}"
    return f"the run as a page: {Path(folder) / 'run.html'}"


@reports_errors
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description="Write a page that shows what the policy of a run did.")
    parser.add_argument("run", nargs="+", type=Path, help="folders of runs of train_rft.py")
    parser.add_argument("-o", "--out", type=Path, help="the page (default: run.html in the first folder)")
    args = parser.parse_args(argv)
    out = args.out or args.run[0] / "run.html"
    size = write_page(args.run, out)
    print(f"{out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
