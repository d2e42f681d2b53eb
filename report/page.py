"""Write a report: a page that brings all it needs and fetches nothing."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from skipcal.errors import ConfigError, ProfileMismatch
from skipcal.evaluation.token_map import TokenMap
from skipcal.files.reading import printable
from skipcal.files.writing import write_text_atomic
from skipcal.plots.tokens import tokens_html
from skipcal.profiles.schema import SkipProfile
from skipcal.profiles.summary import summarize
from skipcal.report import tables
from skipcal.report.charts import chart_data, corpora
from skipcal.version import __version__

SUFFIX = ".html"


def write_report(
    profile: SkipProfile, path: str | Path, *, token_map: TokenMap | None = None, overwrite: bool = False
) -> None:
    """Write a profile as one HTML file that opens without a network, about 5 MB.

    token_map: what `skipcal.token_map` gave for the profile's model; None: the page has none.
    The same profile and map give the same bytes. Raises ConfigError for a name that does not end in
    .html, OutputExists or OutputError as `SkipProfile.save` does, ProfileMismatch for another model's map.
    """
    target = Path(path)
    check_suffix(target)
    write_text_atomic(target, report_html(profile, token_map), overwrite=overwrite)


def check_suffix(path: Path) -> None:
    """Raise ConfigError unless the file's name ends in .html."""
    if path.suffix.lower() != SUFFIX:
        raise ConfigError(f"report {path}: ending {path.suffix!r} is not {SUFFIX}; try {path.stem}{SUFFIX}")


def report_html(profile: SkipProfile, token_map: TokenMap | None = None) -> str:
    """The page as text; see `write_report`."""
    layers = profile.model.num_layers
    if token_map is not None and token_map.cosine.shape[1] != layers:
        raise ProfileMismatch(
            f"the token map has {token_map.cosine.shape[1]} layers, the profile {layers}; make it with the "
            "profile's model"
        )
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters["printable"] = printable
    text: str = page.from_string(_part("page.html.jinja")).render(
        profile=profile,
        tokens=token_map,
        tables=tables,
        corpora=corpora(profile),
        text=None if token_map is None else Markup(tokens_html(token_map)),
        summary=summarize(profile, by_layer=True),
        version=__version__,
        style=Markup(_part("page.css")),
        script=Markup(_part("page.js")),
        plotly=Markup(_plotly()),
        data=Markup(script_json(chart_data(profile, token_map))),
    )
    return text


def script_json(value: Any) -> str:
    """JSON that can stand inside a script element: no text in it ends the element."""
    text = json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":"))  # ASCII alone
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _part(name: str) -> str:
    return files("skipcal.report").joinpath(name).read_text(encoding="utf-8")


def _plotly() -> str:
    """The charts' library, about 5 MB of script."""
    from plotly.offline import get_plotlyjs

    script: str = get_plotlyjs()
    return script.replace("</script", "<\\/script")
