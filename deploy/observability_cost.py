#!/usr/bin/env python3
"""What metrics and logs cost: pairs of runs with everything on (metrics under two names, a scrape a second, a JSON log in a file) and
everything off, in turns, whichever first. For each measure the median of the pairs' ratios, on over off.

usage: deploy/observability_cost.py model LINSPEC_BINARY [PAIRS]             the bundled model, 8 clients in a closed loop
       deploy/observability_cost.py null BENCH_FRONT_DOOR LINSPEC [PAIRS]    an engine that costs nothing, 500 streams, 25,000 tokens/s
"""
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

from load_curve import free_port

ON = ["--log-format", "json", "--log-level", "info", "--metrics", "true", "--metrics-alias", "vllm"]
OFF = ["--log-level", "off", "--metrics", "false"]


class Scraper:
    """GET /metrics once a second, as a Prometheus in a hurry does."""

    def __init__(self, port):
        self.url, self.stopping = f"http://127.0.0.1:{port}/metrics", threading.Event()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self):
        while not self.stopping.wait(1):
            urllib.request.urlopen(self.url, timeout=10).read()

    def stop(self):
        self.stopping.set()
        self.thread.join()


def processor_seconds(pid):
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100


def run(command, folder, port, load, observed):
    """Tokens a second, and the server's processor time per token in us, of one server under one load."""
    scraper, log_file = None, folder / "log"
    with open(log_file, "w", encoding="utf-8") as log:
        process = subprocess.Popen(command + (ON if observed else OFF), stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT)
    try:
        http_port = port(log_file)
        scraper = Scraper(http_port) if observed else None
        before = processor_seconds(process.pid)
        subprocess.run([*load, "--port", str(http_port), "--result-filename", str(folder / "result.json")], check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        used = processor_seconds(process.pid) - before
    finally:
        if scraper:
            scraper.stop()
        process.stdin.close()
        process.terminate()
        process.wait()
    figures = json.loads((folder / "result.json").read_text())
    return figures["output_throughput"], used / figures["total_output_tokens"] * 1e6


def wait_for(ask):
    for _ in range(600):
        try:
            found = ask()
            if found:
                return found
        except OSError:
            pass
        time.sleep(0.05)
    sys.exit("observability_cost: the server did not start")


def model_case(binary):
    port = free_port()
    ready = f"http://127.0.0.1:{port}/ready"
    command = [binary, "serve", "--http-port", str(port), "--grpc-port", "-1"]
    load = [binary, "loadtest", "--quiet", "--num-prompts", "48", "--max-concurrency", "8", "--random-input-len", "32",
            "--random-output-len", "64", "--ignore-eos", "--temperature", "0"]
    return command, lambda _log: wait_for(lambda: urllib.request.urlopen(ready, timeout=1) and port), load


def null_case(bench, binary):
    command = [bench, "serve", "--max-requests", "600", "--pace-us", "20000"]
    load = [binary, "loadtest", "--quiet", "--num-prompts", "500", "--random-input-len", "8", "--random-output-len", "100", "--ignore-eos"]
    return command, lambda log: int(wait_for(log.read_text).split()[0]), load


def main():
    which, programs, pairs = sys.argv[1], [word for word in sys.argv[2:] if not word.isdigit()], [w for w in sys.argv[2:] if w.isdigit()]
    command, port, load = {"model": model_case, "null": null_case}[which](*programs)
    rates, costs = {True: [], False: []}, {True: [], False: []}
    with tempfile.TemporaryDirectory() as scratch:
        for pair in range(int(pairs[0]) if pairs else 10):
            for observed in ((True, False) if pair % 2 else (False, True)):
                rate, cost = run(command, pathlib.Path(scratch), port, load, observed)
                rates[observed].append(rate)
                costs[observed].append(cost)
    print("| | on | off | on over off, median of the pairs (quartiles) |\n|---|---|---|---|")
    for name, values in (("tokens/s", rates), ("server's processor time a token, us", costs)):
        ratios = [on / off for on, off in zip(values[True], values[False])]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"| {name} | {statistics.median(values[True]):.1f} | {statistics.median(values[False]):.1f} "
              f"| {middle:.3f} ({low:.3f} to {high:.3f}) |")


if __name__ == "__main__":
    main()
