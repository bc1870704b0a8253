"""The server side."""

from airtune.deploy.flower.server_app import app

__all__ = ["app"]
