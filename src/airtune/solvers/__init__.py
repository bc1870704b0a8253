"""One file per optimisation problem; each returns a `Solution`. numpy and scipy only."""
