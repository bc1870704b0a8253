"""`airtune fetch`, `methods` and `cite`: what is there by name. Imports neither torch nor transformers."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from airtune.cli.arguments import Arguments
from airtune.cli.output import say
from airtune.errors import InputError


def fetch(arguments: Arguments) -> int:
    """Fetch entries of the catalogue, or list them."""
    from airtune.training import fetch as fetching

    if arguments.list:
        return _list_catalogue(arguments)
    if not arguments.names:
        raise InputError("NAME: is missing; valid: airtune fetch NAME, airtune fetch all, or airtune fetch --list")
    found = {}
    for name in arguments.names:
        if name == "all":
            found.update(fetching.fetch_all(progress=say))
        else:
            found[name] = fetching.fetch(name, progress=say)
    if arguments.json:
        print(json.dumps({name: str(folder) for name, folder in found.items()}))
    return 0


def _list_catalogue(arguments: Arguments) -> int:
    from airtune.training.fetch import describe

    entries = describe()
    if arguments.json:
        print(json.dumps(entries))
        return 0
    table = Table("Name", "Kind", "MB", "Here", "What")
    for entry in entries:
        here = "yes" if entry["fetched"] else "no"
        table.add_row(str(entry["name"]), str(entry["kind"]), str(entry["download_mb"]), here, str(entry["title"]))
    Console().print(table)
    return 0


def methods(arguments: Arguments) -> int:
    """List the methods."""
    from airtune.methods import describe

    found = describe()
    if arguments.json:
        print(json.dumps([asdict(info) for info in found]))
        return 0
    table = Table("Name", "What it does", "Paper", "From")
    for info in found:
        table.add_row(info.name, info.summary, f"arXiv {info.arxiv}" if info.arxiv else "", info.package)
    Console().print(table)
    return 0


def cite(arguments: Arguments) -> int:
    """Print the BibTeX of a method's paper."""
    from airtune.methods import cite as citation

    print(citation(arguments.method))
    return 0
