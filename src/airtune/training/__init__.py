"""Real models, real data and local training."""
