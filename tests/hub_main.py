"""Asks a small hub of its own for pipelines, and prints what came of it; for `test_hub`.

A program of its own, because huggingface_hub reads its settings once, when it is imported.
"""

import http.server
import json
import os
import shutil
import sys
import threading
from pathlib import Path

ROOT, HOME = Path(sys.argv[1]), sys.argv[2]
REPO, SHA = "someone/a-model", "0" * 40
asked: list[str] = []
broken: list[bool] = []


class Hub(http.server.BaseHTTPRequestHandler):
  """As much of the hub's interface as a download needs, over the files in ROOT."""

  def do_HEAD(self):  # noqa: N802
    self.do_GET()

  def do_GET(self):  # noqa: N802
    path = self.path.partition("?")[0].strip("/")
    files = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*") if p.is_file())
    if REPO not in path:
      self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})
    elif path.startswith(f"api/models/{REPO}/tree"):
      rows = [{"type": "file", "path": f, "size": 1, "oid": "0"} for f in files]
      self._answer(200, json.dumps(rows).encode())
    elif path.startswith(f"api/models/{REPO}"):
      about = {"id": REPO, "sha": SHA, "siblings": [{"rfilename": f} for f in files]}
      self._answer(200, json.dumps(about).encode())
    elif broken and self.path.endswith("unet/config.json"):
      self._answer(418, b"")  # not one of those that are tried again
    else:
      name = path.split("/", 4)[4]  # someone/a-model/resolve/<commit>/<name>
      if self.command == "GET":
        asked.append(name)
      data = (ROOT / name).read_bytes()
      self._answer(200, data, {"ETag": f'"{name}"', "X-Repo-Commit": SHA})

  def _answer(self, status, data, headers=()):
    self.send_response(status)
    for key, value in {**dict(headers), "Content-Length": str(len(data))}.items():
      self.send_header(key, value)
    self.end_headers()
    if self.command == "GET":
      self.wfile.write(data)

  def log_message(self, *_):
    pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ |= {
  "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
  "HF_HOME": HOME,
  "HF_HUB_DISABLE_PROGRESS_BARS": "1",
  "HF_HUB_DISABLE_XET": "1",
  "no_proxy": "127.0.0.1",
}

from jaxpref.errors import UserError  # noqa: E402
from jaxpref.models import hub, pipeline  # noqa: E402

path = hub.find_pipeline(REPO)
results = {
  "files": sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()),
  "asked": sorted(asked),
  "digest": pipeline.load_pipeline(REPO).digest,
}
asked.clear()
server.shutdown()
server.server_close()
results["offline"] = hub.find_pipeline(REPO) == path
try:
  hub.find_pipeline("someone/never-seen")
except UserError as error:
  results["offline, not cached"] = str(error)
server = http.server.ThreadingHTTPServer(("127.0.0.1", server.server_port), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
try:
  hub.find_pipeline("someone/never-seen")
except UserError as error:
  results["unknown"] = str(error)
broken.append(True)
shutil.rmtree(HOME)
try:
  hub.find_pipeline(REPO)
except UserError as error:
  results["broken"] = str(error)
print(json.dumps(results))
