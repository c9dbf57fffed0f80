"""`linearize all`: every stage from packed data to the exported pair, as processes that share one device.

While one stage compiles or loads, another trains. Finished stages leave a mark in OUT/done, so the same command goes
on after an interruption. The better of the distilled and the directly trained target, by validation perplexity, is
linked as OUT/target and gets the draft and the Medusa heads.
"""
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass

ABLATION = ("softmax", "local", "local-grouped", "local-conv", "aug", "full")


@dataclass
class Job:
    name: str
    after: tuple
    command: list


def plan(args):
    """Jobs in order of urgency: the longest chain first; the comparison fills what it leaves idle."""
    out = args.out
    # Tokens, not minutes: how fast a stage goes depends on what shares the device with it.
    budget = lambda tokens: ["--max-tokens", str(max(1, int(tokens * 1e6 * args.scale))), "--minutes", "600"]
    train = ["--recipe", args.recipe, "--data", args.data]
    probe = ["eval", "--data", args.data, "--model"]
    run = lambda name: f"{out}/{name}"
    result = lambda name: ["--out", f"{out}/eval/{name}.json"]
    jobs = [
        Job("teacher", (), ["lm", *train, "--variant", "softmax", "--out", run("teacher"), *budget(args.teacher_tokens)]),
        Job("transferred", ("teacher",), ["transfer", *train, "--teacher", run("teacher"), "--out", run("transferred"),
                                          *budget(args.transfer_tokens)]),
        Job("distilled", ("transferred",), ["distill", *train, "--teacher", run("teacher"), "--init", run("transferred"),
                                            "--out", run("distilled"), *budget(args.distill_tokens)]),
    ]
    for variant in ABLATION:
        name = f"short-{variant}"
        jobs.append(Job(name, (), ["lm", *train, "--variant", variant, "--out", run(name), *budget(args.ablation_tokens)]))
        jobs.append(Job(f"eval-{name}", (name,), [*probe, run(name), "--lengths", "1024", "4096", *result(name)]))
    jobs.append(Job("direct", (), ["lm", *train, "--out", run("direct"), *budget(args.direct_tokens)]))
    for name in ("distilled", "direct"):
        jobs.append(Job(f"valid-{name}", (name,), [*probe, run(name), "--split", "valid", "--lengths", "1024",
                                                  *result(f"valid-{name}"), "--distances"]))
    jobs.append(Job("choose", ("valid-distilled", "valid-direct"), []))
    target = run("target")
    jobs.append(Job("draft", ("choose",), ["distill", *train, "--role", "draft", "--teacher", target,
                                           "--out", run("draft"), *budget(args.draft_tokens)]))
    jobs.append(Job("medusa", ("choose",), ["medusa", *train, "--target", target, "--out", run("medusa"),
                                            *budget(args.medusa_tokens)]))
    jobs.append(Job("export-target", ("medusa",), ["export", "--data", args.data, "--model", target, "--medusa",
                                                   run("medusa"), "--out", run("bundled/target")]))
    jobs.append(Job("export-draft", ("draft",), ["export", "--data", args.data, "--model", run("draft"),
                                                 "--out", run("bundled/draft")]))
    jobs.append(Job("eval-shipped", ("draft", "medusa"), [
        *probe, target, "--int8", "--draft", run("draft"), "--medusa", run("medusa"), "--lengths", "1024", "4096",
        *result("shipped")]))
    for name in ("teacher", "distilled", "direct"):
        jobs.append(Job(f"eval-{name}", (name,), [*probe, run(name), "--lengths", "1024", "4096", *result(name)]))
    return jobs


def choose(out):
    """Links the better target by validation perplexity."""
    score = {}
    for name in ("distilled", "direct"):
        with open(f"{out}/eval/valid-{name}.json") as f:
            score[name] = json.load(f)["lengths"][0]["perplexity"]
    best = min(score, key=score.get)
    link = os.path.join(out, "target")
    if os.path.islink(link):
        os.remove(link)
    os.symlink(best, link)
    print(f"validation perplexity {score}: shipping {best}", flush=True)


def main(args):
    for folder in ("done", "eval", "logs"):
        os.makedirs(os.path.join(args.out, folder), exist_ok=True)
    mark = lambda name: os.path.join(args.out, "done", name)
    waiting = [job for job in plan(args) if not os.path.exists(mark(job.name))]
    running, failed, begin = {}, set(), time.time()
    while waiting or running:
        for job in list(waiting):
            if failed.intersection(job.after):
                failed.add(job.name)
                waiting.remove(job)
            elif len(running) < args.parallel and all(os.path.exists(mark(name)) for name in job.after):
                waiting.remove(job)
                if job.name == "choose":
                    choose(args.out)
                    open(mark(job.name), "w").close()
                    continue
                log = open(os.path.join(args.out, "logs", job.name + ".log"), "a")
                command = [sys.executable, "-m", "linearize", *job.command]
                running[job.name] = (subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT), time.time())
                print(f"{time.time() - begin:6.0f} s  start {job.name}", flush=True)
        time.sleep(0.5)
        for name, (process, started) in list(running.items()):
            if process.poll() is None:
                continue
            del running[name]
            print(f"{time.time() - begin:6.0f} s  {name}: exit {process.returncode} after {time.time() - started:.0f} s",
                  flush=True)
            if process.returncode:
                failed.add(name)
                print(f"         see {args.out}/logs/{name}.log", flush=True)
            else:
                open(mark(name), "w").close()
    if failed:
        sys.exit("not done: " + " ".join(sorted(failed)))


def add_arguments(parser):
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--data", required=True, help="folder written by the data stage")
    parser.add_argument("--out", required=True)
    parser.add_argument("--parallel", type=int, default=3, help="processes at a time")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every token budget (0.01 for a rehearsal)")
    for name, default in (("teacher", 400), ("transfer", 6), ("distill", 250), ("direct", 400), ("draft", 150),
                          ("medusa", 60), ("ablation", 24)):
        parser.add_argument(f"--{name}-tokens", type=float, default=default, help=f"million tokens (default {default})")
