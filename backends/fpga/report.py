"""What a launch costs, layer by layer."""

from __future__ import annotations

from typing import Any

from netlathe.backends.fpga.emit import Report
from netlathe.backends.fpga.launch import Launch
from netlathe.backends.fpga.model import Memory
from netlathe.backends.fpga.spec import Spec

# Picojoules of an int8 product and its sum, of a byte of a small SRAM and of DRAM, at 45 nm (Horowitz,
# ISSCC 2014, fig. 1.1.9: 0.2 + 0.1; 10 and 1300 for 8 bytes). For comparing programs, not a power supply.
PJ_MAC, PJ_SRAM, PJ_DRAM = 0.3, 1.25, 160.0


def layers(launch: Launch, memory: Memory) -> list[dict[str, Any]]:
    """Of every layer cycles, what limits them, utilization, bytes, energy by proxy in microjoules.

    A layer's cycles are those from the end of what came before it to its own last beat, at ``memory``.
    Utilization is products a cycle and multiplier: 1 at most, 2 where int4 weights go by ``pairs``, and with
    N:M weights M / N, zeros counted.
    """
    made, times, start = [], launch.timing(memory), 0
    for report in launch.builder.reports:
        end = max((t.done for t in times[report.first : report.last]), default=start)
        made.append(_layer(report, max(1, end - start), launch.builder.spec))
        start = max(start, end)
    return made


def _layer(report: Report, taken: int, spec: Spec) -> dict[str, Any]:
    sram = report.computed * (spec.rows + 1) * spec.columns  # a row of weights, and of activations
    moved = (report.beats_in + report.beats_out) * spec.beat_bytes
    energy = report.macs * PJ_MAC + sram * PJ_SRAM + moved * PJ_DRAM
    parts = {"load": report.beats_in, "compute": report.computed, "store": report.beats_out}
    return {
        "layer": report.name,
        "cycles": taken,
        "limit": max(parts, key=lambda name: parts[name]),
        "utilization": report.macs / (taken * spec.rows * spec.columns),
        "bytes_read": report.beats_in * spec.beat_bytes,
        "bytes_written": report.beats_out * spec.beat_bytes,
        "macs": report.macs,
        "pairs": report.paired,
        "energy_proxy_uj": energy * 1e-6,
    }
