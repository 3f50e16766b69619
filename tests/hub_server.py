"""A small Hub on localhost: the part of the HTTP API that pushing and loading a model uses.

    with hub_server() as hub:
        push_to_hub(folder, "ann/model", token=hub.token, endpoint=hub.url)

`hub.repos` is what it stores, `hub.requests` every request it saw, and `hub.faults` makes it fail.
Wire format after huggingface_hub 2.4: large files go over plain git-lfs, since there is no Xet
storage here. The client takes that way with `huggingface_hub.constants.HF_HUB_DISABLE_XET` true,
which the environment variable HF_HUB_DISABLE_XET=1 sets at import; `use_hub` patches it.

transformers has no `endpoint` argument and reads HF_ENDPOINT once, at import. Two ways there:
- another process with the environment `hub.environment(home)`: the whole truth, some seconds;
- `use_hub(monkeypatch, hub, home)` in this one, which patches the constants and the cache folders
  that huggingface_hub and transformers look up at call time.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
from hub_routes import HubHandler
from hub_state import Hub
from huggingface_hub import constants
from huggingface_hub.hf_api import api


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Run an empty Hub until the block ends."""
    with tempfile.TemporaryDirectory() as folder:
        server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
        server.daemon_threads = True
        url = f"http://127.0.0.1:{server.server_address[1]}"
        hub = Hub(url, "hf_write", "hf_read", Path(folder))
        server.hub = hub  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def use_hub(monkeypatch: Any, hub: Hub, home: Path) -> None:
    """Let huggingface_hub and transformers of this process talk to `hub`, until undone.

    Both look these names up when they are called; only HfApi objects that exist already, the
    module-level functions of huggingface_hub among them, keep the endpoint they were made with.
    """
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(api, "endpoint", hub.url)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    huggingface_hub.close_session()  # no client that was made for another Hub
