"""The same methods on real devices: a training job on the wire, the resident trainer, keys and certificates."""
