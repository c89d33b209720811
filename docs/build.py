"""Builds the pages of README and of every public docstring: ``make docs``.

pdoc makes the pages. Equations become MathML here, so that no page takes a script from elsewhere. A
link within the site that leads nowhere ends the build.
"""

import importlib
import re
import shutil
import sys
import textwrap
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

import jinja2
import pdoc
from latex2mathml.converter import convert

ROOT = Path(__file__).parents[1]
MODULES = (
    "floe_kernels",
    "floe_kernels.integrations.transformers",
    "floe_kernels.integrations.trainer",
    "floe_kernels.integrations.peft",
    "floe_kernels.pipeline",
)
START = "floe_kernels.html"  # README, then what the package holds
PAGES = ("CONTRIBUTING", "CHANGELOG", "LICENSES")
PAGE = """{% extends "frame.html.jinja2" %}{% block title %}{{ title }}{% endblock %}
{% block nav %}<a href="floe_kernels.html">floe_kernels</a>{% endblock %}
{% block content %}<main class="pdoc"><section class="module-info">
<div class="docstring">{{ text | to_html }}</div></section></main>{% endblock %}"""

DISPLAYED = re.compile(r"^( *)\.\. math::(.*(?:\n\1 +\S.*)*)", re.M)
DOLLARS = re.compile(r"\$\$(.+?)\$\$", re.S)
INLINE = re.compile(r":math:`([^`]+)`")
STAND_IN = re.compile(r"EQUATION(\d+)X")
MEMBER = re.compile(r'<a href="#([A-Z]\w+\.\w+)">(.*?)</a>')
LINK = re.compile(r"\]\((?!\w+:)([^)\s]+)")


class Equations:
    """Words that stand in for equations while Markdown, which has its own use for _, is read."""

    def __init__(self) -> None:
        self.known: list[str] = []

    def hide(self, text: str) -> str:
        """Put a word in every equation's place."""
        text = DISPLAYED.sub(lambda m: f"\n{m[1]}{self._word(m[2], 'block')}\n", text)
        text = DOLLARS.sub(lambda m: f"\n\n{self._word(m[1], 'block')}\n\n", text)
        return INLINE.sub(lambda m: self._word(m[1], "inline"), text)

    def show(self, html: str) -> str:
        """Put the equations back."""
        return STAND_IN.sub(lambda m: self.known[int(m[1])], html)

    def _word(self, tex: str, display: str) -> str:
        tex = textwrap.dedent(tex).strip().replace(r"\|", "‖")  # which is unknown there after \Big
        self.known.append(convert(tex, display=display))
        return f"EQUATION{len(self.known) - 1}X"


class Page(HTMLParser):
    """The names that a page gives its places, and the links it has."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.places: set[str] = set()
        self.links: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take note of an element."""
        for name, value in attrs:
            if name == "id":
                self.places.add(value or "")
            elif name in ("href", "src"):
                self.links.append(value or "")


def equip(equations: Equations) -> None:
    """Let pdoc read docstrings as they are written here."""
    pdoc.render.configure(docformat="google", footer_text="floe_kernels")
    filters = pdoc.render.env.filters
    to_markdown, to_html = filters["to_markdown"], filters["to_html"]

    @jinja2.pass_context
    def readable(context: Any, text: str) -> str:
        text = re.sub(r"(:\w+:`)~", r"\1", equations.hide(text))
        return to_markdown(context, text)

    def rendered(text: str) -> Any:
        html = to_html(text)
        shown = type(html)(equations.show(html))  # its class carries a table of contents
        shown.toc_html = html.toc_html and equations.show(html.toc_html)
        return shown

    filters.update(to_markdown=readable, to_html=rendered)


def unlink(site: Path) -> None:
    """Drop pdoc's links to members that a page leaves out, being a foreign base class's."""
    for path in site.rglob("*.html"):
        html = path.read_text()
        for name in {name for name, _ in MEMBER.findall(html)} - Page(html).places:
            html = re.sub(rf'<a href="#{re.escape(name)}">(.*?)</a>', r"\1", html)
        path.write_text(html)


def bring(text: str, site: Path) -> str:
    """Copy the files that a text links to, and let links to pages name the pages."""

    def link(found: re.Match[str]) -> str:
        path, anchor = urldefrag(found[1])
        if path == "README.md":
            return f"]({START}{anchor and '#'}{anchor}"
        if Path(path).stem in PAGES:
            return f"]({Path(path).stem}.html{anchor and '#'}{anchor}"
        if path and (ROOT / path).is_file():
            (site / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, site / path)
        return found[0]

    return LINK.sub(link, text)


def broken(site: Path) -> list[str]:
    """Return the links within a site that lead nowhere."""
    pages = {path.resolve(): Page(path.read_text()) for path in site.rglob("*.html")}
    wrong = []
    for path, page in pages.items():
        for link in page.links:
            if re.match(r"\w+:", link):
                continue
            there, anchor = urldefrag(unquote(link))
            target = (path.parent / there).resolve() if there else path
            missing = anchor and target in pages and anchor not in pages[target].places
            if missing or not target.is_file():
                wrong.append(f"{path.relative_to(site.resolve())}: {link}")
    return sorted(set(wrong))


def build(site: Path) -> list[str]:
    """Build the site; return the links in it that lead nowhere."""
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir(parents=True)
    equations = Equations()
    equip(equations)
    package = importlib.import_module("floe_kernels")
    _title, _, text = (ROOT / "README.md").read_text().partition("\n")  # pdoc has one of its own
    package.__doc__ = bring(text, site)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # annotations that only a type checker can read
        pdoc.pdoc(*MODULES, output_directory=site)
    unlink(site)
    page = pdoc.render.env.from_string(PAGE)
    for name in PAGES:
        text = bring((ROOT / f"{name}.md").read_text(), site)
        (site / f"{name}.html").write_text(page.render(title=name.title(), text=text))
    return broken(site)


def main() -> None:
    """Build the site in the folder that the command names."""
    site = Path(sys.argv[1])
    wrong = build(site)
    if wrong:
        sys.exit("links that lead nowhere:\n" + "\n".join(wrong))
    print(f"open {site / 'index.html'}")


if __name__ == "__main__":
    main()
