"""The stages that a user runs, and the session, loop and validation that they share."""
