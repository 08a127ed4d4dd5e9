"""scripts/sft.py as a process of its own, many times over, without paying for its imports each time.

    server      a fresh interpreter that has imported everything and computed nothing (so it has no threads)
      └─ fork   runs the script as `__main__` with its arguments; may be killed from outside at any moment, or kills
                itself before the n-th of its fsyncs, renames and removals

Two seconds of imports a run would make a test of twenty kills take minutes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from tests import tiny_checkpoint

ROOT = Path(__file__).parents[2]
STEPS = 40
RECIPE = f"""--steps {STEPS} --batch 4 --micro-batch 3 --rank 4 --dropout 0.2 --held-out 0.2 --learning-rate 1e-2
    --patience 99 --save-minutes 0"""
WEIGHTS, STATE = "adapter_model.safetensors", "state.safetensors"

SERVER = """
import json, os, resource, runpy, signal, sys, traceback
import matplotlib.backends.backend_agg, matplotlib.figure, matplotlib.font_manager, rich.progress, safetensors.torch
import torch._dynamo, scripts.sft  # every optimizer imports the former

def watch(events, die_before):
    open(events, "w").close()
    seen = 0
    def watched(name):
        plain = getattr(os, name)
        def call(*arguments, **options):
            nonlocal seen
            seen += 1
            about = os.readlink(f"/proc/self/fd/{arguments[0]}") if name == "fsync" else str(arguments[-1])
            with open(events, "a") as file:
                file.write(f"{name} {os.path.basename(about)}\\n")
            if seen == die_before:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*arguments, **options)
        setattr(os, name, call)
    for name in ("fsync", "replace", "unlink"):
        watched(name)

def child(arguments, log, events, die_before, largest_file):
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1), os.dup2(output, 2)
    sys.argv = ["scripts/sft.py", *arguments]
    if events:
        watch(events, die_before)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    try:
        runpy.run_path("scripts/sft.py", run_name="__main__")
    except SystemExit as end:
        return end.code
    except BaseException:
        traceback.print_exc()
    return 1

print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        code = child(**json.loads(line))
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(pid, flush=True)
    sys.stdin.readline()  # not reaped before the parent asks: until then the number cannot be another process's
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Ended(NamedTuple):
    """How a run ended: its exit status (-9 where it was killed), what it printed, how many seconds it lived."""

    status: int
    said: str
    seconds: float


class Forks:
    """The server; a context manager. `prefix`: a command that starts it, such as one that makes a namespace."""

    def __init__(self, folder: Path, prefix: Sequence[str] = ()) -> None:
        self._log = folder / "said"
        self._server = subprocess.Popen(
            [*prefix, sys.executable, "-c", SERVER],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._server.pid
        if self._answer() != "ready":
            raise RuntimeError("the server did not start")

    def __enter__(self) -> Forks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(60)
        self._server.stdout.close()

    def run(self, *arguments: str, kill_after: float | None = None, **how: Any) -> Ended:
        """One run to its end, or to a SIGKILL after so many seconds.

        events: a file that gets a line for each fsync, rename and removal; die_before: the number of the one before
        which the run kills itself; largest_file: bytes beyond which no file may grow.
        """
        asked = {"events": None, "die_before": None, "largest_file": None, **how}
        begin = time.monotonic()
        pid = int(self._ask(json.dumps({"arguments": arguments, "log": str(self._log), **asked})))
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)
        status = int(self._ask(""))
        return Ended(status, self._log.read_text(errors="replace"), time.monotonic() - begin)

    def _ask(self, line: str) -> str:
        assert self._server.stdin is not None
        self._server.stdin.write(line + "\n")
        self._server.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline().strip()


@dataclass
class Runs:
    """Runs of one recipe, into folders of one's choice; and one that was never killed: its folder, seconds, events.

    Rank 4 on forty sums for 40 steps; dropout, so that random states matter; a state after every step.
    """

    forks: Forks
    folder: Path
    flags: tuple[str, ...] = ()
    count: int = 0

    def __post_init__(self) -> None:
        tiny_checkpoint.write(self.folder / "base")
        rows = [{"prompt": f"{a} + {b} =", "completion": " I" * (a + b + 1)} for a in range(8) for b in range(5)]
        (self.folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.straight, self.log = self.fresh(), self.folder / "events"
        ended = self.into(self.straight, events=str(self.log))
        assert ended.status == 0, ended.said
        self.life, self.events = ended.seconds, self.log.read_text().splitlines()

    def into(self, output: Path, *flags: str, **how: Any) -> Ended:
        return self.forks.run(*self.arguments(output, *flags), **how)

    def arguments(self, output: Path, *flags: str) -> list[str]:
        paths = ("--model", self.folder / "base", "--data", self.folder / "sums.jsonl", "--output", output)
        return [*map(str, paths), *RECIPE.split(), *self.flags, *flags]

    def fresh(self) -> Path:
        self.count += 1
        return self.folder / f"run{self.count}"

    def finish(self, output: Path) -> None:
        """What a person does after a kill: go on where there is a state, else start, where there is no adapter yet."""
        state, config = output / STATE, output / "adapter_config.json"
        if not state.exists() and output.exists():
            refused = self.into(output, "--resume")
            assert (refused.status, refused.said.count("\n")) == (2, 1), refused.said
            assert "so there is nothing to resume" in refused.said
        if state.exists() or not config.exists():
            ended = self.into(output, *(["--resume"] if state.exists() else []))
            assert ended.status == 0, ended.said

    def check(self, output: Path) -> None:
        """The same weights, history and files as of the run that was never killed; the curve is drawn when all is
        over."""
        ours, theirs = ({x for x in os.listdir(each) if "curve.png" not in x} for each in (output, self.straight))
        assert ours == theirs and WEIGHTS in ours
        assert (output / WEIGHTS).read_bytes() == (self.straight / WEIGHTS).read_bytes()
        told, expected = (json.loads((each / "training.json").read_text()) for each in (output, self.straight))
        assert len(told["losses"]) == STEPS and told["losses"] == expected["losses"]
        assert told["evaluated"] == expected["evaluated"]
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines if "loss" in line]
        assert losses == told["losses"], "a step is told twice, or not at all"

    def killed_after_saving(self, step: int) -> Path:
        """A folder of a run that was killed right after the state of that step was renamed, and that made to last."""
        saves = [at for at, event in enumerate(self.events, 1) if event == f"replace {STATE}"]
        begun = self.fresh()
        assert self.into(begun, events=str(self.log), die_before=saves[step - 1] + 2).status == -9
        assert self.log.read_text().splitlines()[-2] == f"fsync {begun.name}", "the rename was not made to last"
        return begun
