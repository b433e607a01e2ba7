"""A run, or several, as one page: what the policy did, looked at closely.

    python -m tools.view runs/tompo                          # writes runs/tompo/run.html
    python -m tools.view runs/tompo runs/grpo -o both.html

The page needs no network and opens from disk. It shows what was run and what came of it, the groups of
replies of every step of RFT with the numbers that made their advantages, the games of the evaluation with the
exact value of every choice that was not taken, and whom the policy links to before and after RFT. All of it
comes from files of the run; what an older run lacks is left out, and the page says so.

This file and tools/page/ read the files and compute values; tools/view.html draws them. What a model wrote is
data there: it is embedded as escaped JSON and becomes text, never markup.
"""

import argparse
import json
from pathlib import Path

import world  # noqa: F401  (it registers the games that the files name)
from play.metrics import METRICS, paired_difference
from run.files import InputError, one_line, read_json, read_lines, reports_errors, write_atomic
from tools.page.games import games_of
from tools.page.groups import groups_of, prompts_of
from tools.page.learned import learned
from tools.page.text import clean, escaped, rounded

TEMPLATE = Path(__file__).with_suffix(".html")
PAGE = 2_700_000  # characters of data on a page; half of a run's share is for groups, a third for games

# -------------------- overview


def overview(config: dict, timing: dict, results: dict, folder: Path) -> dict:
    seconds = timing.get("seconds", {})
    times = ", ".join(f"{stage} {s / 60:.1f} min" for stage, s in seconds.items())
    defaults = {k: v for k, v in config.items() if v is not None and k not in ("script", "resumed", "out")}
    facts = {
        "what": f"{config.get('algo')} on {config.get('model')}, {config.get('steps')} steps of "
        f"{config.get('prompts')} graph and effort prompts, {config.get('m')} replies each, "
        f"expert {config.get('expert')}, seed {config.get('seed')}",
        "time": times or "not logged: the run has not ended",
        "peak memory": f"{timing['peak_memory_gib']:.1f} GiB"
        if timing.get("peak_memory_gib")
        else "not logged",
        "machine": timing.get("machine", "not logged by the version that made this run"),
    }
    first = next(iter(results), None)
    differences = {
        f"{first} - {name}": {m: paired_difference(results[first], results[name], m) for m in METRICS[1:]}
        for name in list(results)[1:]
    }
    metrics, sft = read_lines(folder / "metrics.jsonl"), read_lines(folder / "sft" / "metrics.jsonl")
    probe = read_lines(folder / "probe.jsonl")
    return {
        "facts": facts,
        "settings": {k: json.dumps(v) for k, v in defaults.items()},
        "metrics": METRICS,
        "table": {n: {m: s["all rounds"][m] for m in METRICS} for n, s in results.items()},
        "differences": differences,
        "levels": next((line["levels"] for line in probe if "levels" in line), {}),
        "probe": [line for line in probe if "stage" in line],
        "sft": [[line["step"], line["loss"]] for line in sft if "loss" in line],
        "steps": [{k: v for k, v in line.items() if isinstance(v, (int, float))} for line in metrics],
    }


# -------------------- the page


def run_data(folder: Path, budget: int) -> dict:
    """All that the page says about a run. Raises InputError for a folder that holds none."""
    if not (folder / "config.json").exists() or not (folder / "samples.jsonl").exists():
        raise InputError(f"{folder} is not the folder of a run of train_rft.py: it has no samples.jsonl")
    config = read_json(folder / "config.json")
    timing, results = (
        read_json(folder / name) if (folder / name).exists() else {} for name in ("timing.json", "eval.json")
    )
    try:
        results = results.get("results", {})
        samples = read_lines(folder / "samples.jsonl")
        prompts = prompts_of(folder, samples)
        missing = []
        if not any("chat" in p for p in prompts.values()):
            missing.append("prompts.jsonl: no prompts, instances and graphs of the experts in the groups")
        if not results:
            missing.append("eval.json: the run has not been evaluated (yet)")
        elif not all("actions" in summary for summary in results.values()):
            missing.append("all agents' choices in eval.json: of its games there are only measures")
        return {
            "name": clean(folder.name or str(folder)),
            "missing": missing,
            "overview": rounded(overview(config, timing, results, folder)),
            "groups": groups_of(config, samples, prompts, budget // 2),
            "games": games_of(results, budget // 3),
            "learned": rounded(learned(samples, prompts, results)),
        }
    except (LookupError, TypeError, AttributeError, ValueError) as e:
        what = " ".join(f"{type(e).__name__}: {e}".split())
        raise InputError(f"{folder} holds files that are not those of a run ({what})") from None


def write_page(folders: list[Path], out: Path) -> int:
    """Writes the page and returns its size in bytes. Raises InputError."""
    data = escaped([run_data(folder, PAGE // len(folders)) for folder in folders])
    page = TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/", data, 1).encode()
    write_atomic(out, page)
    return len(page)


def of_run(folder: Path) -> str:
    """For the end of a run: writes FOLDER/run.html, and says where it is or why it is not."""
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
