"""The frame of a report: its style, and the parts that its sections are made of."""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff;
  max-width: 48rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; margin-bottom: 0; }}
h2 {{ font-size: 1.15rem; margin-top: 2.5rem; border-bottom: 2px solid #0b6e4f; }}
.where {{ color: #555; margin-top: 0.25rem; }}
svg {{ width: 100%; height: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: 0.875rem; margin: 1rem 0; }}
th, td {{ text-align: left; padding: 0.3rem 0.6rem; border-bottom: 1px solid #ddd;
  overflow-wrap: anywhere; vertical-align: top; }}
td:first-child {{ white-space: nowrap; }}
th {{ border-bottom: 2px solid #888; }}
.n {{ text-align: right; font-variant-numeric: tabular-nums; }}
pre {{ background: #f4f6f5; padding: 0.8rem; overflow-x: auto; font-size: 0.875rem; }}
@media print {{
  body {{ font-size: 11pt; margin: 0; max-width: none; }}
  svg, table, pre {{ break-inside: avoid; }}
  h2 {{ break-after: avoid; }}
}}
</style>
</head>
<body>
<h1>{title}</h1>
<p class="where">{where}</p>
{body}
</body>
</html>
"""


def page(title: str, machine: Mapping[str, Any], parts: Iterable[str]) -> str:
    """Return a whole page.

    Args:
        title: Its heading.
        machine: As :func:`~floe_kernels.pipeline.machine.describe_machine` gives it; may be empty.
        parts: Sections; empty ones are left out.
    """
    where = ""
    if machine:
        where = (
            f"{machine['processor']}, {machine['threads']} threads; torch {machine['torch']}, "
            f"Python {machine['python']}"
        )
    body = "\n".join(part for part in parts if part)
    return PAGE.format(title=text(title), where=text(where), body=body)


def section(title: str, *parts: str) -> str:
    """Return a section of a page."""
    return f"<section><h2>{text(title)}</h2>\n" + "\n".join(parts) + "</section>"


def paragraph(words: str) -> str:
    """Return a paragraph."""
    return f"<p>{text(words)}</p>"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: int) -> str:
    """Return a table whose columns from ``numbers`` on are set like numbers."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=n' if i >= numbers else ''}>{text(cell)}</{tag}>"
            for i, cell in enumerate(row)
        )

    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{cells('th', headings)}</tr></thead><tbody>\n{body}</tbody></table>"


def text(words: str) -> str:
    """Return text with what HTML takes for markup escaped."""
    return html.escape(words, quote=True)
