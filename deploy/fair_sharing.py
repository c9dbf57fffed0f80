#!/usr/bin/env python3
"""What a key that sends little sees of one that floods: a trickle alone, beside a flood with another key, and beside a flood with its
own key, as a table in Markdown.

usage: deploy/fair_sharing.py LINSPEC_BINARY [FLOOD_RATE] [SECONDS]     requests a second (300); seconds of each run (15)
"""
import json
import pathlib
import subprocess
import sys
import tempfile
import time

from load_curve import Server

TRICKLE_RATE = 2
REQUEST = ["--random-input-len", "32", "--random-output-len", "64", "--ignore-eos", "--temperature", "0", "--quiet", "--num-warmups", "0"]


def load(binary, port, key_file, rate, seconds, file):
    return subprocess.Popen([binary, "loadtest", "--port", str(port), "--request-rate", str(rate), "--num-prompts", str(round(rate * seconds)),
                             "--api-key-file", str(key_file), "--result-filename", str(file), *REQUEST],
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def run(binary, server, folder, flood_key, flood_rate, seconds):
    trickle, flood, flooding = folder / "trickle.json", folder / "flood.json", None
    if flood_key is not None:
        flooding = load(binary, server.port, flood_key, flood_rate, seconds + 4, flood)
        time.sleep(2)       # until the queue is full
    load(binary, server.port, folder / "a", TRICKLE_RATE, seconds, trickle).wait()
    if flooding is not None:
        flooding.wait()
    return json.loads(trickle.read_text()), json.loads(flood.read_text()) if flooding else None


def main():
    binary = sys.argv[1]
    flood_rate = float(sys.argv[2]) if len(sys.argv) > 2 else 300
    seconds = float(sys.argv[3]) if len(sys.argv) > 3 else 15
    print("| flood | trickle served, refused | its TTFT p50 / p99, ms | its latency p50 / p99, ms | flood served/s, refused |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        for key in "ab":
            (folder / key).write_text(f"key-{key}\n")
        (folder / "keys").write_text("key-a\nkey-b\n")
        server = Server(binary, "off", "--api-key-file", str(folder / "keys"), "--max-requests", "16", "--max-queue-requests", "64")
        try:
            for name, key in (("none", None), ("another key", folder / "b"), ("the same key", folder / "a")):
                trickle, flood = run(binary, server, folder, key, flood_rate, seconds)
                other = "" if flood is None else f"{flood['request_throughput']:.1f}, {flood['failed']}"
                print(f"| {name} | {trickle['completed']}, {trickle['failed']} | {trickle['p50_ttft_ms']:.0f} / {trickle['p99_ttft_ms']:.0f} "
                      f"| {trickle['p50_e2el_ms']:.0f} / {trickle['p99_e2el_ms']:.0f} | {other} |", flush=True)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
