"""airtune: federated LoRA fine-tuning that counts seconds, bits and joules."""

__version__ = "0.1.0"
