"""The GPUs that figures are modelled for, and the model: a launch takes as long as its busiest unit needs.

    time = max(bytes / DRAM bandwidth, lane-instructions / issue rate, special functions / their rate,
               operations of matrix products / tensor cores' rate)

It knows no latency, cache, occupancy, bank conflict or launch overhead, and counts every instruction as one issue
slot: a floor that tells what binds a kernel. Nothing it says has been measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["CHIPS", "Chip", "Modelled"]


class Modelled(NamedTuple):
    """Microseconds by the model, the unit that binds, and how close the next one is (1: both bind)."""

    microseconds: float
    bound: str
    pressure: float


class Chip(NamedTuple):
    """A GPU as the model sees it; lanes are 32-bit results per clock and multiprocessor."""

    name: str
    dram: float  # bytes per second
    multiprocessors: int
    clock: float  # hertz
    issue_lanes: int
    special_lanes: int
    tensor: Mapping[str, float]
    """Dense operations per second of matrix products by type; what is not here is made of ordinary instructions."""
    source: str

    def model(
        self, moved: float, instructions: float, special: float, products: Mapping[str, float] | None = None
    ) -> Modelled:
        """For `moved` bytes, lane-instructions and special functions over all threads, and matrix products by type."""
        lanes = self.multiprocessors * self.clock
        seconds = {
            "DRAM": moved / self.dram,
            "issue": instructions / (lanes * self.issue_lanes),
            "SFU": special / (lanes * self.special_lanes),
            "tensor": sum(n / self.tensor[kind] for kind, n in (products or {}).items() if kind in self.tensor),
        }
        (first, bound), (second, _) = sorted(((s, unit) for unit, s in seconds.items()), reverse=True)[:2]
        return Modelled(first * 1e6, bound, second / first if first else 0.0)


# four warps of 32 per clock from the four schedulers of a multiprocessor, and 16 special functions: CUDA programming
# guide, throughput of native arithmetic instructions. A CDNA 3 unit issues 64 lanes per clock, transcendentals at a
# quarter: CDNA 3 instruction set architecture. H100 and B200 are taken at less than their boost clock
CHIPS: dict[str, Chip] = {
    "sm_80": Chip(
        "A100 80GB SXM",
        2.039e12,
        108,
        1.41e9,
        128,
        16,
        {"16 bits": 312e12, "tf32": 156e12},
        "A100 datasheet: 2,039 GB/s; 19.5 TFLOP/s = 108 x 128 x 1.41 GHz",
    ),
    "sm_90": Chip(
        "H100 SXM",
        3.35e12,
        132,
        1.755e9,
        128,
        16,
        {"16 bits": 989e12, "tf32": 494e12},
        "H100 datasheet: 3.35 TB/s, 132 SMs; 1.755 GHz of at most 1.98 GHz",
    ),
    "sm_100": Chip(
        "B200",
        8.0e12,
        148,
        1.85e9,
        128,
        16,
        {"16 bits": 2.25e15, "tf32": 1.12e15},
        "HGX B200 datasheet: 8 TB/s; 148 SMs; 1.85 GHz of at most 1.965 GHz",
    ),
    "sm_120": Chip(
        "RTX 5090",
        1.792e12,
        170,
        2.407e9,
        128,
        16,
        {"16 bits": 209e12, "tf32": 104e12},
        "RTX Blackwell white paper: 1,792 GB/s, 170 SMs, boost 2.407 GHz",
    ),
    "gfx942": Chip(
        "MI300X",
        5.3e12,
        304,
        2.1e9,
        64,
        16,
        {"16 bits": 1307e12, "tf32": 653e12, "fp32": 163e12},
        "MI300X data sheet: 5.3 TB/s, 304 compute units, peak engine clock 2.1 GHz",
    ),
}
