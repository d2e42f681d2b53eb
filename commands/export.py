"""`skipcal export`. Importing it imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from skipcal.commands import completion
from skipcal.commands import options as opt
from skipcal.commands.console import command
from skipcal.commands.help import OUTPUT
from skipcal.configs.names import METHODS, SURROGATES
from skipcal.errors import ConfigError, asking

if TYPE_CHECKING:
    from skipcal.export.checkpoint import Export

Method = Annotated[
    str,
    opt.option(
        "--method",
        metavar="METHOD",
        help="static, whose FFNs are the same for every token.",
        complete=completion.one_of("static"),
    ),
]
Ratio = Annotated[
    float | None,
    opt.option(
        "--target-skip-ratio",
        metavar="R",
        help="Share of FFNs to leave out. Default: as the profile recommends.",
    ),
]
CheckpointFolder = Annotated[
    Path,
    opt.option("--output", "-o", metavar="FOLDER", section=OUTPUT, help="Folder for the checkpoint."),
]


def export(
    source: opt.ProfileArgument,
    output: CheckpointFolder,
    method: Method = "static",
    target_skip_ratio: Ratio = None,
    model: opt.Model = None,
    revision: opt.Revision = None,
    overwrite: opt.Overwrite = False,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Write a checkpoint without some FFNs, for engines without skipcal.

    They are left out for every token, of prompts too. vLLM and transformers load it as any other.

    Example: skipcal export smollm2-135m-instruct --target-skip-ratio 0.2 -o smol
    """
    with command(as_json, debug) as console:
        check_method(method)
        from skipcal.export.record import EXPORT_FILE
        from skipcal.files.folder import check_folder_output
        from skipcal.profiles.methods import Ask, make_policy, recommended_ratio
        from skipcal.profiles.schema import SkipProfile

        check_folder_output(output, overwrite=overwrite, marker=EXPORT_FILE)
        found = SkipProfile.load(source)
        ratio = recommended_ratio(found) if target_skip_ratio is None else target_skip_ratio
        policy = make_policy(method, found, Ask(target_skip_ratio=ratio, new_tokens=0))
        asked = console.with_own_model(found, {"model": model, "revision": revision})
        for name in ("adapter", "quantization"):
            if asked.get(name) is not None:
                raise ConfigError(
                    f"the profile's model has the {name} {asked[name]}, and an export is made of plain "
                    "weights; merge it, save the model, and give its folder with --model"
                )
        console.importing()
        from skipcal.core.chosen_ffns import ChosenFFNs
        from skipcal.export.checkpoint import export_checkpoint

        assert isinstance(policy, ChosenFFNs)
        done = export_checkpoint(
            found,
            policy,
            asked.get("model"),
            output,
            revision=asked.get("revision"),
            target_skip_ratio=ratio,
            overwrite=overwrite,
        )
        console.result(_document(done), _told(done))


def check_method(method: str) -> None:
    """Raise ConfigError unless its FFNs are the same for every token, and nothing stands in for them."""
    if method == "static":
        return
    if method not in METHODS:
        raise ConfigError(asking(f"method {method!r} is not known; export takes static", method, METHODS))
    if method == f"static{SURROGATES}":
        raise ConfigError(
            "method 'static+surrogates' cannot be exported: no stock architecture has a map in an FFN's "
            "place; serve it by the plug-in of vLLM (docs/serving.md), or export static"
        )
    raise ConfigError(
        f"method {method!r} cannot be exported: a checkpoint leaves out the same FFNs for every token, as "
        "static does; run others in skipcal, or serve them by the plug-in of vLLM (docs/serving.md)"
    )


def _document(done: Export) -> dict[str, Any]:
    return {
        **done.record,
        "output": str(done.folder),
        "bytes_left_out": done.bytes_left_out,
        "bytes_instead": done.bytes_instead,
        "linked": list(done.linked),
    }


def _told(done: Export) -> str:
    layers, total = done.record["layers"], done.record["num_layers"]
    linked = f"; {len(done.linked)} files are links to the model's own" if done.linked else ""
    return (
        f"left out      FFNs of {len(layers)} of {total} layers: {', '.join(map(str, layers))}\n"
        f"weights       {done.bytes_left_out / 1e6:.1f} MB less; zeros in their place: "
        f"{done.bytes_instead / 1e6:.1f} MB{linked}\nwrote {done.folder}; next: vllm serve {done.folder}"
    )
