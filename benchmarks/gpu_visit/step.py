"""One step, in its own process: what `steps.py` starts."""

from __future__ import annotations

import json
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

from gpu_visit.steps import Visit, write_json


def main() -> None:
    call, given = sys.argv[1], json.loads(sys.argv[2])
    asked = given["visit"]
    visit = Visit(asked["device"], asked["shape"], Path(asked["output"]), Path(asked["work"]))
    module, _, function = call.partition(":")
    values: dict[str, Any] = {}
    try:
        for found in getattr(import_module(module), function)(visit, **given["options"]):
            values |= found
            write_json(Path(given["result"]), values)
    except Exception as error:
        traceback.print_exc()
        first = str(error).strip().partition("\n")[0]
        write_json(Path(given["result"]), {**values, "error": f"{type(error).__name__}: {first}"})
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
