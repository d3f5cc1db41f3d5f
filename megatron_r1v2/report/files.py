"""Pages as files: the templates they are made from, and how they are written."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, Template

from megatron_r1v2.resilience.files import write_file


def write_page(path: Path, page: str) -> Path:
    """Write a page of HTML and return its path."""
    # A model can emit half a surrogate pair, which UTF-8 cannot hold.
    write_file(path, page.encode("utf-8", errors="replace"))
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
