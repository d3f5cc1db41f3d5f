"""What people look at: one self-contained HTML file per run."""
