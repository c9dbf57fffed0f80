"""The server under test: one process after the other on the same ports."""
import fcntl
import http.client
import os
import re
import socket
import subprocess
import sys
import time

SLOTS = 6           # fewer than workers, so that requests queue
QUEUE = 10          # and now and then are refused


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """One `linspec serve` after the other on the same ports; `lives` says what the log of each is written to."""

    def __init__(self, binary, flags, folder):
        self.port, self.grpc_port, self.folder = free_port(), free_port(), folder
        self.command = [binary, "serve", "--http-port", str(self.port), "--grpc-port", str(self.grpc_port), "--max-requests",
                        str(SLOTS), "--max-queue-requests", str(QUEUE), "--stream-buffer-bytes", "65536", "--log-format", "json",
                        *flags]
        self.rss_kib, self.lost_lines = [], []       # [life][pause]
        self.lives = ["file", "full disk", "nobody reads"]
        self.process = self.pipe = None
        self.start()

    def start(self):
        kind = self.lives[len(self.rss_kib) % len(self.lives)]
        self.rss_kib.append([])
        self.lost_lines.append([])
        if self.pipe:
            os.close(self.pipe)
            self.pipe = None
        if kind == "nobody reads":
            self.pipe, output = os.pipe()
            fcntl.fcntl(output, fcntl.F_SETPIPE_SZ, 4096)   # full after a dozen lines
        else:
            output = os.open("/dev/full" if kind == "full disk" else self.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.process = subprocess.Popen(self.command, stdout=output)
        os.close(output)
        for _ in range(1200):
            try:
                if self.ask("GET", "/ready", timeout=1)[0] == 200:
                    return
            except OSError:
                pass
            if self.process.poll() is not None:
                sys.exit(f"soak: the server exited with {self.process.returncode}; try: {' '.join(self.command)}")
            time.sleep(0.1)
        sys.exit("soak: the server is not ready after two minutes")

    def ask(self, method, path, body=None, timeout=300):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            return reply.status, reply.read()
        finally:
            connection.close()

    def metric(self, name, label=""):
        text = self.ask("GET", "/metrics")[1].decode()
        return sum(float(value) for labels, value in re.findall(rf"^{name}({{[^}}]*}})? (\S+)$", text, re.M) if label in labels)

    def sample(self):
        self.lost_lines[-1].append(self.metric("linspec_log_lines_lost_total"))
        with open(f"/proc/{self.process.pid}/status", encoding="ascii") as status:
            self.rss_kib[-1].append(int(re.search(r"VmRSS:\s+(\d+)", status.read()).group(1)))
