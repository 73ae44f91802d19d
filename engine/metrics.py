"""Figures about a run: timing, hardware peaks, entropy yardsticks."""

import bz2
import math
import os
import platform
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

# Dense bf16 peak, FLOP/s, from the vendors' data sheets; matched against the device's name.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "B200": 2250e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Peak of the device, or None when it is not in the table (every CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def cpu_flags() -> dict[str, Any]:
    """What torch knows of this CPU, by name; empty where it does not tell."""
    known: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    return known()


def bf16_instructions() -> bool:
    """Whether this CPU has instructions for bf16 products; without, they are slower than fp32."""
    return any(bool(found) for name, found in cpu_flags().items() if "bf16" in name)


def hardware(device: str) -> str:
    """Name of the processor, and how much of it is used; no name of the machine."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    name = next(names, platform.processor() or platform.machine())
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


@dataclass
class Stopwatch:
    """Seconds of the two parts of a step, summed since the last `read`.

    On a GPU the marks are events in the stream, read later, so measuring never waits for it.
    """

    device: torch.device
    _marks: list[list[float | torch.cuda.Event]] = field(default_factory=list)

    def mark(self, first: bool = False) -> None:
        """Mark a point in time of a step; `first` starts a step."""
        if first:
            self._marks.append([])
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks[-1].append(event)
        else:
            self._marks[-1].append(time.perf_counter())

    def drop(self, everything: bool = False) -> None:
        """Forget the step that was begun last, or all since the last read."""
        del self._marks[0 if everything else -1 :]

    def read(self) -> tuple[float, float]:
        """(seconds before, seconds after) the middle mark, over all steps since the last read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before = sum(_between(m[0], m[1]) for m in self._marks)
        after = sum(_between(m[1], m[2]) for m in self._marks)
        self._marks.clear()
        return before, after


def _between(start: float | torch.cuda.Event, stop: float | torch.cuda.Event) -> float:
    if isinstance(start, float) and isinstance(stop, float):
        return stop - start
    return start.elapsed_time(stop) / 1e3  # type: ignore[union-attr, arg-type]


class PeakMemory:
    """Largest memory of this process: allocated by torch on a GPU, resident on a CPU.

    On a CPU it only grows, and counts all of the process: the system keeps no other figure.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._since = 0
        self.training = 0
        """Bytes, of all of the training that was read."""

    def set_aside(self) -> int:
        """Start a peak of its own, e.g. an evaluation's; returns the bytes of what ends here."""
        if self._device.type == "cuda":
            found = torch.cuda.max_memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            return found
        return _resident_peak()

    def pause(self) -> None:
        """Keep the peak of training so far: another one begins."""
        self._since = max(self._since, self.set_aside())

    def read(self) -> int:
        """Bytes of training since the last read."""
        found = max(self._since, self.set_aside())
        self._since, self.training = 0, max(self.training, found)
        return found


def _resident_peak() -> int:
    """Bytes; 0 where the system does not tell."""
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # bytes there, KiB elsewhere


def yardsticks(text: bytes) -> dict[str, float]:
    """What simple coders need for a text, nats per byte.

    order0: entropy of the byte counts; zlib and bz2: compressed size at level 9.
    """
    if not text:
        return {}
    counts = Counter(text).values()
    n = len(text)
    return {
        "order0": -sum(c / n * math.log(c / n) for c in counts),
        "zlib": len(zlib.compress(text, 9)) * 8 * math.log(2) / n,
        "bz2": len(bz2.compress(text, 9)) * 8 * math.log(2) / n,
    }
