"""From an experiment file to a finished run: configuration, store, checkpoint, comparison. Imports no report code."""
