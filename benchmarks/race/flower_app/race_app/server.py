"""The server: Flower's own FedAvg; before each round it waits at the gate."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from race.gate import Gate
from race.peft_client import Work, save

app = ServerApp()


class GatedFedAvg(FedAvg):
    """FedAvg that starts no round before the gate opens, and lets no client be missing."""

    gate: Gate

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Wait, then do as FedAvg does."""
        self.gate.wait()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Do as FedAvg does, if everyone answered."""
        replies = list(replies)
        failed = [reply.error.reason for reply in replies if reply.has_error()]
        if failed or len(replies) != self.min_available_nodes:
            raise RuntimeError(f"{len(replies)} replies, failures: {failed[:1]}")
        return super().aggregate_train(server_round, replies)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds and write the final adapter."""
    from safetensors.torch import load_file

    gate_folder = Path(str(context.run_config["gate"]))
    work = Work(str(context.run_config["work"]))
    clients = work.settings["clients"]
    while len(list(grid.get_node_ids())) < clients:
        time.sleep(0.1)
    strategy = GatedFedAvg(
        fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients
    )
    strategy.gate = Gate(gate_folder)
    start = load_file(work.folder / "start" / "adapter_model.safetensors")
    result = strategy.start(grid=grid, initial_arrays=ArrayRecord(start), num_rounds=work.settings["all_rounds"])
    strategy.gate.close()
    save(result.arrays.to_torch_state_dict(), gate_folder)
