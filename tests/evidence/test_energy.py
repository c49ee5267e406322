"""Energy where the machine tells it, and a clear word where it does not."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lowbit.evidence.energy import measured_energy


def fake_zeus(monkeypatch: pytest.MonkeyPatch, monitor: Any) -> None:
    """Put a package `zeus` in place whose monitor is `monitor`."""
    package, module = ModuleType("zeus"), ModuleType("zeus.monitor")
    module.ZeusMonitor = monitor
    monkeypatch.setitem(sys.modules, "zeus", package)
    monkeypatch.setitem(sys.modules, "zeus.monitor", module)


def machine(**energies: Any) -> Any:
    """A machine that reports these energies in joules."""
    window = SimpleNamespace(gpu_energy={}, cpu_energy=None, dram_energy=None, **{})
    window.__dict__.update(energies)
    return lambda: SimpleNamespace(
        gpu_indices=list(energies.get("gpu_energy", {})),
        cpu_indices=list(energies.get("cpu_energy") or {}),
        begin_window=lambda _: None,
        end_window=lambda _: window,
    )


def test_all_counters_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """Joules of processors, memory and cards add up, and the source says which there were."""
    fake_zeus(monkeypatch, machine(gpu_energy={0: 5.0, 1: 2.0}, cpu_energy={0: 3.0}, dram_energy={0: 1.5}))

    with measured_energy() as energy:
        pass

    assert energy.joules == 11.5
    assert energy.reason.startswith("GPU + CPU + DRAM")


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without zeus there is no figure, and the word says what to install."""
    monkeypatch.setitem(sys.modules, "zeus", None)

    with measured_energy() as energy:
        pass

    assert energy.joules is None
    assert energy.reason == "not available here: pip install 'lowbit[energy]'"


def raising() -> Any:
    """A machine whose counters cannot be read."""
    raise PermissionError("/sys/class/powercap is not readable\nsecond line")


@pytest.mark.parametrize(("monitor", "part"), [(machine(), "neither RAPL nor NVML"), (raising, "not readable")])
def test_a_machine_without_counters_is_said(monitor: Any, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that reports nothing, or may not be read, gives no figure and one line of reason."""
    fake_zeus(monkeypatch, monitor)

    with measured_energy() as energy:
        pass

    assert energy.joules is None
    assert energy.reason.startswith("not available here (")
    assert part in energy.reason
    assert "\n" not in energy.reason


def test_an_exception_passes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails inside is not hidden, and is still measured."""
    fake_zeus(monkeypatch, machine(cpu_energy={0: 3.0}))
    seen = []

    def fail() -> None:
        with measured_energy() as energy:
            seen.append(energy)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen[0].joules == 3.0
