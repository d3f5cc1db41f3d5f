"""List the tools: `python -m checkpoint_tools`."""

from __future__ import annotations

import ast
from pathlib import Path


def tools() -> dict[str, str]:
    """Return the first line of each tool's docstring, by name of the tool; imports none, as torch takes seconds."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[path.stem] = docstring.splitlines()[0]
    return found


def main() -> None:
    """Print the tools, a line each."""
    print("usage: python -m checkpoint_tools.NAME --help\n")
    for name, line in tools().items():
        print(f"  {name:15} {line}")


if __name__ == "__main__":
    main()
