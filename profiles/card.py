"""A profile as a section of a model card: Markdown for README.md of a model folder or hub repository.

Its text is in `card.md.jinja`. What that puts in is taken from the profile, which may come from anyone: it is
escaped, so that it shows as it is and is no markup.
"""

from __future__ import annotations

import json
import re
import shlex
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from skipcal.files.markdown import escaped, fenced
from skipcal.files.reading import printable
from skipcal.profiles.own_model import of_embedded_model
from skipcal.profiles.summary import is_policy, ranges, ratio

if TYPE_CHECKING:
    from skipcal.profiles.data import ProfileData

FIGURE_FILE = "skip_profile.png"  # beside README.md


def card_section(profile: ProfileData, source: str) -> str:
    """The section, from its heading on. source: how it names the profile, a file or a hub id."""
    card = Environment(
        autoescape=True,  # nothing is left to it, but by it a macro's text is known to be escaped
        finalize=_as_it_is,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    card.filters.update(fenced=lambda text: Markup(fenced(text)), ranges=ranges, ratio=ratio)
    text = files("skipcal.profiles").joinpath("card.md.jinja").read_text(encoding="utf-8")
    section = card.from_string(text.replace("\\\n", "")).render(
        profile=profile,
        figure=FIGURE_FILE,
        embedded=of_embedded_model(profile),
        is_policy=is_policy,
        commands=_commands(profile, source),
        loading=_loading(profile),
        source=_quoted(source),
        version=re.sub(r"[^\w.+-]", "", profile.environment.skipcal),
    )
    return printable(section)


def _as_it_is(value: Any) -> Markup:
    """What the template puts in: escaped, unless that has been done."""
    return value if isinstance(value, Markup) else Markup(escaped(str(value)))


def _commands(profile: ProfileData, source: str) -> list[str]:
    model = profile.model
    words = [] if of_embedded_model(profile) else ["--model", model.name]
    if words and model.revision:
        words += ["--revision", model.revision]
    if words and model.trust_remote_code:
        words.append("--trust-remote-code")
    use = ["skipcal", "generate", *words, "--profile", source, "--prompt", "Why is the sky blue?"]
    cost = ["skipcal", "evaluate", *words, "--profile", source, "--task", "perplexity"]
    return [shlex.join(command) for command in (["skipcal", "show", source], use, cost)]


def _loading(profile: ProfileData) -> str:
    """The arguments of `load_model`, as Python writes them."""
    model = profile.model
    arguments = [] if of_embedded_model(profile) else [_quoted(model.name)]
    if arguments and model.revision:
        arguments.append(f"revision={_quoted(model.revision)}")
    if model.dtype in ("bfloat16", "float16", "float32") and model.quantization is None:
        arguments.append(f"dtype={_quoted(model.dtype)}")
    if arguments and model.trust_remote_code:
        arguments.append("trust_remote_code=True")
    return ", ".join(arguments)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
