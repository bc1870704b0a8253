"""Every airtune method on real devices through Flower: another environment and another runner under the same loop."""
