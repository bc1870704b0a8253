"""The text of a deployment's scripts, of Flower's configuration, and of the page that explains them."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from airtune.deploy.init.certificates import is_loopback

CONNECTION = "airtune"  # name of the SuperLink in Flower's configuration
FIRST_NODE_PORT = 9094

_SHELL = """\
#!/bin/sh
set -eu
umask 077
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
# Nothing is reported to others, nothing is installed while a run starts.
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
"""


@dataclass(frozen=True)
class Layout:
    """What is deployed.

    Attributes
    ----------
    folder : where the files will lie. host, port : that the devices dial. hosts : all names of the server.
    nodes : number of devices. secure : TLS and authentication of the nodes.
    """

    folder: Path
    hosts: tuple[str, ...]
    port: int
    nodes: int
    secure: bool = True

    @property
    def address(self) -> str:
        """Return ``HOST:PORT`` of the first host."""
        host = self.hosts[0]
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    @property
    def bind(self) -> str:
        """Return the address that the SuperLink binds: loopback unless a device is to reach it from elsewhere."""
        if all(is_loopback(host) for host in self.hosts):
            return "127.0.0.1"
        return "::" if all(":" in host for host in self.hosts) else "0.0.0.0"

    def node_name(self, index: int) -> str:
        """Return the name of a node's folder, of equal width for all."""
        return f"node-{index:0{len(str(self.nodes - 1))}d}"


def superlink_script(layout: Layout) -> str:
    """Return the script that starts the server."""
    if layout.secure:
        options = """\
    --ssl-ca-certfile "$here/ca.crt" --ssl-certfile "$here/server.crt" --ssl-keyfile "$here/server.key" \\
    --enable-supernode-auth \\
"""
    else:
        options = "    --insecure \\\n"
    return (
        _SHELL + f'export FLWR_HOME="${{FLWR_HOME:-$here/flwr}}"\nexec flower-superlink --host {layout.bind} '
        f'--port {layout.port} \\\n{options}    --database "$here/state.db" "$@"\n'
    )


def register_script(layout: Layout) -> str:
    """Return the script that tells the running server which nodes there are."""
    return (
        _SHELL + 'export FLWR_HOME="${FLWR_HOME:-$here/flwr}"\n'
        'for node in "$here"/nodes/*/; do\n'
        f'    flwr supernode register "${{node}}node.pub" {CONNECTION} --name "$(basename "$node")"\n'
        "done\n"
    )


def node_script(layout: Layout, index: int) -> str:
    """Return the script that starts one node; its folder is all that its device needs."""
    if layout.secure:
        options = '--root-certificates "$here/ca.crt" --auth-supernode-private-key "$here/node.key"'
    else:
        options = "--insecure"
    config = f"partition-id={index} num-partitions={layout.nodes} "
    return (
        _SHELL + "# AIRTUNE_NODE_CONFIG adds to the node's configuration, as in 'device=\"unix:/run/airtune.sock\"'.\n"
        'export FLWR_HOME="${FLWR_HOME:-$here/flwr}"\n'
        f"exec flower-supernode {options} \\\n    --superlink {shlex.quote(layout.address)} "
        f'--port "${{AIRTUNE_NODE_PORT:-{FIRST_NODE_PORT + index}}}" \\\n'
        f'    --node-config "{config}${{AIRTUNE_NODE_CONFIG:-}}" "$@"\n'
    )


def flower_config(layout: Layout) -> str:
    """Return Flower's ``config.toml``: `flwr run APP airtune` finds the server by it."""
    security = f'root-certificates = "{layout.folder / "ca.crt"}"' if layout.secure else "insecure = true"
    address = layout.address
    return f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = "{address}"\n{security}\n'


def readme(layout: Layout) -> str:
    """Return the page that says what to do with the folder."""
    start = (
        f"    sh nodes/{layout.node_name(0)}/start.sh           # on each device: copy its folder there, nothing else"
    )
    lines = [
        f"# A deployment of {layout.nodes} devices",
        "",
        f"    sh start-superlink.sh            # on the server; devices dial {layout.address}",
        *(["    sh register-nodes.sh             # once, on the server, while it runs"] if layout.secure else []),
        start,
        f"    FLWR_HOME=$PWD/flwr flwr run APP {CONNECTION} --stream",
        "",
        _SECURE if layout.secure else _INSECURE,
        "`flwr/config.toml` holds this folder's path: change it there if the folder moves.",
    ]
    return "\n".join(lines) + "\n"


_SECURE = """\
| file | who needs it |
|---|---|
| `authority.key` | nobody while it runs: signs server certificates; keep it off the server |
| `ca.crt` | everybody: verifies the server |
| `server.crt`, `server.key` | the server |
| `nodes/*/node.key` | that device alone |
| `nodes/*/node.pub` | the server, for `register-nodes.sh` |

A device whose key is lost or stolen: `flwr supernode unregister`. Whoever reaches the port and has `ca.crt` may start
runs and register nodes (Flower has no user accounts here): let a firewall or VPN admit only the devices and yourself.
"""

_INSECURE = """\
**No encryption, no authentication**: anyone who reaches the port can read the models, join, and run code
on all devices.
"""
