"""`skipcal report`, which cli.py registers. Importing it imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skipcal.commands import options as opt
from skipcal.commands.console import Console, check_typed, command, given
from skipcal.commands.help import OUTPUT
from skipcal.errors import ConfigError, Unavailable

if TYPE_CHECKING:
    from skipcal.evaluation.token_map import TokenMap
    from skipcal.profiles.schema import SkipProfile

# Ours. Long enough that some tokens lie past a warm-up of 25.
SAMPLE_TEXT = (
    "The ferry left the harbour at half past six, while the gulls were still asleep on the pier. Nobody on "
    "board spoke much. A girl counted the boats, a man read yesterday's newspaper, and the captain hummed "
    "the only song he knew. When the fog lifted, the island lay before them, green and much closer than "
    "they had thought."
)
MOST_TOKENS = 512  # of a text whose cells can still be told apart

Page = Annotated[
    Path, opt.option("--output", "-o", metavar="FILE", section=OUTPUT, help="Page to write: .html.")
]
Text = Annotated[
    str | None,
    opt.option("--text", metavar="TEXT", help="Text to show token by token. Default: a few sentences."),
]
NoTokens = Annotated[bool, opt.option("--no-tokens", help="Leave the text out; then no model is loaded.")]


@opt.takes(opt.loading)
def report(
    ctx: typer.Context,
    source: opt.ProfileArgument,
    output: Page,
    text: Text = None,
    no_tokens: NoTokens = False,
    overwrite: opt.Overwrite = False,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
    **shared: Any,
) -> None:
    """Write a profile as one HTML page, with a text token by token.

    Curves, regions, operating points and provenance. The page fetches nothing, so it can be sent and opened
    anywhere.

    Example: skipcal report smollm2-135m-instruct -o report.html
    """
    with command(as_json, debug) as console:
        asked = given(ctx, "source", "output", "no_tokens", "overwrite")
        if no_tokens and asked:
            stray = next(iter(asked)).replace("_", "-")
            raise ConfigError(f"--{stray} has no effect with --no-tokens; leave one of them out")
        check_typed("--text", text or "")
        if text is not None and not text.strip():
            raise ConfigError("--text is empty; give some text, or leave it out for skipcal's own")
        console.importing()
        from skipcal.profiles.schema import SkipProfile
        from skipcal.report.page import check_suffix, write_report

        check_suffix(output)
        page = console.output(output, overwrite=overwrite)
        found = SkipProfile.load(source)
        shown = None if no_tokens else _tokens(console, found, asked, text or SAMPLE_TEXT)
        place = page.write(lambda path: write_report(found, path, token_map=shown, overwrite=overwrite))
        console.result({"output": str(place)}, f"wrote {place}")


def _tokens(console: Console, profile: SkipProfile, asked: dict[str, Any], text: str) -> TokenMap:
    """The token map of `text` by the profile's model."""
    policy = profile.policy_for()  # its tensors may be missing, which is said before a model is loaded
    try:
        loaded = console.load(console.with_own_model(profile, asked))
    except Unavailable as error:
        raise Unavailable(
            f"the tokens need the profile's model: {error}; or leave them out with --no-tokens"
        ) from error
    from skipcal.evaluation.token_map import token_map
    from skipcal.text.opening import row_ids

    profile.check_fits(loaded.model)
    tokenizer: Any = loaded.tokenizer
    count = len(row_ids(tokenizer, text))
    if count > MOST_TOKENS:
        raise ConfigError(f"--text has {count} tokens; expected at most {MOST_TOKENS}, to be told apart")
    return token_map(loaded.model, tokenizer, policy, text)
