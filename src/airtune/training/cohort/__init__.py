"""The cohort engine: many clients' adapters trained at once on one frozen base (`airtune.training.cohort.trainer`)."""
