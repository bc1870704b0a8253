"""The Flower app of the race: `flwr run` packs this folder."""
