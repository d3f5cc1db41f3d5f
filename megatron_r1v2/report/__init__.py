"""The pages that people look at: one self-contained HTML file for a run, one for evaluations."""
