"""A picture of predicted against measured round seconds, as SVG.

cd benchmarks
python predicted_vs_measured_plot.py predicted_vs_measured.json ../docs/images/predicted-against-measured.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 460, 60, 50, 34
COLOURS = {"fedit": "#1b6ca8", "legend": "#c8553d", "adaptive-sampling": "#3d8b57"}


def picture(found: dict[str, Any]) -> str:
    """Return the SVG: hollow marks are the plan's own seconds, filled ones those after calibration."""
    points = [
        (name, each["measured_s"], each["plan_s"], each["calibrated_s"])
        for name in found
        if name in COLOURS
        for each in found[name]["rounds"]
    ]
    largest = 1.08 * max(value for _, *values in points for value in values)
    step = next(size for size in (1, 2, 5, 10, 20, 50, 100, 200) if largest / size <= 8)

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - 20) * value / largest

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * value / largest

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12" role="img" aria-label="Predicted against measured seconds of rounds">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        *(
            f'<polygon points="{x(0)},{y(0)} {x(largest)},{y(largest)} {corner}" fill="#eeeeee"/>'
            for corner in (f"{x(largest)},{y(0.9 * largest)}", f"{x(largest / 1.1)},{y(largest)}")
        ),
        f'<line x1="{x(0)}" y1="{y(0)}" x2="{x(largest)}" y2="{y(largest)}" stroke="#888888"/>',
    ]
    value = 0
    while value <= largest:
        lines.append(f'<text x="{x(value)}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value}</text>')
        lines.append(f'<text x="{LEFT - 6}" y="{y(value) + 4}" text-anchor="end">{value}</text>')
        value += step
    lines.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 10}" text-anchor="middle">measured seconds of a round</text>')
    lines.append(
        f'<text x="14" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 14 {HEIGHT / 2})">'
        "predicted seconds</text>"
    )
    for name, measured, plan, calibrated in points:
        colour = COLOURS[name]
        lines.append(f'<circle cx="{x(measured)}" cy="{y(plan)}" r="4.5" fill="none" stroke="{colour}"/>')
        lines.append(f'<circle cx="{x(measured)}" cy="{y(calibrated)}" r="4" fill="{colour}" fill-opacity="0.8"/>')
    for place, (name, colour) in enumerate(COLOURS.items()):
        left = LEFT + 20 + 130 * place
        lines.append(f'<circle cx="{left}" cy="16" r="4" fill="{colour}"/><text x="{left + 8}" y="20">{name}</text>')
    lines.append(f'<text x="{LEFT + 420}" y="20">hollow: the plan alone</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    stored = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(picture(stored.get("flower", stored)))
