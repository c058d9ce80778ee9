"""Jinja2 templates of the page, in the folder templates/ next to this file.

Everything that a template prints is escaped, unless it is Markup: text from files, names of metrics and keys included.
"""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from iwm.report.glossary import with_links

ENVIRONMENT = Environment(
    loader=PackageLoader("iwm.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters["terms"] = with_links


def render(template: str, **values: Any) -> Markup:
    """Return a template of templates/ filled with values. A name that has no value raises jinja2.UndefinedError."""
    return Markup(ENVIRONMENT.get_template(template).render(**values))


def call(template: str, macro: str, *values: Any, **named: Any) -> Markup:
    """Return what a macro of a template prints for these arguments."""
    return Markup(getattr(ENVIRONMENT.get_template(template).module, macro)(*values, **named))
