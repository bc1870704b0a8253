"""The apps that Flower loads; all of their code is airtune's."""
