"""A judge endpoint on this machine that misbehaves by plan: python judge_server.py ROOT

It prints its port. The first part of a request's path names a folder under ROOT: its plan.json maps
a user message to what is done at the first, second, ... request that holds it (the last repeats),
with "*" for all others; its log.jsonl gets a line for each request.

{"do": "ok", "content": TEXT, "wait_s": S}   a chat completion, after S seconds
{"do": "status", "status": N, "headers": {}, "body": {}}
{"do": "hang", "wait_s": S}                  no answer for S seconds, then an empty one
{"do": "drop"}                               the connection is closed
{"do": "page"}                               HTML with status 200
{"do": "json", "text": TEXT}                 any text, called JSON
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

root = Path(sys.argv[1])
lock = threading.Lock()
in_flight: dict[str, int] = defaultdict(int)
times_seen: dict[tuple[str, str], int] = defaultdict(int)


class Judge(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: two would wait 40 ms for each other

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        folder = self.path.split("/")[1]
        plan = json.loads((root / folder / "plan.json").read_text())
        user = body["messages"][-1]["content"]
        with lock:
            in_flight[folder] += 1
            steps = plan.get(user, plan.get("*", [{"do": "ok"}]))
            step = steps[min(times_seen[folder, user], len(steps) - 1)]
            times_seen[folder, user] += 1
            self.log(folder, user, body)
        try:
            time.sleep(step.get("wait_s", 0))
        finally:
            with lock:
                in_flight[folder] -= 1
        getattr(self, "do_" + step["do"])(step)

    def log(self, folder: str, user: str, body: dict[str, Any]) -> None:
        line = {
            "user": user,
            "at": time.monotonic(),
            "in_flight": in_flight[folder],
            "authorization": self.headers["Authorization"],
            "path": self.path,
            "body": body,
        }
        with (root / folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def do_ok(self, step: dict[str, Any]) -> None:
        message = {"role": "assistant", "content": step.get("content", "Rating: [[7]]")}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        completion = {"id": "c", "object": "chat.completion", "created": 0, "model": "served-model"}
        self.reply(200, json.dumps({**completion, "choices": choices}))

    def do_status(self, step: dict[str, Any]) -> None:
        body = step.get("body", {"error": {"message": f"scripted {step['status']}"}})
        self.reply(step["status"], json.dumps(body), headers=step.get("headers", {}))

    def do_hang(self, step: dict[str, Any]) -> None:
        self.close_connection = True

    do_drop = do_hang

    def do_page(self, step: dict[str, Any]) -> None:
        self.reply(200, "<html>It works!</html>", kind="text/html")

    def do_json(self, step: dict[str, Any]) -> None:
        self.reply(200, step["text"])

    def reply(
        self, status: int, text: str, kind: str = "application/json", headers: dict[str, str] | None = None
    ) -> None:
        content = text.encode()
        try:
            self.send_response(status)
            for name, value in {"Content-Type": kind, **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except OSError:  # the client has gone
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    print(server.server_port, flush=True)
    server.serve_forever()
