"""Differences between airtune's TR 38.901 path loss and sionna's, over a grid: a table, and JSON on request.

    python benchmarks/path_loss_against_sionna.py [--json FILE]

Needs the extra ``sionna`` (sionna-no-rt).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from airtune.wireless.tr38901 import IndoorOffice, RuralMacro, UrbanMacro, UrbanMicro

FREQUENCIES = (0.7e9, 2e9, 3.5e9, 6e9, 28e9)
POINTS = 200
MODELS: dict[str, Any] = {
    "UMa": UrbanMacro(),
    "UMa, device at 10 m": UrbanMacro(user_height=10.0),
    "UMi": UrbanMicro(),
    "UMi, device at 10 m": UrbanMicro(user_height=10.0),
    "RMa": RuralMacro(),
    "RMa, base station at 50 m, device at 5 m": RuralMacro(base_height=50.0, user_height=5.0),
    "InH mixed": IndoorOffice("mixed"),
    "InH open": IndoorOffice("open"),
}


def grid(model: Any) -> np.ndarray:
    """Return ground distances [points], m, over the model's range."""
    return np.geomspace(2.0, 140.0, POINTS) if isinstance(model, IndoorOffice) else np.geomspace(10.0, 4990.0, POINTS)


def sionna_scenario(model: Any, frequency: float, distances: np.ndarray, line_of_sight: bool) -> Any:
    """Return sionna's scenario with one base station and a device at each distance."""
    import torch
    from sionna.phy.channel.tr38901 import PanelArray
    from sionna.phy.channel.tr38901.inh_scenario import InHScenario
    from sionna.phy.channel.tr38901.rma_scenario import RMaScenario
    from sionna.phy.channel.tr38901.uma_scenario import UMaScenario
    from sionna.phy.channel.tr38901.umi_scenario import UMiScenario

    array = PanelArray(
        num_rows_per_panel=1,
        num_cols_per_panel=1,
        polarization="single",
        polarization_type="V",
        antenna_pattern="omni",
        carrier_frequency=frequency,
        precision="double",
    )
    common = {"ut_array": array, "bs_array": array, "direction": "uplink", "precision": "double"}
    indoor = isinstance(model, IndoorOffice)
    if indoor:
        scenario = InHScenario(frequency, model.office, **common)
    elif isinstance(model, RuralMacro):
        scenario = RMaScenario(frequency, **common)
    else:
        kind = UMaScenario if isinstance(model, UrbanMacro) else UMiScenario
        scenario = kind(frequency, "low", **common)
    count = distances.size
    place = torch.zeros(1, count, 3, dtype=torch.float64)
    place[0, :, 0] = torch.as_tensor(distances)
    place[0, :, 2] = model.user_height
    base = torch.tensor([[[0.0, 0.0, model.base_height]]], dtype=torch.float64)
    still = torch.zeros(1, count, 3, dtype=torch.float64)
    inside = torch.full((1, count), indoor)
    scenario.set_topology(place, base, still, torch.zeros(1, 1, 3, dtype=torch.float64), still, inside, line_of_sight)
    return scenario


def differences(model: Any) -> list[dict[str, Any]]:
    """Return the largest absolute differences, dB and probability, per carrier and state."""
    rows: list[dict[str, Any]] = []
    distances = grid(model)
    for frequency in FREQUENCIES:
        for sight in (True, False):
            scenario = sionna_scenario(model, frequency, distances, sight)
            theirs = scenario.basic_pathloss.cpu().numpy().reshape(-1)
            ours = model.loss_db(distances, frequency, np.full(distances.shape, sight))
            chance = scenario.los_probability.cpu().numpy().reshape(-1)
            rows.append(
                {
                    "carrier_ghz": frequency / 1e9,
                    "line_of_sight": sight,
                    "loss_db": float(np.abs(ours - theirs).max()),
                    "probability": float(np.abs(model.line_of_sight_probability(distances) - chance).max()),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    table = {name: differences(model) for name, model in MODELS.items()}
    print("| model | state | largest difference, dB | of the line-of-sight probability |\n|---|---|---|---|")
    for name, rows in table.items():
        for sight in (True, False):
            loss = max(r["loss_db"] for r in rows if r["line_of_sight"] is sight)
            chance = max(r["probability"] for r in rows if r["line_of_sight"] is sight)
            print(f"| {name} | {'line of sight' if sight else 'none'} | {loss:.2e} | {chance:.2e} |")
    if chosen.json:
        chosen.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
