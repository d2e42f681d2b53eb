"""`skipcal compare`. Importing it imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from skipcal.commands import calibrate_options as own
from skipcal.commands import options as opt
from skipcal.commands.console import command, given
from skipcal.errors import ConfigError

if TYPE_CHECKING:
    from skipcal.arch.loading import LoadedModel


@opt.takes(opt.loading)
def compare(
    ctx: typer.Context,
    sources: opt.Profiles,
    corpus: opt.Corpus = None,
    data_files: opt.DataFiles = None,
    text_column: opt.TextColumn = None,
    target_skip_ratio: own.CompareRatio = None,
    prompts: own.ComparePrompts = None,
    prompt_tokens: opt.PromptTokens = None,
    text_tokens: own.TextTokens = None,
    batch_size: own.CompareBatch = None,
    seed: opt.Seed = None,
    output: opt.Folder = None,
    overwrite: opt.Overwrite = False,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
    **shared: Any,
) -> None:
    """Set profiles of one model side by side, or try each on each text.

    Example: skipcal compare c4.json gsm8k.json --data-files c4.jsonl
    """
    with command(as_json, debug) as console:
        from skipcal.configs.run import ModelSettings

        asked = given(ctx, "sources", "output", "overwrite")
        without_text = {"target_skip_ratio"} | ({*asked} if corpus or data_files else set())
        stray = next((name for name in asked if name not in without_text), None)
        if stray is not None:
            raise ConfigError(
                f"--{stray.replace('_', '-')} has no effect without text; add --corpus or --data-files"
            )
        if overwrite and output is None:
            raise ConfigError("--overwrite has no effect without --output; leave it out")
        loading = {name: asked.pop(name) for name in ModelSettings.model_fields if name in asked}

        console.importing()
        from skipcal.compare.comparison import CompareConfig, check_folder, run_compare
        from skipcal.profiles.schema import SkipProfile

        held = None
        if output:
            main = check_folder(output, with_text=bool(corpus or data_files), overwrite=overwrite)
            held = console.output(main, overwrite=overwrite)

        def loaded() -> LoadedModel:
            first = SkipProfile.load(sources[0])  # the others are of the same model
            return console.load(console.with_own_model(first, loading))

        result = run_compare(sources, CompareConfig(**asked), loaded)
        written = []
        if held:
            place = held.write(lambda path: result.save(path.parent, overwrite=overwrite))
            written = [place.with_name(name) for name in result.files]
        console.result(result.to_dict(), result.to_text())
        for path in written:
            console.say(f"wrote {path}")
