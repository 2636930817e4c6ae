"""Facts about the shipped model."""

from pathlib import Path

FOLDER = Path(__file__).parents[1] / "models" / "sonnets"
SONNET_18_START = "Shall I compare thee to a summer's day?\nThou art more lovely and more temperate:"
SONNET_73_START = "That time of year thou mayst in me behold\nWhen yellow leaves, or none, or few, do hang"
