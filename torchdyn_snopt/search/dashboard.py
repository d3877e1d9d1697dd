"""The web page of a search: optuna-dashboard on this machine's loopback address."""

from __future__ import annotations

import importlib.util
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from torchdyn_snopt.errors import UnsupportedError

if TYPE_CHECKING:
    from torchdyn_snopt.search.compare import HorizonSearch

LOOPBACK = "127.0.0.1"


@contextmanager
def serve_dashboard(search: HorizonSearch[Any], port: int = 0) -> Iterator[str]:
    """Serve the page while the block lasts.

    Args:
        search: Whose studies and artifacts.
        port: Where to listen; any free port if 0.

    Yields:
        The page's address.

    Raises:
        UnsupportedError: optuna-dashboard is not installed.
    """
    if importlib.util.find_spec("optuna_dashboard") is None:
        raise UnsupportedError(
            "the dashboard is not installed",
            got="no module optuna_dashboard",
            allowed="an environment with the extra 'dashboard'",
            do="pip install 'torchdyn-snopt[dashboard]'",
        )
    from optuna_dashboard import wsgi

    application = wsgi(search.storage, artifact_store=search.artifacts)
    server = make_server(LOOPBACK, port, application, _Server, _Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://{LOOPBACK}:{server.server_port}/dashboard"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(WSGIServer):
    """Does not look the machine's own name up, which takes seconds where there is no resolver."""

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = LOOPBACK, self.socket.getsockname()[1]
        self.setup_environ()


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Requests are no news."""
