"""The hardware: profiles, latency from counted FLOPs, memory, energy, availability. numpy and scipy only."""
