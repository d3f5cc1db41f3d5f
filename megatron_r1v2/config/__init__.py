"""The settings of a run: sections, a recipe for each stage, YAML and overrides, help."""
