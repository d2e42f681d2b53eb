"""`skipcal bench`, which cli.py registers. Importing it imports no torch."""

from __future__ import annotations

import typer

from skipcal.commands import bench_options as own
from skipcal.commands import options as opt
from skipcal.commands.console import command, command_line, given, numbers


def bench(
    ctx: typer.Context,
    model: opt.Model = None,
    shape: own.Shape = None,
    profile: own.GateProfile = None,
    rule: own.TimedRule = None,
    revision: opt.Revision = None,
    adapter: opt.Adapter = None,
    dtype: opt.Dtype = None,
    quantization: opt.Quantization = None,
    device: opt.Device = None,
    attn_implementation: opt.AttnImplementation = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    engine: opt.Engine = None,
    ratios: own.ForcedRatios = None,
    batch_size: own.BatchSizes = None,
    context_tokens: own.ContextTokens = None,
    new_tokens: own.TimedTokens = None,
    rounds: own.Rounds = None,
    seed: own.BenchSeed = None,
    peers: own.Peers = False,
    output: opt.ResultFile = None,
    overwrite: opt.Overwrite = False,
    config: opt.ConfigFile = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Time decoding with FFN blocks skipped against the full model.

    Arms take turns. The skip ratio is forced, and the whole decision is made. Peers: a compiled step of
    one's own, as in gpt-fast, is not among them.

    Example: skipcal bench --ratios 0.05,0.25,0.5 -o bench.json
    """
    with command(as_json, debug) as console:
        from skipcal.configs.bench import load_bench
        from skipcal.files.writing import dump_json, write_text_atomic
        from skipcal.profiles.schema import SkipProfile

        options = given(ctx, "ratios", "output", "overwrite")
        settings = load_bench(config, {**options, "ratios": numbers("--ratios", ratios)})
        held = console.output(output, overwrite=overwrite) if output else None

        console.importing()
        from skipcal.speed.bench import check_shape, load_subject, run_bench
        from skipcal.speed.table import to_text

        check_shape(settings)
        if settings.profile is not None:
            settings = console.settled(SkipProfile.load(settings.profile), settings)
        result = {**run_bench(settings, load_subject(settings, console.load)), "command": command_line()}
        written = None
        if held is not None:
            written = held.write(lambda path: write_text_atomic(path, dump_json(result), overwrite=overwrite))
        console.result(result, to_text(result))
        if written is not None:
            console.say(f"\nwrote {written}; next: skipcal plot {written} -o speed.png")
