"""The stages that a user runs, and what their loops share."""
