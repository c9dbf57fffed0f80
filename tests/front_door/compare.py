#!/usr/bin/env python3
"""Age of tokens at the client and processor time per token: linspec beside what Boost.Beast and gRPC alone need for the same streams,
in turns, medians over the rounds.

usage: tests/front_door/compare.py BENCH_FRONT_DOOR [ROUNDS] [STREAMS] [PACE_US]
"""
import re
import statistics
import subprocess
import sys

CASES = {"REST": [], "Beast alone": ["--server", "beast"], "gRPC": ["--protocol", "grpc"], "gRPC alone": ["--server", "grpc"]}


def run(binary, streams, pace_us, flags):
    text = subprocess.run([binary, "streams", "--streams", streams, "--tokens", "100", "--pace-us", pace_us, *flags], check=True,
                          capture_output=True, text=True).stdout
    tokens = int(re.search(r"(\d+) tokens in", text)[1])
    p50, p90, p99 = map(float, re.search(r"p50 ([\d.]+)  p90 ([\d.]+)  p99 ([\d.]+)", text).groups())
    seconds = float(re.search(r"server: ([\d.]+) s of processor", text)[1])
    return p50, p90, p99, seconds / tokens * 1e6


def main():
    binary, rounds, streams, pace_us = (sys.argv[1:] + ["5", "500", "20000"][len(sys.argv) - 2:])[:4]
    results = {name: [] for name in CASES}
    for _ in range(int(rounds)):
        for name, flags in CASES.items():
            results[name].append(run(binary, streams, pace_us, flags))
    print(f"{streams} streams, a token each every {pace_us} us, medians of {rounds} rounds (lowest to highest)\n")
    print("| server | age p50, ms | p90, ms | p99, ms | processor time a token, us |\n|---|---|---|---|---|")
    for name, rows in results.items():
        cells = [f"{statistics.median(column):.1f} ({min(column):.1f} to {max(column):.1f})" for column in zip(*rows)]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
