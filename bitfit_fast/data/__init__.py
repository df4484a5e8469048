"""Tasks and where their examples come from."""
