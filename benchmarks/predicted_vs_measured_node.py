"""One device without Flower: takes messages over its shaped link and passes them on to its resident trainer.

python predicted_vs_measured_node.py HOST PORT SOCKET NODE_CONFIG_JSON
"""

from __future__ import annotations

import json
import socket
import sys
import time

from airtune.deploy.device.client import Device
from airtune.deploy.device.frames import ClosedError, receive, send


def main() -> None:
    host, port, address, config = sys.argv[1], int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
    trainer, state, last = Device(address), b"", None
    with socket.create_connection((host, port)) as server:
        send(server, {"client": config["partition-id"]})
        while True:
            try:
                message = receive(server, 1 << 30)
            except (ClosedError, ConnectionResetError):
                return
            received = time.perf_counter()
            run = message.head["run"]
            state, last = (state if run == last else b""), run  # a client's own state is that of a run
            words = {"run": run, "node": config, "kind": message.head["kind"], "sizes": [len(message.body), len(state)]}
            words |= {"received_at": received, "measure": False}
            answer = trainer.ask("flower", message.body + state, words)
            size = answer.head["sizes"][0]
            reply, state = answer.body[:size], answer.body[size:]
            send(server, {"id": message.head["id"], "app_seconds": time.perf_counter() - received}, reply)


if __name__ == "__main__":
    main()
