"""Builds the site: ``make docs``. Docstrings are reStructuredText, as torch's are; pages are Markdown."""

import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent.parent))

from impact_optim import __version__

project = "impact_optim"
author = "The impact_optim authors"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]

myst_enable_extensions = ["dollarmath", "attrs_inline"]
myst_heading_anchors = 3

nitpicky = True
# Nothing outside is fetched, so only references to this package can be checked.
nitpick_ignore_regex = [("py:.*", r"(?!impact_optim).*")]
autodoc_typehints = "none"  # sections "Args" say it
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_param = False  # arguments that share a line stay together
napoleon_custom_sections = [("Warns", "Raises"), "Source"]
add_module_names = False
python_use_unqualified_type_names = True

copyright = author
pygments_style = "tango"
html_theme = "furo"
html_title = "impact_optim"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False


def mathml(translator: Any, latex: str, display: str) -> str:
    """Formulas as MathML, which browsers draw by themselves: no script, no network."""
    latex = latex.replace(r"\begin{aligned}", r"\begin{split}").replace(r"\end{aligned}", r"\end{split}")
    return convert(latex, display=display)


def visit_inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(mathml(translator, node.astext(), "inline"))
    raise nodes.SkipNode


def visit_block(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="formula">{mathml(translator, node.astext(), "block")}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    app.config.html_math_renderer = "mathml"
