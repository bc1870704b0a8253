"""A fleet in a wireless cell on one machine: real training under a virtual clock."""
