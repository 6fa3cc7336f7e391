"""Energy from the CPU's own counter, or not at all.

The only honest source on a CPU is a counter such as RAPL's, which Linux shows under ``/sys/class/powercap``: the
microjoules that each package has taken, wrapping around at a given range. It counts everything that runs on the
package, so a figure is that of a run only on a machine that does nothing else. An estimate from a table of CPU models
is not a measurement, and there is none here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
_MICRO = 1e-6


@dataclass(frozen=True)
class RaplMeter:
    """Energy of all CPU packages.

    Attributes:
        counters: one ``energy_uj`` file per package.
        ranges: where each counter wraps around, in microjoules.
    """

    counters: tuple[Path, ...]
    ranges: tuple[int, ...]

    def start(self) -> Callable[[], float]:
        """Begin to measure; the function that is returned gives the joules since. Runs must be shorter than a wrap."""
        before = self._read()

        def joules() -> float:
            pairs = zip(before, self._read(), self.ranges, strict=True)
            return _MICRO * sum((after - start) % span for start, after, span in pairs)

        return joules

    def _read(self) -> list[int]:
        return [_integer(counter) for counter in self.counters]


def find_meter(powercap: Path = POWERCAP) -> RaplMeter | str:
    """The machine's meter, or why there is none: a few words, a colon and the reason.

    Args:
        powercap: folder of the Linux kernel's counters.
    """
    # Parts of a package (cores, memory) and the whole board (psys) are listed beside the packages: count once.
    names = sorted(powercap.glob("intel-rapl:*/name"))
    packages = [name.parent for name in names if name.read_text().startswith("package")]
    if not packages:
        return "not measurable here: the machine shows no energy counter (RAPL)"
    try:
        meter = RaplMeter(
            tuple(package / "energy_uj" for package in packages),
            tuple(_integer(package / "max_energy_range_uj") + 1 for package in packages),
        )
        meter.start()
    except PermissionError as error:
        return f"not measurable here: the energy counter {error.filename} may not be read by this user"
    except (OSError, ValueError) as error:
        return f"not measurable here: the energy counter cannot be read ({error})"
    return meter


def _integer(file: Path) -> int:
    return int(file.read_text())
