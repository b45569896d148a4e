"""What NVML says of the GPUs, through pynvml; nothing where there is no driver, and less where a figure is not had.

Units: percent, MiB, watts, joules since the reader was opened, degrees Celsius, MHz, MiB/s.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

# Bits of nvmlDeviceGetCurrentClocksEventReasons that mean the clocks are held down for a cause worth telling.
_SLOWDOWNS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
}


class GpuReader:
    """Reads every GPU of this machine. Use `.close()` when done.

    `problem` says why there is nothing to read, or is empty.
    """

    def __init__(self, nvml: Any = None) -> None:
        """`nvml`: the pynvml module, or something that answers like it (tests)."""
        self._handles: list[Any] = []
        self._energy: dict[
            int, float
        ] = {}  # of each GPU when it was first read: the counter runs since the driver's load
        self.problem = ""
        try:
            self._nvml = nvml or _import_pynvml()
            self._nvml.nvmlInit()
        except Exception as error:  # noqa: BLE001 - no driver, no NVML library, a stub of it: all are "no GPU to read"
            self.problem = f"no NVIDIA driver answers ({error})"
            return
        count = self._try(self._nvml.nvmlDeviceGetCount) or 0
        handles = (self._try(self._nvml.nvmlDeviceGetHandleByIndex, index) for index in range(count))
        self._handles = [handle for handle in handles if handle is not None]
        if not self._handles:
            self.problem = "the NVIDIA driver shows no GPU"

    @property
    def count(self) -> int:
        """GPUs that can be read."""
        return len(self._handles)

    def describe(self) -> list[dict[str, Any]]:
        """Name, memory in MiB and MIG mode of each GPU."""
        return [
            {
                "name": _text(self._try(self._nvml.nvmlDeviceGetName, handle)),
                "memory_mb": _mib(self._try(self._nvml.nvmlDeviceGetMemoryInfo, handle), "total"),
                "mig": bool((self._try(self._nvml.nvmlDeviceGetMigMode, handle) or (0, 0))[0]),
            }
            for handle in self._handles
        ]

    def driver(self) -> str:
        """The driver's version, or an empty text."""
        return _text(self._try(self._nvml.nvmlSystemGetDriverVersion)) if self.count else ""

    def read(self) -> list[dict[str, Any]]:
        """One reading of each GPU; a figure that a GPU does not give is left out, and a lost GPU says so."""
        return [self._read_one(index, handle) for index, handle in enumerate(self._handles)]

    def close(self) -> None:
        """Let go of NVML."""
        if self._handles:
            self._try(self._nvml.nvmlShutdown)
            self._handles = []

    def _read_one(self, index: int, handle: Any) -> dict[str, Any]:
        nvml, get = self._nvml, self._try
        rates = get(nvml.nvmlDeviceGetUtilizationRates, handle)  # not given under MIG
        power = get(nvml.nvmlDeviceGetPowerUsage, handle)
        energy = get(nvml.nvmlDeviceGetTotalEnergyConsumption, handle)
        decoder = get(nvml.nvmlDeviceGetDecoderUtilization, handle)
        reasons = get(nvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
        received = get(nvml.nvmlDeviceGetPcieThroughput, handle, nvml.NVML_PCIE_UTIL_RX_BYTES)
        processes = get(nvml.nvmlDeviceGetComputeRunningProcesses, handle)
        figures = {
            "memory_mb": _mib(get(nvml.nvmlDeviceGetMemoryInfo, handle), "used"),
            "utilisation": getattr(rates, "gpu", None),
            "power_w": power / 1000 if power is not None else None,
            "energy_j": (energy - self._energy.setdefault(index, energy)) / 1000 if energy is not None else None,
            "temperature_c": get(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
            "sm_clock_mhz": get(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
            "decoder": decoder[0] if decoder else None,
            "pcie_in_mb_s": received / 1024 if received is not None else None,
            "processes": len(processes) if processes is not None else None,
        }
        read: dict[str, Any] = {name: value for name, value in figures.items() if value is not None}
        slowed = [name for bit, name in _SLOWDOWNS.items() if (reasons or 0) & bit]
        if slowed:
            read["slowed_by"] = ", ".join(slowed)
        return read or {"lost": True}  # a lost GPU answers nothing

    @staticmethod
    def _try(call: Callable[..., Any], *arguments: Any) -> Any:
        """None where NVML does not support the figure, or has lost the GPU."""
        try:
            return call(*arguments)
        except Exception:  # noqa: BLE001 - NVMLError has a class an error code; a monitor must not end a run
            return None


def _import_pynvml() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pynvml
    return pynvml


def _mib(memory: Any, field: str) -> float | None:
    return getattr(memory, field) / 2**20 if memory is not None else None


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value or "")
