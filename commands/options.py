"""The command line's options: each is written once and means the same in every command.

Those of one command alone are in the package of the command. `takes` gives a command whole groups.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from skipcal.commands import completion
from skipcal.commands.help import GENERAL, MODEL, OUTPUT, TEXT
from skipcal.configs.names import DTYPES, ENGINES, QUANTIZATIONS

MODEL_FORMS = "Hub id, folder, FILE.gguf or HUB-ID:FILE.gguf."
EMBEDDED = "the embedded SmolLM2-135M-Instruct"
PROFILE_FORMS = "file, folder, shipped name or hub id org/name[@revision]"


def option(
    *names: str,
    help: str,
    metavar: str | None = None,
    section: str | None = None,
    complete: completion.Complete | None = None,
    **settings: Any,
) -> Any:
    """An option of typer, told in a section of the help; `complete` gives what a shell offers."""
    return typer.Option(
        *names, help=help, metavar=metavar, rich_help_panel=section, autocompletion=complete, **settings
    )


# Profiles

ProfileOption = Annotated[
    str,
    option("--profile", metavar="PROFILE", help=f"Profile: {PROFILE_FORMS}.", complete=completion.profiles),
]
OptionalProfile = Annotated[
    str | None,
    option("--profile", metavar="PROFILE", help=f"Profile: {PROFILE_FORMS}.", complete=completion.profiles),
]
ProfileArgument = Annotated[
    str,
    typer.Argument(metavar="PROFILE", help=f"Profile: {PROFILE_FORMS}.", autocompletion=completion.profiles),
]
Profiles = Annotated[
    list[str],
    typer.Argument(
        metavar="PROFILE...",
        help=f"Profiles of one model: {PROFILE_FORMS}.",
        autocompletion=completion.profiles,
    ),
]

# The model

Model = Annotated[
    str | None,
    option(
        "--model",
        metavar="NAME",
        section=MODEL,
        help=f"{MODEL_FORMS} Default: the profile's model, without a profile {EMBEDDED}.",
    ),
]
Revision = Annotated[
    str | None,
    option(
        "--revision",
        metavar="REVISION",
        section=MODEL,
        help="Branch, tag or commit of the model on the hub.",
    ),
]
Adapter = Annotated[
    str | None,
    option(
        "--adapter",
        metavar="NAME",
        section=MODEL,
        help="Hub id or folder of a LoRA adapter, put on the model by peft.",
    ),
]
Dtype = Annotated[
    str | None,
    option(
        "--dtype",
        metavar="DTYPE",
        section=MODEL,
        help="auto, bfloat16, float16 or float32. Default: auto.",
        complete=completion.one_of(*DTYPES),
    ),
]
Quantization = Annotated[
    str | None,
    option(
        "--quantization",
        metavar="KIND",
        section=MODEL,
        help="Quantize while loading: bitsandbytes:int8, bitsandbytes:nf4 or torchao:int8.",
        complete=completion.one_of(*QUANTIZATIONS),
    ),
]
Device = Annotated[
    str | None,
    option(
        "--device",
        metavar="DEVICE",
        section=MODEL,
        help="cpu, cuda, cuda:1, ... Default: the accelerator, or cpu.",
        complete=completion.one_of("cpu", "cuda"),
    ),
]
DeviceMap = Annotated[
    str | None,
    option(
        "--device-map",
        metavar="MAP",
        section=MODEL,
        help="auto: spread the model over GPUs, CPU and disk, as transformers does.",
        complete=completion.one_of("auto"),
    ),
]
MaxMemory = Annotated[
    list[str] | None,
    option(
        "--max-memory",
        metavar="LIMIT",
        section=MODEL,
        help="With --device-map auto: 0=20GiB, cpu=48GiB; the rest goes on; repeatable.",
    ),
]
OffloadFolder = Annotated[
    str | None,
    option(
        "--offload-folder",
        metavar="FOLDER",
        section=MODEL,
        help="For weights on disk that the checkpoint has in another form (MoE, .bin).",
    ),
]
AttnImplementation = Annotated[
    str | None,
    option(
        "--attn-implementation",
        metavar="NAME",
        section=MODEL,
        help="eager, sdpa, flash_attention_2, ...",
        complete=completion.one_of("eager", "sdpa", "flash_attention_2"),
    ),
]
TrustRemoteCode = Annotated[
    bool, option("--trust-remote-code", section=MODEL, help="Run code that comes with the model.")
]
Engine = Annotated[
    str | None,
    option(
        "--engine",
        metavar="NAME",
        section=MODEL,
        help=f"How blocks are skipped: {', '.join(ENGINES)}. Default: auto, the fastest that can.",
        complete=completion.one_of(*ENGINES),
    ),
]

# Text

Corpus = Annotated[
    list[str] | None,
    option(
        "--corpus",
        metavar="NAME",
        section=TEXT,
        help="wikitext, c4, gsm8k, gsm8k:single, ..., or a hub id; repeatable.",
        complete=completion.corpora,
    ),
]
DataFiles = Annotated[
    list[str] | None,
    option(
        "--data-files",
        metavar="[NAME=]FILE",
        section=TEXT,
        help=".txt or .jsonl, also .gz, or .parquet; repeatable.",
    ),
]
TextColumn = Annotated[
    str | None,
    option("--text-column", metavar="NAME", section=TEXT, help="Column that holds the text. Default: text."),
]
Prompts = Annotated[
    int | None, option("--prompts", metavar="N", section=TEXT, help="Prompts per corpus. Default: 32.")
]
PromptTokens = Annotated[
    int | None,
    option("--prompt-tokens", metavar="N", section=TEXT, help="Tokens of a prompt. Default: 64."),
]
NewTokens = Annotated[
    int | None,
    option(
        "--new-tokens",
        metavar="N",
        section=TEXT,
        help="Tokens generated after each prompt. Default: 128.",
    ),
]
BatchSize = Annotated[
    int | None, option("--batch-size", metavar="N", section=TEXT, help="Prompts run together. Default: 16.")
]
ChatTemplate = Annotated[
    bool,
    option(
        "--chat-template/--no-chat-template",
        section=TEXT,
        help="Wrap the prompt as the chat model expects, where the tokenizer has a template.",
    ),
]
Seed = Annotated[
    int | None, option("--seed", metavar="N", help="Draws prompts, samples and bootstraps. Default: 0.")
]

# What is skipped

TargetSkipRatio = Annotated[
    float | None,
    option("--target-skip-ratio", metavar="R", help="Fraction of all FFN blocks to skip; 0: the full model."),
]
WarmUpTokens = Annotated[
    int | None,
    option("--warm-up-tokens", metavar="N", help="First tokens decoded by the full model. Default: 25."),
]

# Where results go, and what every command has

Output = Annotated[
    str | None,
    option("--output", "-o", metavar="FILE", section=OUTPUT, help="Default: profiles/<model>.json."),
]
Figure = Annotated[
    Path,
    option("--output", "-o", metavar="FILE", section=OUTPUT, help="Figure to write: .png, .svg or .pdf."),
]
ResultFile = Annotated[
    Path | None, option("--output", "-o", metavar="FILE", section=OUTPUT, help="JSON file for the result.")
]
Folder = Annotated[
    Path | None,
    option(
        "--output", "-o", metavar="FOLDER", section=OUTPUT, help="Folder for records, tables and figures."
    ),
]
RequiredFolder = Annotated[
    Path,
    option(
        "--output", "-o", metavar="FOLDER", section=OUTPUT, help="Folder for records, tables and figures."
    ),
]
Overwrite = Annotated[bool, option("--overwrite", section=OUTPUT, help="Replace an output that exists.")]
ConfigFile = Annotated[
    Path | None,
    option(
        "--config",
        metavar="FILE",
        section=GENERAL,
        help="YAML file or shipped name; options given here win over it.",
        complete=completion.configs,
    ),
]
Json = Annotated[
    bool,
    option("--json", section=GENERAL, help="Print one JSON document on stdout, all else on stderr."),
]
Debug = Annotated[bool, option("--debug", section=GENERAL, help="Show the traceback of an error.")]
Version = Annotated[bool, option("--version", help="Print the version and exit.", is_eager=True)]


def loading(
    model: Model = None,
    revision: Revision = None,
    adapter: Adapter = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    device: Device = None,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    offload_folder: OffloadFolder = None,
    attn_implementation: AttnImplementation = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Which model, and how it is loaded."""


def takes(*groups: Callable[..., None]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of `groups` for its `**shared`; their values are in its context.

    An option that the command has itself stays its own.
    """
    shared = [p for group in groups for p in inspect.signature(group, eval_str=True).parameters.values()]

    def with_shared(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        kept = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        added = [p for p in shared if p.name not in own.parameters]
        command.__signature__ = own.replace(parameters=kept + added)  # type: ignore[attr-defined]
        return command

    return with_shared
