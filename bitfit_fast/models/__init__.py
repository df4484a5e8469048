"""Knowledge about model families, and loading models."""
