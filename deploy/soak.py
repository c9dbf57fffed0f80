#!/usr/bin/env python3
"""Mixed traffic with faults against a private server on 127.0.0.1, over REST and gRPC: full answers, streams dropped at every
phase, slow readers, scrapers that do not read, bad input, deadlines, the process stopped and continued, killed and restarted,
a full disk under its log, a log that nobody reads, Prometheus killed.

Every answer that ends is compared with its solo run, every dropped one with the beginning of it. Once a minute the traffic
pauses: no slot may be held, and resident memory must be where it was.

Runs in the environment of tests/e2e/requirements.txt. Ends with 1 when anything was wrong.
"""
import argparse
import collections
import fcntl
import http.client
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request

import grpc

WORKERS = 14
SLOTS = 6           # fewer than workers, so that requests queue
QUEUE = 10          # and now and then are refused
PROMPT_WORDS = "the sea was grey and the old man said that he would not go down to the harbour again that night ".split()
LONG = " ".join(PROMPT_WORDS * 100)     # about 2,000 tokens: long enough to be dropped while it is read
REQUESTS = [{"prompt": prompt, "max_tokens": tokens, "seed": i, "temperature": temperature, **more}
            for i, (prompt, tokens, temperature, more) in enumerate([
                ("Once upon a time", 8, 0, {}), ("The sea was", 24, 0.8, {"top_p": 0.9}), ("one two three " * 40, 48, 0, {}),
                ("She said that", 40, 1.0, {"top_k": 40, "frequency_penalty": 0.5}), (LONG, 12, 0.6, {}),
                ("In the beginning there was the word and the word was", 64, 0.5, {"min_p": 0.05}), ("A", 30, 0.7, {}),
                ("x " * 200, 20, 0.9, {"stop": ["the", "."]}), ("It was late", 100, 0, {"repetition_penalty": 1.1})])]
SPECULATION = ["off", "auto", "ngram", None]    # changes speed only: the expected answer is the same for all
BAD_BODIES = [b"", b"{", b"[]", b'{"prompt":"x","temperature":-1}', b'{"prompt":"x","max_tokens":0}', b'{"prompt":[-1]}',
              b'{"prompt":"x","n":1000000}', b'{"prompt":"' + b"\xff\xfe" + b'"}', b"[" * 100000,
              b'{"prompt":"x","top_p":1e400}', b'{"prompt":"","max_tokens":1}', b'{"prompt":"x","logit_bias":{"-1":1}}']


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


class Gate:
    """Workers pass while it is open; close() returns once none is inside."""

    def __init__(self):
        self.condition, self.inside, self.is_open = threading.Condition(), 0, True

    def __enter__(self):
        with self.condition:
            self.condition.wait_for(lambda: self.is_open)
            self.inside += 1

    def __exit__(self, *_):
        with self.condition:
            self.inside -= 1
            self.condition.notify_all()

    def close(self):
        with self.condition:
            self.is_open = False
            self.condition.wait_for(lambda: self.inside == 0)

    def open(self):
        with self.condition:
            self.is_open = True
            self.condition.notify_all()


class Soak:
    def __init__(self, server, seconds, stubs):
        self.server, self.pb, self.pb_grpc = server, *stubs
        self.expected = [self.solo(request) for request in REQUESTS]
        self.seconds, self.end = seconds, time.monotonic() + seconds
        self.counts, self.wrong, self.leaks = collections.Counter(), [], []
        self.gate, self.lock, self.restarting, self.kills = Gate(), threading.Lock(), threading.Event(), 0
        self.actions = [(25, self.stream), (10, self.plain), (15, self.rpc), (15, self.drop), (6, self.drop_rpc), (6, self.deadline),
                        (6, self.slow), (8, self.bad_input), (3, self.half_request), (2, self.stuck_scraper)]

    def solo(self, request):
        status, body = self.server.ask("POST", "/v1/completions", json.dumps(request | {"speculation": "off"}))
        if status != 200:
            sys.exit(f"soak: the solo run failed with {status}: {body[:300]!r}")
        return json.loads(body)["choices"][0]["text"]

    def report(self, what, *details):
        with self.lock:
            self.wrong.append((what, *details))

    def compare(self, index, text, whole=True):
        want = self.expected[index]
        if text != want if whole else not want.startswith(text):
            self.report("wrong answer", index, text, want)

    def body(self, rng, index):
        mode = rng.choice(SPECULATION)
        return REQUESTS[index] | ({"speculation": mode} if mode else {})

    # Each action is one request of one client; its result is what it counts as.
    def plain(self, rng, index):
        status, body = self.server.ask("POST", "/v1/completions", json.dumps(self.body(rng, index)))
        if status == 503:
            return "refused"
        if status != 200:
            return self.report("status", status, body[:200]) or "plain"
        self.compare(index, json.loads(body)["choices"][0]["text"])
        return "plain"

    def events(self, rng, index, pause=0.0):
        """Yields (text so far, finished) for each event of a stream; None first when it was refused."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=300)
        if pause:
            connection.connect()
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        try:
            connection.request("POST", "/v1/completions", json.dumps(self.body(rng, index) | {"stream": True}))
            reply = connection.getresponse()
            if reply.status == 503:
                yield None, True
                return
            text, done = "", False
            yield text, done
            for line in reply:
                time.sleep(pause)
                if line.startswith(b"data: [DONE]"):
                    done = True
                elif line.startswith(b"data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise ConnectionError(f"error event: {event}")
                    text += "".join(choice["text"] for choice in event["choices"])
                yield text, done
            if not done:  # http.client takes a broken chunked body for its end
                raise ConnectionError(f"the stream of request {index} ended without [DONE]")
        finally:
            if rng.random() < 0.5 and connection.sock:   # a reset instead of a clean close
                connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()

    def stream(self, rng, index, pause=0.0):
        text = ""
        for text, _ in self.events(rng, index, pause):
            pass
        if text is None:
            return "refused"
        self.compare(index, text)
        return "streamed"

    def slow(self, rng, index):
        return "slow reader" if self.stream(rng, index, pause=0.05) == "streamed" else "refused"

    def drop(self, rng, index):
        phase = rng.choice(["before the answer", "at its head", "in its middle", "after its last token"])
        if phase == "before the answer":    # queued, or its prompt being read
            with socket.create_connection(("127.0.0.1", self.server.port)) as raw:
                body = json.dumps(self.body(rng, index) | {"stream": rng.random() < 0.5}).encode()
                raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
                time.sleep(rng.choice([0, 0.002, 0.02, 0.1]))
            return f"dropped {phase}"
        for count, (text, done) in enumerate(self.events(rng, index)):
            if text is None:
                return "refused"
            self.compare(index, text, whole=False)
            if phase == "at its head" or (phase == "in its middle" and count > rng.randrange(1, 12)) or done:
                break
        return f"dropped {phase}"

    def half_request(self, rng, _):
        with socket.create_connection(("127.0.0.1", self.server.port)) as raw:
            request = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{\"prompt\": \"x"
            raw.sendall(request[:rng.randrange(1, len(request))])
            time.sleep(rng.choice([0, 0.2]))
        return "half a request"

    def stuck_scraper(self, *_):
        with socket.create_connection(("127.0.0.1", self.server.port)) as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            raw.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            time.sleep(2)
        return "scraper that does not read"

    def bad_input(self, rng, _):
        status, body = self.server.ask("POST", "/v1/completions", rng.choice(BAD_BODIES))
        if not 400 <= status < 500 and status != 503:
            self.report("bad input", status, body[:200])
        return "bad input"

    def call(self, rng, index, timeout):
        request = self.body(rng, index)
        sampling = {key: request[key] for key in ("temperature", "seed", "top_p", "top_k", "min_p", "frequency_penalty",
                                                  "repetition_penalty") if key in request}
        mode = request.get("speculation", "unspecified")
        return self.stub.Generate(self.pb.GenerateRequest(
            text=request["prompt"], sampling=self.pb.SamplingParameters(**sampling),
            stopping=self.pb.StoppingParameters(max_tokens=request["max_tokens"], stop=request.get("stop", [])),
            speculation=self.pb.Speculation.Value(f"SPECULATION_{mode.upper()}")), timeout=timeout)

    def rpc(self, rng, index, timeout=300, name="gRPC", expected=()):
        text = ""
        try:
            for response in self.call(rng, index, timeout):
                text += response.text
        except grpc.RpcError as error:
            self.compare(index, text, whole=False)
            if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
                return "refused"
            if error.code() not in expected:
                raise ConnectionError(f"gRPC {error.code()}: {error.details()}") from error
            return f"{name} passed"
        self.compare(index, text)
        return name

    def deadline(self, rng, index):
        return self.rpc(rng, index, rng.choice([0.001, 0.01, 0.05, 0.2]), "deadline", [grpc.StatusCode.DEADLINE_EXCEEDED])

    def drop_rpc(self, rng, index):
        call = self.call(rng, index, 300)
        try:
            for count, _ in enumerate(call):
                if count >= rng.randrange(0, 6):
                    break
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise ConnectionError(f"gRPC {error.code()}") from error
        call.cancel()
        return "gRPC dropped"

    def work(self, seed):
        rng = random.Random(seed)
        weights, actions = zip(*self.actions)
        while time.monotonic() < self.end:
            with self.gate:
                restarting, kills = self.restarting.is_set(), self.kills
                try:
                    what = rng.choices(actions, weights)[0](rng, rng.randrange(len(REQUESTS)))
                    with self.lock:
                        self.counts[what] += 1
                    if what == "refused":
                        time.sleep(0.1)
                except (OSError, http.client.HTTPException, ValueError) as error:
                    # A kill in mid-answer breaks connections; nothing else may. A slow reader may notice when the next life is up.
                    if not restarting and kills == self.kills:
                        self.report("connection", type(error).__name__, str(error))
                    time.sleep(0.2)

    def pause(self):
        """Nothing runs: every slot must be free, and memory comparable."""
        self.gate.close()
        idle_by = time.monotonic() + 20
        while (self.server.metric("linspec_num_requests_running") + self.server.metric("linspec_num_requests_waiting") > 0
               and time.monotonic() < idle_by):
            time.sleep(0.1)
        held = self.server.metric("linspec_state_slots", 'state="running"')
        if held or self.server.metric("linspec_num_requests_waiting"):
            self.leaks.append(held)
        self.server.sample()
        self.counts["pause"] += 1
        self.gate.open()

    def kill_and_restart(self):
        self.restarting.set()
        self.kills += 1
        self.server.process.kill()
        self.server.process.wait()
        self.server.start()
        time.sleep(2)
        self.restarting.clear()
        self.counts["SIGKILL"] += 1

    def disturb(self, prometheus):
        """Main thread. Two kills, at a third and two thirds, so that each life's log is a different trouble."""
        started = time.monotonic()
        kills = [started + self.seconds / 3, started + self.seconds * 2 / 3]
        every = min(60.0, self.seconds / 8)
        stop_at, pause_at, scrape_at = started + every / 3, started + every, started + every / 2
        while (now := time.monotonic()) < self.end:
            time.sleep(0.2)
            if kills and now >= kills[0]:
                kills.pop(0)
                self.kill_and_restart()
                # A start that took long on a busy machine must not eat the life after it.
                self.end = max(self.end, time.monotonic() + (1 + len(kills)) * self.seconds / 3)
                kills = [time.monotonic() + self.seconds / 3] if kills else []
            if now >= stop_at:
                stop_at = now + every / 3
                self.server.process.send_signal(signal.SIGSTOP)
                time.sleep(0.5)
                self.server.process.send_signal(signal.SIGCONT)
                self.counts["SIGSTOP"] += 1
            if now >= scrape_at:
                scrape_at = now + 2 * every
                self.counts["Prometheus killed"] += prometheus.restart()
            if now >= pause_at:
                pause_at = now + every
                self.pause()

    def run(self, prometheus):
        backoff = [(f"grpc.{what}_reconnect_backoff_ms", 200) for what in ("initial", "min", "max")]
        with grpc.insecure_channel(f"127.0.0.1:{self.server.grpc_port}", options=backoff) as channel:
            self.stub = self.pb_grpc.LinSpecStub(channel)
            threads = [threading.Thread(target=self.work, args=(seed,)) for seed in range(WORKERS)]
            for thread in threads:
                thread.start()
            self.disturb(prometheus)
            for thread in threads:
                thread.join()
        self.pause()


class Prometheus:
    """A real one with our alerts, where the Debian package is installed."""

    def __init__(self, folder, target_port):
        self.binary, self.folder, self.port, self.process = shutil.which("prometheus"), folder, free_port(), None
        source = pathlib.Path(__file__).parent / "prometheus"
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


def memory_is_flat(samples):
    """The last third of the pauses against the first third's highest: what one step or connection needs was needed there."""
    third = len(samples) // 3
    return third < 2 or max(samples[-third:]) <= 1.05 * max(samples[:third]) + 8 * 1024


def make_stubs(folder):
    from grpc_tools import protoc
    root = pathlib.Path(__file__).resolve().parents[1]
    if protoc.main(["protoc", f"-I{root / 'proto'}", f"--python_out={folder}", f"--grpc_python_out={folder}",
                    str(root / "proto/linspec/v1/linspec.proto")]) != 0:
        sys.exit("soak: protoc failed")
    sys.path.insert(0, str(folder))
    from linspec.v1 import linspec_pb2, linspec_pb2_grpc
    return linspec_pb2, linspec_pb2_grpc


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="Other flags go to `linspec serve`, e.g. --device cuda --deterministic true.")
    parser.add_argument("binary", help="the linspec program to start")
    parser.add_argument("minutes", nargs="?", type=float, default=1.0, help="how long the traffic lasts (1)")
    arguments, flags = parser.parse_known_args()
    minutes = arguments.minutes
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        stubs = make_stubs(folder)
        server = Server(arguments.binary, flags, folder)
        prometheus = Prometheus(folder, server.port)
        try:
            soak = Soak(server, minutes * 60, stubs)
            soak.run(prometheus)
            fired = prometheus.fired(minutes * 60)
            server.process.send_signal(signal.SIGTERM)
            status = server.process.wait(60)
        finally:
            prometheus.stop()
            server.process.kill()
        log = (folder / "log").read_text()
    failures = [f"wrong: {case}" for case in soak.wrong[:10]]
    failures += [f"slots held in a pause: {held:g}" for held in soak.leaks]
    failures += [f"memory grew: {life} KiB" for life in server.rss_kib if not memory_is_flat(life)]
    failures += [f"SIGTERM: exit status {status}"] if status else []
    failures += ["a prompt is in the log"] if "harbour" in log else []
    failures += ["the log is empty"] if "request finished" not in log else []
    for life, lost in enumerate(server.lost_lines):
        kind = server.lives[life % len(server.lives)]
        # Every line of a full disk is lost; a pipe takes the first few.
        if lost and (kind == "file" and lost[-1] or kind == "full disk" and not lost[-1]):
            failures.append(f"log to {kind}: {lost[-1]:g} lines lost")
    print(", ".join(f"{count} {what}" for what, count in sorted(soak.counts.items())))
    memory = "; ".join(f"{life[0] / 1024:.0f} to {life[-1] / 1024:.0f} MiB" for life in server.rss_kib if life)
    alerts = "no Prometheus here" if fired is None else f"alerts: {', '.join(fired) or 'none'}"
    print(f"{minutes:g} minutes, {len(soak.wrong)} wrong, {len(soak.leaks)} pauses with a slot held, memory {memory}, {alerts}")
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
