"""The radio: propagation, fading, motion, links. numpy and scipy only; everything a function of (seed, client, time)."""
