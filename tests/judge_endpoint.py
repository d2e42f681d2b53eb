"""One test's own judge: requests, a server process, and what it saw."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from skipcal.evaluation.judge.judge import ask
from skipcal.evaluation.judge.settings import JudgeSettings
from skipcal.evaluation.judge.verdicts import JudgeRequest, Verdict

Step = dict[str, Any]
OK: Step = {"do": "ok"}


@dataclass
class Endpoint:
    """One test's own endpoint: a folder of the server, an address, a file of records."""

    folder: Path
    port: int

    @property
    def settings(self) -> JudgeSettings:
        url = f"http://127.0.0.1:{self.port}/{self.folder.name}/v1/"
        return JudgeSettings("judge-model", url, timeout_s=20, retries=2, retry_wait_s=0.001, concurrency=2)

    @property
    def records(self) -> Path:
        return self.folder / "records.jsonl"

    def plan(self, **steps: list[Step]) -> None:
        (self.folder / "plan.json").write_text(
            json.dumps({k.replace("rest", "*"): v for k, v in steps.items()})
        )

    def ask(self, count: int = 1, form: Any = "rating", **changes: Any) -> dict[str, Verdict]:
        return ask(requests(count, form), replace(self.settings, **changes), self.records)

    def log(self) -> list[dict[str, Any]]:
        path = self.folder / "log.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def sent(self) -> Counter[str]:
        return Counter(line["user"] for line in self.log())

    def on_disk(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.records.read_bytes().split(b"\n")[1:-1]]


def requests(count: int, form: Any = "rating") -> list[JudgeRequest]:
    return [JudgeRequest(f"item{n}", form, "Be a judge.", f"q{n}") for n in range(count)]


@contextmanager
def serving(root: Path) -> Iterator[int]:
    """A server process with its endpoints under `root`; its port."""
    script = Path(__file__).with_name("judge_server.py")
    server = subprocess.Popen([sys.executable, str(script), str(root)], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield int(server.stdout.readline())
    finally:
        server.kill()
        server.communicate()
