"""The radio: propagation, fading, motion, links, all a function of (seed, client, time). numpy and scipy only."""
