"""How Sphinx builds the documentation: `make docs`, which fails on any warning."""

from __future__ import annotations

import inspect
import re
from itertools import takewhile
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from pydantic import BaseModel

import skipcal

project = "skipcal"
version = release = skipcal.__version__
project_copyright = "the skipcal authors"

extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_math_renderer = "mathml"  # which browsers draw themselves: MathJax would be fetched from a network
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"skipcal {release}"
html_show_sphinx = False
html_copy_source = False

# Docstrings are prose: `name` in single backticks is code, whatever it names.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_default_options = {"exclude-members": "model_config, model_post_init"}
autodoc_mock_imports = ["lm_eval"]  # an extra, and the slowest import of all
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80

# Names that annotations mention and these pages do not describe. The build needs no network, so other
# libraries' inventories are not read.
nitpick_ignore_regex = [
    (
        "py:.*",
        r"(torch|transformers|numpy|np|pandas|pd|matplotlib|pydantic|pathlib|collections|nn|abc|types|typing|"
        r"annotated_types|huggingface_hub)\b.*",
    ),
    ("py:.*", r"(Any|Axes|Callable|Figure|Iterable|Iterator|Literal|Mapping|Path|Self|Sequence|Tensor)"),
    ("py:.*", r"(PreTrainedModel|PreTrainedTokenizerBase|TracebackType)"),
    # Parts of an engine or a file that nobody but skipcal makes or reads.
    ("py:.*", r"(skipcal\.[\w.]+\.)?(ChoiceRule|GateRule|ScheduleRule|Checkpoint|trace_store\.Part)"),
]

_PART = re.compile(r"^(?P<names>`?\w+`?(, `?\w+`?)*): +(?P<text>\S.*)$")


def lay_out(_app: Any, _what: str, _name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    """Docstrings as these pages show them: `name: meaning` lines as a list, indented lines as code.

    A meaning goes on over indented lines. Lines that are indented after an empty one are an example, or a
    table that has to keep its columns; a tree that is drawn keeps them too.
    """
    made: list[str] = []
    at = 0
    while at < len(lines):
        line = lines[at]
        part = _PART.match(line)
        after_empty = not made or not made[-1].strip()
        if part and not line.startswith(("Example", "Raises", "Returns", "http")):
            text = [part["text"]]
            while at + 1 < len(lines) and lines[at + 1].startswith(" ") and lines[at + 1].strip():
                at += 1
                text.append(lines[at].strip())
            if not after_empty and not made[-1].startswith("    "):
                made.append("")
            made += [f"``{part['names'].replace('`', '')}``", f"    {' '.join(text)}", ""]
        elif after_empty and any("──" in each for each in takewhile(str.strip, lines[at:])):
            drawn = list(takewhile(str.strip, lines[at:]))
            made += ["::", "", *(f"    {each}" for each in drawn), ""]
            at += len(drawn)
            continue
        elif line.startswith("    ") and after_empty:
            made += ["::", ""]
            while at < len(lines) and (lines[at].startswith("    ") or not lines[at].strip()):
                made.append(lines[at])
                at += 1
            made.append("")
            continue
        else:
            if line.strip() and made and made[-1].startswith("    "):
                made.append("")
            made.append(line)
        at += 1
    lines[:] = made


def short_signature(_app: Any, _what: str, _name: str, obj: Any, _options: Any, *shown: str) -> Any:
    """Names and defaults of what pydantic validates: the fields' bounds are told in their docstring."""
    if isinstance(obj, type) and issubclass(obj, BaseModel):
        fields = {
            name: inspect.Parameter.empty
            if field.is_required()
            else field.get_default(call_default_factory=True)
            for name, field in obj.model_fields.items()
        }
    elif hasattr(obj, "__pydantic_config__"):
        fields = {name: each.default for name, each in inspect.signature(obj).parameters.items()}
    else:
        return shown
    parts = [n if v is inspect.Parameter.empty else f"{n}={v!r}" for n, v in fields.items()]
    return f"(*, {', '.join(parts)})", None


def draw_math(self: Any, node: Any) -> None:
    """A formula as MathML."""
    block = isinstance(node, nodes.math_block)
    formula = tex2mathml(node.astext(), as_block=block)
    self.body.append(f'<div class="math">{formula}</div>' if block else formula)
    raise nodes.SkipNode


def setup(app: Any) -> None:
    """Register the above."""
    app.add_html_math_renderer("mathml", (draw_math, None), (draw_math, None))
    app.connect("autodoc-process-signature", short_signature)
    app.connect("autodoc-process-docstring", lay_out)
