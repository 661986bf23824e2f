"""Kill parts of a training with SIGKILL at random points, again and again, and compare with a run nobody disturbs.

A life of the trainer that is killed, a random time (drawn from --seed) after it reached the RL stage, is followed by
one that resumes; the last one runs to its end. With `--victims` the killer also takes rollout workers under Ray
(rollout.engine=ray), which are replaced, and a reward server, which comes back a moment later. In the end metrics,
samples and weights must equal the undisturbed run's, bit for bit, and every step's prompts must have been trained on
exactly once.

    OMP_NUM_THREADS=1 python scripts/kill_loop.py --kills 20 --config configs/quickstart.yaml train.steps=60 ...
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

# Clock readings, and what is derived from them: the only numbers of a run that nobody can repeat.
CLOCK = ("time", "speed/")
# What faults cost, and the only other thing they may change.
FAULTS = ("rollout/workers_lost", "rollout/requests_reassigned")
SETTINGS = ("checkpoint.every=1", "checkpoint.keep=2")


def train(arguments: list[str], folder: Path, *overrides: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "rl.cli", "train", *arguments, f"run.output_dir={folder}", *SETTINGS, *overrides]
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A file, because nobody reads along, and a pipe that is full would stop the run.
    with output(folder).open("wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)


def output(folder: Path) -> Path:
    """What the run in `folder` prints."""
    return folder.with_name(f"{folder.name}.log")


def finish(process: subprocess.Popen[bytes], folder: Path) -> None:
    if process.wait():
        sys.exit(f"a run failed, see {output(folder)}")


def lines(folder: Path) -> list[dict[str, Any]]:
    """What a run logged, without clock readings."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        return []
    whole = [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    ignored = (*CLOCK, *FAULTS)
    return [
        {k: v for k, v in line.items() if not k.startswith(ignored) and not k.endswith(("seconds", "retries"))}
        for line in whole
    ]


def digest(folder: Path) -> str:
    weights = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text() / "hf" / "model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()


class RewardServer:
    """Another process that scores completions; `judged`, the reward of both runs, asks it over HTTP."""

    def __init__(self) -> None:
        # Bound and never listening: nobody else gets the port while the server is down.
        self.reserved = socket.socket()
        self.reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self.reserved.bind(("127.0.0.1", 0))
        os.environ["KILL_LOOP_SERVER"] = f"http://127.0.0.1:{self.reserved.getsockname()[1]}"
        self.start()

    def start(self) -> None:
        port = self.reserved.getsockname()[1]
        self.process = subprocess.Popen([sys.executable, __file__, "--serve", str(port)])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        self.reserved.close()


def serve(port: int) -> None:
    class Judge(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            scores = [sum((i + 1) * int(c) for i, c in enumerate(text) if c.isdigit()) / 500 for text in texts]
            body = json.dumps(scores).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        allow_reuse_port = True

    Server(("127.0.0.1", port), Judge).serve_forever()


def judged(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """A reward that lives in the reward server."""
    from rewards.score import TransientRewardError

    try:
        with urllib.request.urlopen(
            os.environ["KILL_LOOP_SERVER"], json.dumps(completions).encode(), timeout=10
        ) as answer:
            return json.loads(answer.read())
    except (OSError, urllib.error.URLError) as error:
        raise TransientRewardError(str(error)) from None


def rollout_workers(trainer: int) -> list[int]:
    """Process ids of the Ray actors below a trainer."""
    parents, workers = {}, []
    for folder in Path("/proc").iterdir():
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if (folder / "cmdline").read_bytes().startswith(b"ray::RayWorker"):
                workers.append(int(folder.name))
        except (OSError, ValueError):
            continue

    def below(process: int) -> bool:
        return process == trainer or (process in parents and below(parents[process]))

    return [process for process in workers if below(process)]


def kill_often(
    arguments: list[str],
    folder: Path,
    kills: int,
    draw: random.Random,
    spread: float,
    victims: Sequence[str] = ("trainer",),
    server: RewardServer | None = None,
) -> list[tuple[str, int]]:
    """Train in `folder` with `kills` kills on the way; returns every victim, and how many lines were logged then.

    A kill comes at most `spread` seconds after the RL stage and its first checkpoint were reached, or after the last
    kill: in a rollout, an update, a checkpoint.
    """
    reached: list[tuple[str, int]] = []
    resume: list[str] = []
    while True:
        process = train(arguments, folder, *resume)
        latest = folder / "checkpoints" / "latest"
        while process.poll() is None and not (b"[train]" in output(folder).read_bytes() and latest.exists()):
            time.sleep(0.05)
        victim = ""
        while victim != "trainer" and len(reached) < kills:
            victim = draw.choice(victims)
            try:
                process.wait(draw.uniform(0.0, spread))
            except subprocess.TimeoutExpired:
                pass
            else:
                break
            if victim == "worker":
                # The last one may just have been killed.
                while not (workers := rollout_workers(process.pid)) and process.poll() is None:
                    time.sleep(0.1)
                if not workers:
                    break
                os.kill(draw.choice(sorted(workers)), signal.SIGKILL)
            elif victim == "server":
                assert server is not None
                server.kill()
                time.sleep(draw.uniform(0.0, 2.0))
                server.start()
            else:
                process.kill()
            reached.append((victim, len(lines(folder))))
        if victim != "trainer" and len(reached) == kills:
            finish(process, folder)
            return reached
        if process.wait() != -signal.SIGKILL:
            what = f"failed, see {output(folder)}" if process.returncode else "is over, give it more train.steps"
            sys.exit(f"after {len(reached)} kills the run {what}")
        resume = ["run.resume=true"]


def compare(undisturbed: Path, killed: Path) -> list[str]:
    """What differs, one line each."""
    problems = []
    one, other = lines(undisturbed), lines(killed)
    steps = [line["step"] for line in other if line["stage"] == "train"]
    if steps != sorted(set(steps)):
        problems.append(f"steps are lost or doubled: {steps}")
    if one != other:
        where = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        problems.append(f"metrics differ from line {where} on, of {len(one)} and {len(other)}")
    samples = [(folder / "samples.jsonl").read_text() for folder in (undisturbed, killed)]
    if samples[0] != samples[1]:
        problems.append("samples differ")
    if digest(undisturbed) != digest(killed):
        problems.append("weights differ")
    return problems


def main() -> int:
    from rl.config import load_config

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the times at which the trainer is killed")
    parser.add_argument("--spread", type=float, default=4.0, help="seconds of the RL stage in which a life is killed")
    parser.add_argument("--victims", nargs="+", default=["trainer"], choices=["trainer", "worker", "server"])
    parser.add_argument("--folder", type=Path, default=Path("runs/kill-loop"), help="new folder for both runs")
    parser.add_argument("--config", help="of the runs")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
    if args.config is None:
        sys.exit("--config is required")
    if args.folder.exists():
        sys.exit(f"--folder {args.folder} exists: name a new one")
    arguments = ["--config", args.config, *args.overrides]
    rollout = load_config(args.config, args.overrides).rollout
    if "worker" in args.victims and (rollout.engine != "ray" or rollout.ray.address is not None):
        sys.exit(
            "--victims worker needs rollout.engine=ray, and rollout.ray.address null: it finds them on this machine"
        )
    server = None
    if "server" in args.victims:
        server = RewardServer()
        arguments += [f"reward.functions=[{{name: '{Path(__file__).resolve()}:judged'}}]", "reward.outage_seconds=120"]
    try:
        undisturbed = args.folder / "undisturbed"
        finish(train(arguments, undisturbed), undisturbed)
        draw = random.Random(args.seed)
        reached = kill_often(arguments, args.folder / "killed", args.kills, draw, args.spread, args.victims, server)
    finally:
        if server is not None:
            server.close()
    print(f"{len(reached)} kills: {', '.join(f'{victim} at line {count}' for victim, count in reached)}")
    print(f"of {len(lines(args.folder / 'undisturbed'))} lines in all")
    problems = compare(args.folder / "undisturbed", args.folder / "killed")
    print("\n".join(problems) or "metrics, samples and weights are those of the undisturbed run")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
