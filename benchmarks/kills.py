"""Kill training runs at random moments, beside a competing process, and see whether anything is lost.

Each round starts `lowbit train` or `lowbit resume` on a small run, and a second `lowbit resume` of the same folder
beside it, and ends one or both at a random moment: by SIGKILL, by a signal that a run answers (sent twice in one case
of four), or by a write that fails (a limit on the size of files). Between rounds the newest checkpoint is sometimes
damaged. Once the run is complete, its weights, optimizer and ledger are compared bit for bit with those of a run that
nobody touched. Example:

    python benchmarks/kills.py --kills 200 --out runs/kills

Rounds are appended to rounds.jsonl in the folder, so that the command may be stopped and given again. Processes are
forked from this one once it has imported torch, which is most of the time that a start takes.
"""

import argparse
import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from lowbit import machine
from lowbit.cli import main as cli
from lowbit.errors import RunError
from lowbit.evidence.ledger import Ledger
from lowbit.train import checkpoint, trainer

RUN = [
    "--model",
    "mlp",
    "--data",
    "digits",
    "--recipe",
    "cpt-int8",
    "--cycles",
    "4",
    "--batch-size",
    "64",
    "--lr",
    "0.05",
]
RUN += ["--subset", "640", "--epochs", "6", "--threads", "1", "--checkpoint-every", "3"]
KINDS = {"SIGKILL": 12, "SIGTERM": 2, "SIGINT": 2, "SIGHUP": 2, "failed write": 1, "damage": 2}
CODES = {"SIGTERM": 143, "SIGINT": 130, "SIGHUP": 129}
PATIENCE = 300.0  # seconds for one process, on a busy machine
SAME = ("state_dict", "optimizer_states", "lr_schedulers", "global_step")


class Process:
    """A `lowbit` command in a process of its own, whose stderr goes to a file."""

    def __init__(self, argv: list[str], said: Path, limit: int | None = None) -> None:
        self.said = said
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            self._child(argv, said, limit)

    @staticmethod
    def _child(argv: list[str], said: Path, limit: int | None) -> None:
        code = 70
        with contextlib.suppress(BaseException):
            out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.argv = ["lowbit", *argv]
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            code = cli.main(argv)
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)

    def wait(self, seconds: float = PATIENCE) -> bool:
        """Whether the process ended within this time; `code` is then what it ended with, negative for a signal."""
        end = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                return False
            else:
                time.sleep(0.002)
        return True

    def send(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if not self.wait(0):
            os.kill(self.pid, number)

    def text(self) -> str:
        """What it said."""
        return self.said.read_text(errors="replace") if self.said.exists() else ""


def steps_saved(run: Path) -> int:
    """The step of the newest checkpoint that is good; 0 without one."""
    for path in checkpoint.kept(run / "last.ckpt") if run.is_dir() else []:
        with contextlib.suppress(RunError):
            return int(checkpoint.load(path)["global_step"])  # type: ignore[call-overload]
    return 0


def damage(run: Path, draw: random.Random) -> str | None:
    """Damage the newest checkpoint, where the one before it is good; how."""
    kept = checkpoint.kept(run / "last.ckpt") if run.is_dir() else []
    if len(kept) < 2 or kept[0].name != "last.ckpt":
        return None
    for path in kept[:2]:
        try:
            checkpoint.load(path)
        except RunError:
            return None
    path, size = kept[0], kept[0].stat().st_size
    how = draw.choice(("bit", "cut", "empty", "zeros at the end"))
    if how == "bit":
        content = bytearray(path.read_bytes())
        content[draw.randrange(size)] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    else:
        os.truncate(path, {"cut": draw.randrange(1, size), "empty": 0, "zeros at the end": size - 4096}[how])
        if how == "zeros at the end":
            os.truncate(path, size)
    try:
        checkpoint.load(path)
    except RunError:
        return how
    return "a bit that no content depends on"  # of the archive's own names and padding: the load is the same


def play(run: Path, out: Path, seconds: float, draw: random.Random) -> dict[str, Any]:
    """One round; what happened, and what was wrong."""
    kind = draw.choices(list(KINDS), list(KINDS.values()))[0]
    before = steps_saved(run)
    how = damage(run, draw) if kind == "damage" else None
    if kind == "damage" and how is None:
        kind = "SIGKILL"
    floor = steps_saved(run)
    argv = ["resume", str(run)] if (run / "config.yaml").exists() else ["train", *RUN, "--out", str(run)]
    first = Process(argv, out / "first.txt", draw.randrange(1, 2_000_000) if kind == "failed write" else None)
    moment = draw.uniform(0, 1.1 * seconds)
    time.sleep(draw.uniform(0, moment))
    second = Process(["resume", str(run)], out / "second.txt")
    sent, twice = kind in {"failed write", "damage"}, False
    if not sent:
        sent = not first.wait(draw.uniform(0, moment))
        first.send(getattr(signal, kind))
        twice = kind in CODES and draw.random() < 0.25
        if twice:
            time.sleep(draw.uniform(0, 0.05))
            first.send(getattr(signal, kind))
    ended = first.wait()
    # The second one was refused, or has the folder by now: then it is killed too.
    taken = not second.wait(draw.uniform(0, 0.5 * seconds))
    if taken:
        second.send(signal.SIGKILL)
        second.wait()
    wrong = [*judge(kind, first, sent=sent), *judge_second(second, first), *judge_folder(run, floor)]
    named = re.search(r"starts from step (\d+)$", first.text().strip())
    if named and not taken and second.code != 0 and int(named[1]) != steps_saved(run):
        wrong.append(f"it named step {named[1]}, and resume starts from {steps_saved(run)}")
    if not ended:
        wrong.append("the first process did not end")
    return {
        "kind": kind,
        "how": how,
        "sent": sent,
        "twice": twice,
        "kills": int(kind == "SIGKILL" and sent) + int(taken),
        "codes": [first.code, second.code],
        "second": "killed" if taken else {0: "finished", 1: "refused", 2: "too early"}.get(second.code or 0, "failed"),
        "steps": [before, steps_saved(run)],
        "wrong": wrong,
    }


def judge(kind: str, first: Process, *, sent: bool) -> list[str]:
    """What was wrong with how the first process ended; another one may have had the folder before it."""
    allowed = {
        "SIGKILL": {0, -signal.SIGKILL},
        # Once the run has ended, the system's own answer to a signal counts; a shell shows the same number.
        **{name: {0, code, 128 - code} for name, code in CODES.items()},
        "failed write": {0, 1},
        "damage": {0},
    }[kind]
    refused = first.code == 1 and "is in use by process" in first.text()
    if first.code in allowed or refused or (kind in CODES and not sent):
        return []
    return [f"{kind} gave {first.code}: {first.text()[-300:]}"]


def judge_second(second: Process, first: Process) -> list[str]:
    """What was wrong with how the second process ended."""
    refused = second.code == 1 and f"is in use by process {first.pid} " in second.text()
    if refused or second.code in {0, 2, -signal.SIGKILL}:
        return []
    return [f"the second process ended with {second.code}: {second.text()[-300:]}"]


def judge_folder(run: Path, floor: int) -> list[str]:
    """What was wrong with the folder once both had ended."""
    wrong = []
    if steps_saved(run) < floor:
        wrong.append(f"it went back from step {floor} to {steps_saved(run)}")
    ledger = run / "ledger.jsonl"
    if ledger.exists() and b"\n" in ledger.read_bytes():
        try:
            Ledger.load(ledger)
        except RunError as error:
            wrong.append(str(error))
    return wrong


def compare(run: Path, whole: Path) -> list[str]:
    """What of a complete run differs from the run that nobody touched."""
    one, other = (torch.load(path / "last.ckpt", weights_only=True) for path in (run, whole))
    wrong = [key for key in SAME if not same(one[key], other[key])]
    wrong += ["ledger"] if (run / "ledger.jsonl").read_bytes() != (whole / "ledger.jsonl").read_bytes() else []
    wrong += ["metrics"] if (run / "csv/metrics.csv").read_bytes() != (whole / "csv/metrics.csv").read_bytes() else []
    results = [json.loads((path / "result.json").read_text()) | {"seconds_per_step": None} for path in (run, whole)]
    return wrong + (["result"] if results[0] != results[1] else [])


def same(a: object, b: object) -> bool:
    """Whether two trees of dicts, lists, tensors and values are bit for bit the same."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def table(rounds: list[dict[str, Any]]) -> str:
    """What was tried, how often, and what was lost, in Markdown."""
    lines = ["| what ended the first process | rounds | second process | lost |", "|---|--:|---|---|"]
    for kind in KINDS:
        of_kind = [entry for entry in rounds if entry.get("kind") == kind and entry["sent"]]
        seconds = ", ".join(f"{name} {n}" for name, n in Counter(entry["second"] for entry in of_kind).most_common())
        wrong = [text for entry in of_kind for text in entry["wrong"]]
        lines.append(f"| {kind} | {len(of_kind)} | {seconds} | {'; '.join(wrong) or 'nothing'} |")
    kills = sum(entry.get("kills", 0) for entry in rounds)
    complete = [entry for entry in rounds if "complete" in entry]
    differ = [text for entry in complete for text in entry["wrong"]]
    lines.append("")
    lines.append(
        f"{kills} processes were killed by SIGKILL. {len(complete)} runs were brought to their end in "
        f"{sum(1 for entry in rounds if 'kind' in entry)} rounds; different from the run that nobody touched: "
        f"{'; '.join(differ) or 'none'}."
    )
    return "\n".join(lines)


def main() -> int:
    """Run the study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="how many processes to kill by SIGKILL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/kills"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    assert trainer  # imported here, so that forks need not

    whole, log = args.out / "whole", args.out / "rounds.jsonl"
    shutil.rmtree(whole, ignore_errors=True)
    began = time.monotonic()
    first = Process(["train", *RUN, "--out", str(whole)], args.out / "whole.txt")
    if not first.wait() or first.code != 0:
        print(first.text(), file=sys.stderr)
        return 1
    seconds = time.monotonic() - began
    rounds = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    run = args.out / "run"
    while sum(entry.get("kills", 0) for entry in rounds) < args.kills:
        number = len(rounds)
        entry = play(run, args.out, seconds, random.Random(f"{args.seed} {number}"))
        if (run / "result.json").exists():
            # A signal or a kill after the last step may have left a result whose run goes on to the same end.
            last = Process(["resume", str(run)], args.out / "last.txt")
            last.wait()
            wrong = compare(run, whole) if last.code == 0 else [last.text()[-300:]]
            rounds += [entry, {"complete": True, "wrong": wrong}]
            if wrong:
                shutil.copytree(run, args.out / f"wrong-{number}", dirs_exist_ok=True)
            shutil.rmtree(run)
        else:
            rounds.append(entry)
        if entry["wrong"] and run.exists():
            shutil.copytree(run, args.out / f"wrong-{number}", dirs_exist_ok=True)
        log.write_text("".join(json.dumps(each) + "\n" for each in rounds))
        print(json.dumps(rounds[-1]), flush=True)
    print(f"\n{machine.here()}; {seconds:.1f} s for a run that nobody touches\n\n{table(rounds)}")
    return 0 if not any(entry["wrong"] for entry in rounds) else 1


if __name__ == "__main__":
    sys.exit(main())
