"""Pages as files: the templates they are made from, and how they are written."""

from __future__ import annotations

import os
from pathlib import Path

from jinja2 import Environment, PackageLoader, Template


def write_page(path: Path, page: str) -> Path:
    """Write a page beside its place and rename it.

    Args:
        path: where to.
        page: HTML.

    Returns:
        The path.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    # "replace": a model can emit half a surrogate pair, which UTF-8 cannot hold.
    temporary.write_bytes(page.encode("utf-8", errors="replace"))
    temporary.replace(path)
    return path


def template(name: str) -> Template:
    """Return a template of this folder; what is put into it is escaped.

    Args:
        name: of the file.
    """
    environment = Environment(
        loader=PackageLoader("megatron_r1v2.report", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name)
