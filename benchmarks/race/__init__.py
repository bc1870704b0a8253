"""Races against other frameworks: one piece of work, one gate, one judge. The scripts beside this folder start them."""
