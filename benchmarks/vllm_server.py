"""vLLM's server with the embedded model, in processes of its own that can be killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from skipcal.arch.embedded import embedded_model_folder

MODEL = "smollm2"
_START_S = 300


class Server:
    """Started and killed as often as is wanted, at one address."""

    def __init__(self, folder: Path, settings: dict[str, Any], *, running: int) -> None:
        """folder: for its logs; settings: of skipcal; running: requests that share a pass at most."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._log = folder / "server.log"
        self._command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server",
            "--model", str(embedded_model_folder()), "--served-model-name", MODEL, "--dtype", "float32",
            "--enforce-eager", "--no-enable-prefix-caching", "--max-model-len", "1024",
            "--max-num-seqs", str(running), "--host", "127.0.0.1", "--port", str(port),
            "--additional-config", json.dumps({"skipcal": settings}),
        ]  # fmt: skip

    def start(self) -> None:
        """Return when it answers."""
        environment = os.environ | {
            "VLLM_PLUGINS": "skipcal", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                self._command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        for _ in range(_START_S):
            try:
                httpx.get(f"{self.url}/health")
                return
            except httpx.TransportError:
                time.sleep(1)
            if self._process.poll() is not None:
                break
        self.kill()
        raise SystemExit(f"the server did not start:\n{self._log.read_text()[-4000:]}")

    def kill(self) -> None:
        """All of its processes, as they are."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def get(self, path: str) -> Any:
        """What it answers: JSON, or text."""
        answer = httpx.get(f"{self.url}{path}", timeout=60)
        answer.raise_for_status()
        return answer.json() if "json" in answer.headers["content-type"] else answer.text
