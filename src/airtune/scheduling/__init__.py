"""Who takes part, what each client holds, and how band and power are shared."""
