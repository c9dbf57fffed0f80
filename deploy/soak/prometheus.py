"""Prometheus with the shipped alerts, scraping the server under test."""
import json
import pathlib
import shutil
import subprocess
import time
import urllib.parse
import urllib.request

from server import free_port


class Prometheus:
    """A real one with our alerts, where the Debian package is installed."""

    def __init__(self, folder, target_port):
        self.binary, self.folder, self.port, self.process = shutil.which("prometheus"), folder, free_port(), None
        source = pathlib.Path(__file__).resolve().parents[1] / "prometheus"
        shutil.copy(source / "rules.yml", folder)
        config = (source / "prometheus.yml").read_text().replace("linspec:8000", f"127.0.0.1:{target_port}")
        (folder / "prometheus.yml").write_text(config)
        self.restart()

    def restart(self):
        self.stop()
        if self.binary:
            self.process = subprocess.Popen(
                [self.binary, f"--config.file={self.folder}/prometheus.yml", f"--storage.tsdb.path={self.folder}/data",
                 f"--web.listen-address=127.0.0.1:{self.port}", "--log.level=error"], stderr=subprocess.DEVNULL)
        return 1 if self.binary else 0

    def stop(self):
        if self.process:
            self.process.kill()
            self.process.wait()

    def fired(self, seconds):
        """Names of alerts that fired during the run; None without a Prometheus."""
        if not self.binary:
            return None
        query = f"count by (alertname) (max_over_time(ALERTS{{alertstate='firing'}}[{int(seconds) + 60}s]))"
        url = f"http://127.0.0.1:{self.port}/api/v1/query?" + urllib.parse.urlencode({"query": query})
        for _ in range(60):
            try:
                with urllib.request.urlopen(url, timeout=10) as reply:
                    return sorted(row["metric"]["alertname"] for row in json.load(reply)["data"]["result"])
            except OSError:
                time.sleep(1)
        return ["Prometheus does not answer"]
