"""`skipcal push`. Importing it imports no torch."""

from __future__ import annotations

from typing import Annotated

import typer

from skipcal.commands import options as opt
from skipcal.commands.console import command
from skipcal.errors import ConfigError

Repository = Annotated[str, typer.Argument(metavar="REPOSITORY", help="Hub id to push to, as org/name.")]
Branch = Annotated[
    str | None,
    opt.option("--revision", metavar="BRANCH", help="Branch to push to, made if missing. Default: main."),
]
Private = Annotated[bool, opt.option("--private", help="Make a new repository private.")]
CreatePr = Annotated[bool, opt.option("--create-pr", help="Open a pull request instead.")]
Card = Annotated[
    bool,
    opt.option("--model-card/--no-model-card", help="Also write skipcal's section of README.md."),
]
DryRun = Annotated[bool, opt.option("--dry-run", help="Print the section and the files; push nothing.")]


def push(
    source: opt.ProfileArgument,
    repository: Repository,
    revision: Branch = None,
    private: Private = False,
    create_pr: CreatePr = False,
    model_card: Card = True,
    dry_run: DryRun = False,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Upload a profile to the hub, with a section of the model card.

    Its JSON and its tensors go there. The rest of the repository stays as it is. Log in first: hf auth login.

    Example: skipcal push smollm2-135m-instruct me/skips --dry-run
    """
    with command(as_json, debug) as console:
        from skipcal.profiles.hub import CARD_FILE, shared_files
        from skipcal.profiles.schema import SkipProfile
        from skipcal.profiles.sources import HUB_ID

        if not HUB_ID.fullmatch(repository) or "@" in repository:
            raise ConfigError(f"repository {repository!r}: expected org/name (a branch goes to --revision)")
        found = SkipProfile.load(source)
        place = repository if revision is None else f"{repository}@{revision}"
        if dry_run:
            files = {name: len(raw) for name, raw in shared_files(found, figure=model_card).items()}
            section = found.model_card(place) if model_card else ""
            listed = "\n".join(f"{size:>12,} bytes  {name}" for name, size in sorted(files.items()))
            told = f"{section}\n{listed}" + (f"\n{'section of':>18}  {CARD_FILE}" if model_card else "")
            console.result({"files": files, "section": section}, told.lstrip("\n"))
            return
        url = found.push_to_hub(
            repository,
            revision=revision,
            private=True if private else None,
            create_pr=create_pr,
            model_card=model_card,
        )
        console.result({"url": url}, f"pushed to {url}; next: skipcal show {place}")
