"""What ``make docs`` does to text, and that it notices a link that leads nowhere."""

import importlib.util
import re
from pathlib import Path

import pytest

pytest.importorskip("pdoc", reason="make docs installs it, and checks every page")
pytest.importorskip("latex2mathml")
ROOT = Path(__file__).parents[2]
SOURCES = [ROOT / "README.md", *(ROOT / "floe_kernels").rglob("*.py")]


@pytest.fixture(scope="module")
def pages():
    spec = importlib.util.spec_from_file_location("pages", ROOT / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_equation_becomes_mathml(pages):
    text = "\n".join(path.read_text() for path in SOURCES)
    asked = len(re.findall(r":math:`|\.\. math::", text)) + text.count("$$") // 2
    equations = pages.Equations()
    hidden = equations.hide(text)
    assert len(equations.known) == asked > 30
    assert not re.search(r"math::|:math:|\$\$", hidden)
    assert all(m.startswith("<math") and "\\" not in m for m in equations.known)


def test_an_equation_of_several_lines_is_one(pages):
    equations = pages.Equations()
    hidden = equations.hide("One.\n\n    .. math:: a_1 = b_2,\n        \\quad c_3\n\n    Two.\n")
    assert re.sub(r"\s+", " ", hidden) == "One. EQUATION0X Two. "
    assert equations.show("<p>EQUATION0X</p>") == f"<p>{equations.known[0]}</p>"


def test_links_that_lead_nowhere_are_noticed(pages, tmp_path):
    first = '<h1 id="here"><a href="#here"></a><a href="b.html#there"></a><a href="http://x/"></a>'
    (tmp_path / "a.html").write_text(first)
    second = '<p id="there"><a href="c.html"></a><a href="a.html#gone"></a>'
    (tmp_path / "b.html").write_text(second)
    assert pages.broken(tmp_path) == ["b.html: a.html#gone", "b.html: c.html"]


def test_links_of_documents_lead_into_the_site(pages, tmp_path):
    text = pages.bring("[a](CONTRIBUTING.md#x) [b](LICENSE) [c](README.md) [d](#y)", tmp_path)
    assert text == "[a](CONTRIBUTING.html#x) [b](LICENSE) [c](floe_kernels.html) [d](#y)"
    assert (tmp_path / "LICENSE").exists()
