"""How an upload is coded, with its bits counted as they are sent."""
