"""The device side."""

from airtune.deploy.flower.client_app import app

__all__ = ["app"]
