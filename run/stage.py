"""A training stage (SFT or RFT): all that surrounds its steps.

    with Stage(folder, "SFT", 40, parameters, optimizer, stop, flags) as stage:
        for step in stage.steps():
            ...                                           # gradients, optimizer.step()
            stage.end_step({"loss": loss}, f"loss {loss:.3f}")
    stage.finished

This is where a stage is saved and resumed, where it logs, shows its progress, stops on Ctrl-C, and ends when
another process is lost. A checkpoint is the state at the end of a step, never one within it.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from run import checkpoint, ranks
from run.errors import InputError
from run.files import RECORDED, JsonLines, StopSignal

SAVE_EVERY = 10  # steps between checkpoints


class Stage:
    """steps_done, seconds: how many steps are done and what they took, without the probe; both include what
    came before a resume. state: a JSON object that is saved with every checkpoint; the caller fills it. log:
    metrics.jsonl. probe: set by the caller; called with (steps_done, seconds) before the first step and after
    each one, it returns what the progress bar is to show of it."""

    probe: Callable[[int, float], str] | None = None

    def __init__(
        self,
        folder: Path,
        name: str,
        steps: int,
        parameters: dict[str, torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        stop: StopSignal,
        flags: dict,
    ):
        """Restores the newest checkpoint in FOLDER/checkpoints, if there is one. parameters: those that are
        trained, by their names in a checkpoint; flags: what config.json holds. InputError: as in
        checkpoint.restore."""
        self.folder, self.parameters, self.optimizer = folder, parameters, optimizer
        self.steps_done, self.seconds, self.state = 0, 0.0, {}
        self._steps, self._stop, self._out = steps, stop, flags["out"]
        as_saved = json.loads(json.dumps(flags))
        others = {"out"} | RECORDED
        self._settings = {name: as_saved[name] for name in as_saved if name not in others}
        self._stopping, self._changed = False, False  # _changed: the parameters, within this step
        self._logs: list[JsonLines] = []
        self._lines: dict[str, int] = {}  # of each log, at the time of the checkpoint
        optimizer.register_step_post_hook(self._note_change)
        restored = checkpoint.restore(folder / "checkpoints", parameters, optimizer)
        if restored:
            self.steps_done, self.state = restored
            self.seconds = self.state.pop("seconds", 0.0)
            self._lines = self.state.pop("lines", {})
            self._report_changes(self.state.pop("settings", {}))
            if ranks.first():
                checkpoint.prune(folder / "checkpoints", self.steps_done)
        folder.mkdir(parents=True, exist_ok=True)
        self.log = self.open_log("metrics")
        shown = dict(total=steps, initial=self.steps_done, desc=name, unit="step")
        self._bar = tqdm(**shown, disable=not ranks.first())

    def _note_change(self, *_) -> None:
        self._changed = True

    def _report_changes(self, saved: dict) -> None:
        """Prints which settings are others than those of the checkpoint. It is no reason to stop, since some
        may be changed with a good reason. A setting that is newer than the checkpoint was not changed."""
        now = self._settings
        changes = [f"{k} {v!r} -> {now[k]!r}" for k, v in saved.items() if k in now and now[k] != v]
        if changes:
            what = f"{self.folder}: this was changed after the checkpoint: {', '.join(changes)}"
            tqdm.write(f"{what}. So it is no longer the run that was begun, and it goes on as it is now")

    def open_log(
        self, name: str, keep: Callable[[dict], bool] | None = None, folder: Path | None = None
    ) -> JsonLines:
        """FOLDER/name.jsonl, which the first process writes. keep: which of the lines that are there stay; by
        default those of steps that are done. Its lines are counted in every checkpoint, and lost ones are
        reported: no weight depends on a log, so that is no reason to stop."""
        keep = keep or (lambda row: type(row.get("step")) is int and row["step"] < self.steps_done)
        log = JsonLines((folder or self.folder) / f"{name}.jsonl", keep, ranks.first())
        before = self._lines.get(log.path.name, 0)
        if log.count < before:
            lost = f"{log.path} has lost {before - log.count} of its {before} lines"
            tqdm.write(f"{lost}; the weights are not touched")
        self._logs.append(log)
        return log

    @property
    def finished(self) -> bool:
        """All steps are done, and nobody has asked to stop: what follows them would take long, too."""
        return self.steps_done >= self._steps and not self._stopping

    def steps(self) -> Iterator[int]:
        """The steps that are still to do, from 0. It ends early after Ctrl-C in any process."""
        if self.probe:  # here too, since a lost process may have cut it short after the last step
            self.probe(self.steps_done, self.seconds)
        while not self.finished and not self._stopping:
            self._started = time.perf_counter()
            yield self.steps_done

    @property
    def elapsed(self) -> float:
        """Seconds since this step began."""
        return time.perf_counter() - self._started

    def end_step(self, values: dict, live: str) -> None:
        """Logs the values, asks the probe, shows `live` on the bar, and saves when it is time to. InputError:
        the loss or the gradient norm is not finite."""
        for key, name in (("loss", "loss"), ("grad_norm", "gradient norm")):
            if not math.isfinite(values.get(key, 0.0)):
                self._refuse(f"step {self.steps_done}: the {name} is {values[key]}")
        self.log.write({"step": self.steps_done} | values)
        self.steps_done, self._changed = self.steps_done + 1, False
        self.seconds += self.elapsed
        if self.probe:
            live += self.probe(self.steps_done, self.seconds)
        self._bar.set_postfix_str(live)
        self._bar.update()
        self._stopping = any(ranks.exchange(self._stop.requested))
        if self._stopping or self.finished or self.steps_done % SAVE_EVERY == 0:
            self.save()
        if self._stopping:
            ranks.exchange(None)  # nobody leaves before the first process has saved

    def save(self) -> None:
        """Writes a checkpoint, in the first process. InputError: a parameter is not finite."""
        if not ranks.first():
            return
        for name, p in self.parameters.items():
            if not p.isfinite().all():
                self._refuse(f"after step {self.steps_done - 1}, {name} holds values that are not finite")
        for log in self._logs:
            log.sync()  # so that no checkpoint is newer than what a power cut leaves of the logs
        state = self.state | {"seconds": self.seconds, "settings": self._settings}
        state["lines"] = {log.path.name: log.count for log in self._logs}
        checkpoint.save(self.folder / "checkpoints", self.steps_done, self.parameters, self.optimizer, state)

    def _refuse(self, what: str) -> None:
        advice = f"the checkpoints in {self.folder} are from before; try a lower learning rate"
        raise InputError(f"{what}, and training ends here; {advice}")

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._bar.close()
        lost = isinstance(error, ranks.LostRank)
        if lost and self.steps_done and not self._changed:
            self.save()
        for log in self._logs:
            log.close()
        if lost:
            advice = f"continue from the newest checkpoint with --resume {self._out}"
            raise InputError(f"{error}; {advice}") from None
