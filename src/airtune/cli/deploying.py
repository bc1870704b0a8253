"""`airtune deploy init`: the files of a deployment, secure unless asked otherwise."""

from __future__ import annotations

import json
from pathlib import Path

from airtune.cli.arguments import Arguments, listed
from airtune.cli.output import say
from airtune.deploy.init.folder import write_deployment
from airtune.deploy.init.scripts import CONNECTION, Layout
from airtune.errors import InputError


def deploy(arguments: Arguments) -> int:
    """Write the folder and say what to start."""
    hosts = listed(arguments.host)
    if not hosts:
        raise InputError("--host: is empty; valid: a DNS name or an IP address that the devices dial")
    layout = Layout(
        folder=Path(arguments.folder).absolute(),
        hosts=hosts,
        port=_number(arguments.port, "--port"),
        nodes=_number(arguments.nodes, "--nodes"),
        secure=not arguments.insecure,
    )
    folder = write_deployment(layout)
    if arguments.json:
        print(json.dumps({"folder": str(folder), "address": layout.address, "secure": layout.secure}))
        return 0
    if not layout.secure:
        say("airtune deploy: --insecure: no encryption and no authentication")
    say(f"airtune deploy: {folder}: start-superlink.sh, {layout.nodes} nodes that dial {layout.address}; "
        f"then FLWR_HOME={folder}/flwr flwr run APP {CONNECTION}")  # fmt: skip
    return 0


def _number(text: str, option: str) -> int:
    if not text.isdecimal():
        raise InputError(f"{option}: cannot read {text!r}; valid: a whole number")
    return int(text)
