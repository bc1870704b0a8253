"""The resident trainer: a process that keeps the base model loaded and trains the jobs it is sent over a socket."""
