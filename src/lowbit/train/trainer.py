"""Training runs on Lightning's Trainer that continue bit for bit after a kill.

A run is a folder: ``config.yaml`` (every setting), ``conversion.txt`` and ``proof.txt`` (what its first step ran), both
also as ``.json``, ``ledger.jsonl`` (what every step computed), ``measured.jsonl`` (seconds and joules), ``last.ckpt``
and ``last-1.ckpt``, ``csv/metrics.csv``, ``tensorboard/`` and, once it is complete, ``result.json``. One process writes
to it at a time. What is random in step i follows from the settings and i alone: the loader is a pure function of (seed,
epoch, batch), torch is seeded anew before each step, and lowbit counts its own noise.
"""

import contextlib
import copy
import itertools
import math
import platform
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lowbit
from lowbit import amp, ranks
from lowbit.errors import ElsewhereError, RunError, Stopped, UsageError
from lowbit.evidence.names import layer_names
from lowbit.inputs import files
from lowbit.products.watch import observed_by
from lowbit.train import checkpoint, data
from lowbit.train.assembly import assemble, fastest_amp, threads_of
from lowbit.train.busy import Others
from lowbit.train.callbacks import Evaluated, MemoryOfStep, MeterSteps, StepTimer, ignored
from lowbit.train.config import Result, TrainConfig
from lowbit.train.fitting import fit, make_trainer, quiet
from lowbit.train.folder import (
    CHECKPOINT,
    CONFIG,
    LEDGER,
    PROOF,
    RESULT,
    Settings,
    read_settings,
    refuse_taken,
    sources,
    write_result,
    write_settings,
    write_sources,
)
from lowbit.train.lock import locked, refuse_held
from lowbit.train.loggers import check_installed
from lowbit.train.measured import measured
from lowbit.train.merging import MergedLedger
from lowbit.train.module import Module
from lowbit.train.processes import check_same, exchanged, first, is_of_a_lost_one, met, together
from lowbit.train.progress import SILENT, Progress
from lowbit.train.resuming import check_fit, newest, result_of_complete, resume_point
from lowbit.train.step import NotFiniteError, autocast, loss_and_accuracy
from lowbit.train.stop import Leave, Stop, signals


def train(config: TrainConfig, *, evaluated: Evaluated = ignored, progress: Progress = SILENT) -> Result:
    """Run `config` from its first step in a new run folder.

    SIGINT, SIGTERM and SIGHUP end the run once the step in progress, and an evaluation in progress, is done and saved;
    a second signal of the kind ends it at once.

    Args:
        config: the settings.
        evaluated: hears of each evaluation of the run: it gets the ledger so far.
        progress: hears how far the run is.

    Raises:
        UsageError: a name is unknown, the settings do not fit together, or the run folder is taken.
        RunError: the loss or the state is not finite, the disk is full, or another process has the run folder.
        Stopped: a signal came; its text says how to go on. It is a KeyboardInterrupt.
    """
    others, chosen = Others(), config.threads is None
    with met():
        config = config.resolved(threads=torch.get_num_threads(), amp=fastest_amp(config))
        check_same(config.to_dict() | {"out": str(config.out)})
        check_installed(config)
        if not ranks.is_one_of_several():
            _refuse_alone(config)
        out = _checked(config.out)
        progress = progress if ranks.rank() == 0 else SILENT
        with _ending(out) as stop, contextlib.closing(progress):

            def free() -> None:
                refuse_held(out)
                refuse_taken(out)

            def begin() -> None:
                refuse_taken(out)
                files.remove_parts(out)
                write_settings(Settings(config=config))

            first(free)
            with threads_of(config):
                with together():
                    loaded, module, report = assemble(config)
                with _held(out):
                    first(begin)
                    stop.saved = 0  # there is a run to resume
                    first(lambda: write_sources(config))
                    assert config.threads is not None
                    alone = not ranks.is_one_of_several()
                    if alone and chosen and (advice := others.advice(config.threads)):
                        progress.say(advice)
                    return _run(stop, loaded, module, report, None, evaluated, progress)


def resume(
    out: Path,
    changes: Mapping[str, object] | None = None,
    *,
    data_changed: bool = False,
    drop_damaged: bool = False,
    evaluated: Evaluated = ignored,
    progress: Progress = SILENT,
) -> Result:
    """Continue the run in folder `out` from its last good checkpoint; a complete run just gives its result.

    The final weights are bit for bit those of a run that was never stopped, on the same machine. A run that
    was stopped before its first checkpoint starts again from step 0. Where the newest checkpoint is damaged, the one
    before it is taken and stderr says so. Signals: as `train`.

    Args:
        out: run folder.
        changes: settings that change from here on, of `CHANGEABLE`; ``config.yaml`` keeps what changed, and when.
        data_changed: go on although the data set is not what it was at the checkpoint; ``config.yaml`` says so.
        drop_damaged: go on although lines of the ledger are damaged; the steps in them are missing from it.
        evaluated: as `train`.
        progress: as `train`.

    Raises:
        UsageError: `out` is not a run folder, or a change is impossible.
        RunError: the settings, the ledger or the result are damaged, no checkpoint is good or the newest is of another
            run, or the data set changed; or as `train`.
        Stopped: as `train`.
    """
    with met(), _ending(_checked(out)) as stop, contextlib.closing(progress):
        progress = progress if ranks.rank() == 0 else SILENT
        with together():
            if not (out / CONFIG).is_file():
                raise UsageError(f"{out} is not a run folder: it lacks {CONFIG}. Start a run with `lowbit train`.")
        if not changes:
            first(lambda: refuse_held(out))
            if (complete := first(lambda: result_of_complete(out))) is not None:
                return complete
        with _held(out):
            first(lambda: files.remove_parts(out))
            with together():
                settings = read_settings(out)
                config = settings.config.changed(changes or {})
                check_installed(config)
            with threads_of(config):
                with together():
                    loaded, module, report = assemble(config)

                def point(*, here: bool) -> tuple[dict[str, Any] | None, list[str]]:
                    with together():
                        return resume_point(settings, loaded, module, data_changed=data_changed) if here else (None, [])

                # Rank 0 sets damaged checkpoints aside before the others look.
                start, changed_data = point(here=ranks.rank() == 0)
                if ranks.is_one_of_several():
                    found = point(here=ranks.rank() > 0)
                    start, changed_data = (start, changed_data) if ranks.rank() == 0 else found
                step = 0 if start is None else start["global_step"]
                after = settings.changed(config, step=step, data=changed_data)
                if after != settings:
                    first(lambda: write_settings(after))
                return _run(stop, loaded, module, report, start, evaluated, progress, drop_damaged=drop_damaged)


def trained(out: Path) -> tuple[nn.Module, data.Data]:
    """The converted model of a run's last good checkpoint, and its data.

    Raises:
        UsageError: `out` is not a run folder, or has no checkpoint yet.
        RunError: the settings or the checkpoints are damaged.
    """
    if not (out / CONFIG).is_file() or not checkpoint.kept(out / CHECKPOINT):
        raise UsageError(f"{out} has no {CONFIG} with a {CHECKPOINT}: give the folder of a run that saved a checkpoint")
    settings = read_settings(out)
    loaded, module, _ = assemble(settings.config)
    path, content = newest(settings)
    check_fit(path, content, module)
    module.load_state_dict(content["state_dict"])
    lowbit.load_state_dict(module.model, content["lowbit"]["state"])
    return module.model, loaded


def _checked(out: Path | None) -> Path:
    assert out is not None
    if "\0" in str(out):
        raise UsageError(f"the run folder {str(out)!r} has a NUL byte in its name.")
    return out


def _refuse_alone(config: TrainConfig) -> None:
    """Raise where one process is asked for what several do."""
    given = [name for name in ("strategy", "exchange") if getattr(config, name) is not None]
    if given:
        raise UsageError(
            f"{given[0]} is a setting of several processes, and this is one: start them with "
            "`torchrun --nproc-per-node 2 -m lowbit train`, or leave it out."
        )


@contextlib.contextmanager
def _held(out: Path) -> Iterator[None]:
    """Hold the lock of the run folder, on rank 0 for all."""
    with contextlib.ExitStack() as lock:

        def take() -> None:
            out.mkdir(parents=True, exist_ok=True)
            lock.enter_context(locked(out))

        first(take)
        yield


@contextlib.contextmanager
def _ending(out: Path) -> Iterator[Stop]:
    """Turn what stops a run from outside into this library's errors."""
    with signals() as stop:
        try:
            yield stop
        except Leave:
            assert stop.signal is not None
            raise Stopped(f"{stop.signal.name}: stopped; {_how_to_go_on(out, stop)}", stop.signal) from None
        except NotFiniteError as error:
            assert stop.saved is not None
            kept = f"The last good state is of step {stop.saved}"
            raise RunError(
                f"{error} {kept}: `lowbit resume {out} --lr RATE` goes on from there with another learning rate."
            ) from error
        except amp.ScaleError as error:
            assert stop.saved is not None
            raise RunError(
                f"{error}. The last checkpoint is of step {stop.saved}: `lowbit resume {out} --lr RATE` goes on from "
                "there with another learning rate."
            ) from error
        except RuntimeError as error:
            if isinstance(error, RunError) or not is_of_a_lost_one(error):
                raise
            raise ElsewhereError(f"another process of the run is gone; {_how_to_go_on(out, stop)}.") from error
        except OSError as error:  # a log on a full disk, an image that is gone
            raise RunError(f"stopped by the system ({error}); {_how_to_go_on(out, stop)}.") from error
        if stop.signal is not None:
            raise Stopped(f"{stop.signal.name}: the run is complete; `lowbit resume {out}` shows it", stop.signal)


def _how_to_go_on(out: Path, stop: Stop) -> str:
    if stop.saved is None:
        return "nothing had changed yet: give the command again"
    return f"`lowbit resume {out}` starts from step {stop.saved}"


def _run(
    stop: Stop,
    loaded: data.Data,
    module: Module,
    report: lowbit.Report,
    start: dict[str, Any] | None,
    evaluated: Evaluated,
    progress: Progress,
    *,
    drop_damaged: bool = False,
) -> Result:
    """Take the run from the checkpoint `start`, or from step 0 without one, to its end."""
    config, out, is_first = module.config, module.config.out, ranks.rank() == 0
    assert out is not None
    module.sources = sources(config)
    timer, memory = StepTimer(), None
    began = stop.saved = 0 if start is None else start["global_step"]
    if start is None:
        first(lambda: _write_report(out / "conversion.txt", str(report), report))
        if config.proof is not False:
            progress.begin("proof of the first step", sum(len(row.engines) for row in report.rows))
            with together():
                proof = _prove(config, loaded, module, progress)
            progress.end()
            _note_other_ranks(proof)
            first(lambda: _write_report(out / PROOF, f"{proof.summary()}\n\n{proof}", proof))
    if began < module.total_steps:
        whole = None
        with together():
            if is_first:
                (out / RESULT).unlink(missing_ok=True)  # of the run before it went on
                whole = _open_ledger(config, module.model, start, drop_damaged=drop_damaged)
        if whole is None or ranks.is_one_of_several():
            own = lowbit.Ledger(model=config.model, layers=layer_names(module.model), first_step=began)
        else:
            own = whole
        timed = measured(out, steps=lambda: began + len(timer.seconds), seconds_per_step=timer.median)
        with (
            quiet(),
            timed if is_first else contextlib.nullcontext(),
            contextlib.nullcontext() if whole is None else contextlib.closing(whole),
            lowbit.Meter(module.model, own) as meter,
        ):
            resumed = start is not None
            measuring = MemoryOfStep(meter)
            steps = MeterSteps(meter, MergedLedger(own, whole), evaluated)
            trainer = make_trainer(config, timer, start, steps, stop, module, measuring, progress)
            fit(trainer, module, loaded, stop, resumed=resumed)
            memory = measuring.found
    test = None if module.controller is None else module.controller.range_test
    result = Result(
        test_loss=module.test.get("test_loss", math.nan),
        test_accuracy=module.test.get("test_accuracy"),
        test_bits_per_byte=module.test.get("test_bits_per_byte"),
        seconds_per_step=timer.median(),
        steps=module.total_steps,
        recipe=config.recipe,
        converted=sum(row.converted for row in report.rows),
        layers=len(report.rows),
        out=out,
        macs=module.cost["macs"],
        bit_operations=module.cost["bit_operations"],
        low=None if test is None else test.chosen,
        model=config.model,
        data=config.data,
        seed=config.seed,
        engines=dict(Counter(engine for row in report.rows for engine in row.engines.values())),
        versions={"lowbit": version("lowbit"), "torch": torch.__version__, "python": platform.python_version()},
        memory=memory,
        processes=ranks.world_size(),
    )

    def write() -> Result:
        write_result(result)
        return result

    return first(write)


def _prove(config: TrainConfig, loaded: data.Data, module: Module, progress: Progress) -> lowbit.Proof:
    """What the first step runs, measured on a copy: the run itself is not touched."""
    products = itertools.count(1)
    before = loaded.train.state_dict()
    x, y = next(iter(loaded.train))
    loaded.train.load_state_dict(before)
    copied, controller = copy.deepcopy((module.model, module.controller))
    copied.train()
    with lowbit.verify(copied) as proof, observed_by(lambda _: progress.move(next(products))):
        with autocast(config, x.device.type):
            loss, _ = loss_and_accuracy(copied(x), y)
        loss.backward()
    if controller is not None:
        controller.remove()  # it may measure, and would go on until the copy is collected
    return proof


def _write_report(path: Path, text: str, report: lowbit.Report | lowbit.Proof) -> None:
    """Write a report as text, and beside it as JSON."""
    files.write_text(path, f"{text}\n")
    files.write_text(path.with_suffix(".json"), f"{report.to_json()}\n")


def _open_ledger(
    config: TrainConfig, model: nn.Module, start: dict[str, Any] | None, *, drop_damaged: bool
) -> lowbit.Ledger:
    """The ledger of the run, without the records that follow the checkpoint `start`."""
    assert config.out is not None
    path, began = config.out / LEDGER, 0 if start is None else start["global_step"]
    if began and path.exists():
        ledger = lowbit.Ledger.resume(path, steps=began, drop_damaged=drop_damaged)
    else:
        ledger = lowbit.Ledger.create(path, model=config.model, layers=layer_names(model), first_step=began)
        if began:
            ledger.add_note(f"the run had no ledger when it was resumed at step {began}: earlier steps are not in it")
    processes = 1 if start is None else start["lowbit"].get("processes", 1)
    if ranks.world_size() != processes:
        ledger.add_note(
            f"from step {began} on, batches were shared by {ranks.world_size()} processes instead of {processes}"
        )
    return ledger


def _note_other_ranks(proof: lowbit.Proof) -> None:
    """Say in the proof of rank 0 whether the other ranks ran the same."""
    if not ranks.is_one_of_several():
        return
    every = exchanged({(row.layer, row.product): (row.kernel, row.bits) for row in proof.rows})
    others = [
        f"process {rank} differs in {layer} {product}: {', '.join(ran.get((layer, product), ('nothing',)))}"
        for rank, ran in enumerate(every)
        for layer, product in sorted(every[0].keys() | ran.keys())
        if ran.get((layer, product)) != every[0].get((layer, product))
    ]
    said = [f"this is what process 0 of {len(every)} ran on its part of the first batch, and the others ran the same"]
    proof.notes.extend(others or said)
