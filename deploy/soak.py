#!/usr/bin/env python3
"""Mixed traffic with faults against a private server on 127.0.0.1: full answers, dropped streams, slow readers, bad input,
the process stopped and continued, killed and restarted. Every finished answer is compared with its solo run; at the end no
slot may be held and memory must be flat.

usage: deploy/soak.py LINSPEC_BINARY [MINUTES] [flags of `linspec serve`]
"""
import collections
import http.client
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time

WORKERS = 12
SLOTS = 6  # fewer than workers, so that requests queue
REQUESTS = [{"prompt": prompt, "max_tokens": 8 + 7 * i, "seed": i, "temperature": temperature}
            for i, (prompt, temperature) in enumerate(
                [("Once upon a time", 0), ("The sea was", 0.8), ("one two three " * 40, 0), ("She said that", 1.0),
                 ("In the beginning there was the word and the word was", 0.5), ("A", 0.7), ("x " * 200, 0.9), ("It was late", 0)])]
BAD_BODIES = [b"", b"{", b"[]", b'{"prompt":"x","temperature":-1}', b'{"prompt":"x","max_tokens":0}', b'{"prompt":[-1]}',
              b'{"prompt":"x","n":1000000}', b'{"prompt":"' + b"\xff\xfe" + b'"}', b"[" * 100000]


class Server:
    def __init__(self, binary, flags):
        with socket.socket() as a, socket.socket() as b:
            a.bind(("127.0.0.1", 0))
            b.bind(("127.0.0.1", 0))
            self.port, grpc = a.getsockname()[1], b.getsockname()[1]
        self.command = [binary, "serve", "--http-port", str(self.port), "--grpc-port", str(grpc), "--max-requests", str(SLOTS),
                        "--stream-buffer-bytes", "65536", "--log-level", "error", *flags]
        self.rss_kib = []
        self.start()

    def start(self):
        self.rss_kib.append([])
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL)
        for _ in range(600):
            try:
                if self.ask("GET", "/ready", timeout=1)[0] == 200:
                    return
            except OSError:
                pass
            if self.process.poll() is not None:
                sys.exit(f"soak: the server exited with {self.process.returncode}; try: {' '.join(self.command)}")
            time.sleep(0.1)
        sys.exit("soak: the server is not ready after a minute")

    def ask(self, method, path, body=None, timeout=120):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            return reply.status, reply.read()
        finally:
            connection.close()

    def metric(self, name):
        text = self.ask("GET", "/metrics")[1].decode()
        return sum(float(value) for value in re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.M))

    def sample_memory(self):
        with open(f"/proc/{self.process.pid}/status", encoding="ascii") as status:
            self.rss_kib[-1].append(int(re.search(r"VmRSS:\s+(\d+)", status.read()).group(1)))


class Soak:
    def __init__(self, server, seconds):
        self.server = server
        self.expected = [self.solo(request) for request in REQUESTS]
        self.end = time.monotonic() + seconds
        self.counts = collections.Counter()
        self.wrong = []
        self.restarting = threading.Event()

    def solo(self, request):
        status, body = self.server.ask("POST", "/v1/completions", json.dumps(request))
        if status != 200:
            sys.exit(f"soak: the solo run failed with {status}: {body[:300]!r}")
        return json.loads(body)["choices"][0]["text"]

    def stream(self, rng, index, drop, slow):
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=120)
        try:
            connection.request("POST", "/v1/completions", json.dumps(REQUESTS[index] | {"stream": True}))
            if drop and rng.random() < 0.3:
                return "dropped"
            reply = connection.getresponse()
            if reply.status == 503:
                return "refused"
            text, done = "", False
            for line in reply:
                if slow:
                    time.sleep(0.05)
                if line.startswith(b"data: [DONE]"):
                    done = True
                elif line.startswith(b"data: "):
                    text += "".join(choice["text"] for choice in json.loads(line[6:])["choices"])
                if drop and rng.random() < 0.2:
                    return "dropped"
            if not done:  # http.client takes a broken chunked body for its end
                raise ConnectionError(f"the stream of request {index} ended without [DONE]")
            if text != self.expected[index]:
                self.wrong.append((index, text))
            return "slow" if slow else "streamed"
        finally:
            connection.close()

    def act(self, rng):
        index, kind = rng.randrange(len(REQUESTS)), rng.random()
        if kind < 0.35:
            return self.stream(rng, index, drop=False, slow=False)
        if kind < 0.6:
            return self.stream(rng, index, drop=True, slow=False)
        if kind < 0.65:
            return self.stream(rng, index, drop=False, slow=True)
        if kind < 0.75:
            status, body = self.server.ask("POST", "/v1/completions", rng.choice(BAD_BODIES))
            if not 400 <= status < 500:
                self.wrong.append(("bad input", status, body[:200]))
            return "bad input"
        status, body = self.server.ask("POST", "/v1/completions", json.dumps(REQUESTS[index]))
        if status == 503:
            return "refused"
        if status != 200 or json.loads(body)["choices"][0]["text"] != self.expected[index]:
            self.wrong.append((index, status, body[:200]))
        return "plain"

    def work(self, seed):
        rng = random.Random(seed)
        while time.monotonic() < self.end:
            try:
                self.counts[self.act(rng)] += 1
            except (OSError, http.client.HTTPException, ValueError) as error:
                # A kill in mid-answer breaks connections; nothing else may.
                if not self.restarting.is_set():
                    self.wrong.append(("connection", type(error).__name__, str(error)))
                time.sleep(0.2)

    def disturb(self):
        """Main thread: stop and continue now and then, one kill -9 half-way."""
        started, killed, turn = time.monotonic(), False, 0
        while time.monotonic() < self.end:
            time.sleep(1)
            turn += 1
            self.server.sample_memory()
            if turn % 15 == 0:
                self.server.process.send_signal(signal.SIGSTOP)
                time.sleep(0.5)
                self.server.process.send_signal(signal.SIGCONT)
                self.counts["SIGSTOP"] += 1
            if not killed and time.monotonic() > (started + self.end) / 2:
                killed = True
                self.restarting.set()
                self.server.process.kill()
                self.server.process.wait()
                self.server.start()
                time.sleep(2)
                self.restarting.clear()
                self.counts["SIGKILL"] += 1

    def run(self):
        threads = [threading.Thread(target=self.work, args=(seed,)) for seed in range(WORKERS)]
        for thread in threads:
            thread.start()
        self.disturb()
        for thread in threads:
            thread.join()


def memory_is_flat(samples):
    """Second half against the peak of the first: what one step or connection needs was needed there already."""
    if len(samples) < 8:
        return True
    half = len(samples) // 2
    return max(samples[half:]) < 1.1 * max(samples[:half]) + 8 * 1024


def main():
    minutes = float(sys.argv[2]) if len(sys.argv) > 2 else 1.0
    server = Server(sys.argv[1], sys.argv[3:])
    soak = Soak(server, minutes * 60)
    soak.run()
    failures = [f"wrong: {case}" for case in soak.wrong[:10]]
    idle_by = time.monotonic() + 10
    while server.metric("linspec_num_requests_running") > 0 and time.monotonic() < idle_by:
        time.sleep(0.1)
    free = int(re.search(r'linspec_state_slots{[^}]*state="free"[^}]*} (\d+)', server.ask("GET", "/metrics")[1].decode()).group(1))
    if free != SLOTS:
        failures.append(f"leaked slots: {SLOTS - free}")
    for life in server.rss_kib:
        if not memory_is_flat(life):
            failures.append(f"memory grew: {life[0]} to {life[-1]} KiB")
    server.process.send_signal(signal.SIGTERM)
    if server.process.wait(60) != 0:
        failures.append(f"SIGTERM: exit status {server.process.returncode}")
    print(", ".join(f"{count} {what}" for what, count in sorted(soak.counts.items())))
    print(f"{len(soak.wrong)} wrong, {SLOTS - free} slots leaked, memory "
          + "; ".join(f"{life[0] // 1024} to {life[-1] // 1024} MiB" for life in server.rss_kib if life))
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
