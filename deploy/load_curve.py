#!/usr/bin/env python3
"""Arrival rate against latency: open-loop load at each rate, with speculation off and auto in turns, as a table in Markdown.

usage: deploy/load_curve.py LINSPEC_BINARY RATE[,RATE...] [SECONDS]      requests a second; seconds of load per point (20)
"""
import json
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

GOALS = "ttft:200 tpot:20"
LOAD = ["--random-input-len", "64", "--random-output-len", "64", "--random-range-ratio", "0.5", "--ignore-eos", "--temperature", "0",
        "--goodput", GOALS, "--quiet", "--num-warmups", "3"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    def __init__(self, binary, speculation, *flags):
        self.port = free_port()
        self.process = subprocess.Popen([binary, "serve", "--http-port", str(self.port), "--grpc-port", str(free_port()),
                                         "--speculation", speculation, "--log-level", "error", *flags], stdout=subprocess.DEVNULL)
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ready", timeout=1)
                return
            except OSError:
                if self.process.poll() is not None:
                    sys.exit("load_curve: the server exited")
                time.sleep(0.05)

    def stop(self):
        self.process.terminate()
        self.process.wait()


def measure(binary, port, rate, seconds, file):
    subprocess.run([binary, "loadtest", "--port", str(port), "--request-rate", str(rate), "--num-prompts", str(max(1, round(rate * seconds))),
                    "--result-filename", str(file), *LOAD], check=True, stdout=subprocess.DEVNULL)
    return json.loads(file.read_text())


def main():
    binary, rates = sys.argv[1], [float(rate) for rate in sys.argv[2].split(",")]
    seconds = float(sys.argv[3]) if len(sys.argv) > 3 else 20
    servers = {mode: Server(binary, mode) for mode in ("off", "auto")}
    print(f"goals: {GOALS} (ms)\n")
    print("| requests/s | speculation | tokens/s | TTFT p50 / p99, ms | TPOT p50 / p99, ms | goodput, requests/s | in flight | client late |")
    print("|---|---|---|---|---|---|---|---|")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            for rate in rates:
                for mode, server in servers.items():
                    run = measure(binary, server.port, rate, seconds, pathlib.Path(scratch) / f"{mode}.json")
                    print(f"| {rate:g} | {mode} | {run['output_throughput']:.0f} | {run['p50_ttft_ms']:.0f} / {run['p99_ttft_ms']:.0f} "
                          f"| {run['p50_tpot_ms']:.1f} / {run['p99_tpot_ms']:.1f} | {run['request_goodput']:.1f} of "
                          f"{run['request_throughput']:.1f} | {run['max_concurrent_requests']} "
                          f"| {run['client_loop_lag_p99_ms']:.0f} ms |", flush=True)
    finally:
        for server in servers.values():
            server.stop()


if __name__ == "__main__":
    main()
