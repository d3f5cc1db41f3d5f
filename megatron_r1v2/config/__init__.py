"""The settings of a run: dataclasses, YAML loading, dotted overrides."""
