"""A real S3-compatible server over pytest's own temporary folders: what a test does to a file there, it does to the
object. rclone's `serve s3`, from its package on PyPI."""

from __future__ import annotations

import os
import socket
import subprocess
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from cache.patience import StoreConfig
from cache.place import place_of

KEY, SECRET = "permafrost", "not-a-secret"
IMPATIENT = StoreConfig(retries=1, wait=0.01, timeout=20.0)
"""What a store fails to answer is asked again, but tests do not wait for it."""


@dataclass
class ObjectStore:
    """Serves the folder above `base`, whose name is the bucket."""

    base: Path
    port: int
    _server: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @classmethod
    def over(cls, base: Path) -> ObjectStore:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            return cls(base, found.getsockname()[1])

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """How a client finds it."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def url(self, path: Path) -> str:
        """The URL of a file or folder below the base."""
        return f"s3://{self.base.name}/{path.relative_to(self.base).as_posix()}"

    def at(self, path: Path) -> Path:
        return place_of(self.url(path))

    def start(self) -> None:
        rclone = Path(sysconfig.get_path("scripts")) / "rclone"
        command = [str(rclone), "serve", "s3", "--auth-key", f"{KEY},{SECRET}", "--addr", f"127.0.0.1:{self.port}"]
        command += ["--dir-cache-time", "1ms", "--vfs-cache-mode", "off", "--config", os.devnull, str(self.base.parent)]
        self._server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(200):
            try:
                urlopen(self.endpoint, timeout=1).close()
            except HTTPError:  # it answers, if only to refuse
                return
            except (URLError, OSError):
                time.sleep(0.05)
            else:
                return
        raise AssertionError("the object store did not start")

    def stop(self) -> None:
        assert self._server is not None
        self._server.kill()
        self._server.wait(30)
