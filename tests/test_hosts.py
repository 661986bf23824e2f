"""Several hosts: DeepSpeed's hostfile over a real ssh, and the slurm script under an `srun` that starts its tasks here.

Both "hosts" are this machine: an ssh server of the test's own on a free port of 127.0.0.1, under two names.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import runs

# Several new Pythons start, which takes longer than all that they compute.
pytestmark = pytest.mark.release
SBIN = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def ssh(tmp_path: Path) -> Iterator[Path]:
    """A folder with an `ssh` that reaches node0 and node1 without a question; all it needs is in `tmp_path`."""
    found = {name: shutil.which(name, path=SBIN) for name in ("sshd", "ssh", "ssh-keygen", "pdsh")}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed (Debian: openssh-server, pdsh)")
    if os.getuid() == 0:
        # The server's own place for its unprivileged half; a service manager makes it at boot.
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    home = tmp_path / "ssh"
    home.mkdir(mode=0o700)
    for key in ("host", "user"):
        command = [found["ssh-keygen"], "-q", "-t", "ed25519", "-N", "", "-f", str(home / key)]
        subprocess.run(command, check=True)  # type: ignore[arg-type]
    shutil.copy(home / "user.pub", home / "authorized")
    port = runs.free_port()
    server = ["ListenAddress 127.0.0.1", f"Port {port}", f"HostKey {home / 'host'}", "PidFile none", "UsePAM no"]
    server += [f"AuthorizedKeysFile {home / 'authorized'}", "StrictModes no", "PermitRootLogin prohibit-password"]
    server += ["PasswordAuthentication no", "KbdInteractiveAuthentication no"]
    (home / "server").write_text("\n".join(server) + "\n")
    client = [
        "Host node0 node1",
        "HostName 127.0.0.1",
        f"Port {port}",
        f"IdentityFile {home / 'user'}",
        "BatchMode yes",
    ]
    client += ["StrictHostKeyChecking no", "UserKnownHostsFile /dev/null", "LogLevel ERROR", "IdentitiesOnly yes"]
    (home / "client").write_text("\n".join(client) + "\n")
    wrapper = script(tmp_path / "bin" / "ssh", f'exec {found["ssh"]} -F {home / "client"} "$@"')
    with (home / "log").open("w") as log:
        process = subprocess.Popen([found["sshd"], "-D", "-e", "-f", str(home / "server")], stderr=log)  # type: ignore[list-item]
    try:
        for _ in range(100):
            if subprocess.run([wrapper, "node1", "true"], capture_output=True).returncode == 0:
                break
            assert process.poll() is None, (home / "log").read_text()
            time.sleep(0.1)
        else:
            pytest.skip(f"no ssh to this machine: {(home / 'log').read_text()[-500:]}")
        yield wrapper.parent
    finally:
        process.terminate()
        process.wait()


def one_rank(folder: Path) -> Path:
    runs.train_here(runs.tiny_config(folder))
    return folder / "run"


def test_a_hostfile_trains_on_two_hosts(ssh: Path, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("node0 slots=1\nnode1 slots=1\n")
    path = f"{ssh}:{runs.clean_env()['PATH']}"
    launcher = [shutil.which("deepspeed", path=path), "--hostfile", hosts, "--master_addr", "127.0.0.1"]
    launcher += ["--master_port", runs.free_port()]
    arguments = runs.tiny_config(tmp_path / "two")
    done = runs.execute([*launcher, "scripts/train.py", *arguments], PATH=path)  # type: ignore[list-item]
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    said = done.stdout + done.stderr
    assert "node0" in said and "node1" in said and "2 rank(s)" in said
    assert_same(tmp_path / "two" / "run", one_rank(tmp_path / "one"))


SRUN = """for node in $(seq 0 $((SLURM_NNODES - 1))); do
  SLURM_PROCID=$node SLURM_NODEID=$node SLURM_LOCALID=0 SLURM_NTASKS=$SLURM_NNODES SLURMD_NODENAME=node$node "$@" &
  tasks="$tasks $!"
done
for task in $tasks; do wait $task || exit $?; done"""


def slurm(tmp_path: Path, srun: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """`scripts/train_slurm.sh` as sbatch starts it on the first of two nodes of one device each."""
    script(tmp_path / "bin" / "srun", srun)
    script(tmp_path / "bin" / "scontrol", '[ "$*" = "show hostnames node[0-1]" ] && printf "localhost\\nlocalhost\\n"')
    variables = {"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_ID": "7"}
    variables |= {"PATH": f"{tmp_path / 'bin'}:{runs.clean_env()['PATH']}", "MASTER_PORT": runs.free_port(), **more}
    return runs.execute(["bash", "scripts/train_slurm.sh", *arguments], **variables)


def test_the_slurm_script_trains_on_two_nodes(tmp_path: Path) -> None:
    done = slurm(tmp_path, SRUN, *runs.tiny_config(tmp_path / "two"))
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert "2 rank(s)" in done.stdout
    assert_same(tmp_path / "two" / "run", one_rank(tmp_path / "one"))


def test_a_requeued_slurm_job_resumes(tmp_path: Path) -> None:
    first = slurm(tmp_path, 'echo "$@"', "--config", "a.yaml", "train.steps=2").stdout.split()
    assert first[:4] == ["scripts/train_torchrun.sh", "2", "1", "localhost"]
    assert first[4:] == ["--config", "a.yaml", "train.steps=2", "run.resume=false"]
    again = slurm(tmp_path, 'echo "$@"', "--config", "a.yaml", SLURM_RESTART_COUNT="1").stdout.split()
    assert again[-1] == "run.resume=true"


def assert_same(run: Path, other: Path) -> None:
    """Two hosts learned what one process does, to float tolerance (as in `tests/test_distributed.py`)."""
    assert [line["step"] for line in runs.lines(run, "train")] == [line["step"] for line in runs.lines(other, "train")]
    assert runs.largest_difference(runs.weights(run), runs.weights(other)) < 2e-6
