"""A real four-node Slurm on one machine: a set of namespaces a node, a bridge between them, no trace left behind.

Each node has its own hostname, address, process table and /dev/shm; files are shared, as on a cluster. Nothing appears
in the machine's own network namespace. Needs root and Debian's slurmctld, slurmd, slurm-client and munge.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare")
NODES = ("n1", "n2", "n3", "n4")
_SUBNET = "10.99.0"
_CONTROLLER = f"{_SUBNET}.254"

# cred_expire makes a requeue fast: the default waits two minutes for credentials of the last start to expire. The GPUs
# are plain files, so that recipes which ask for GPUs run as they are.
_CONF = """
ClusterName=test
SlurmctldHost=ctl({controller})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/run/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
SlurmctldTimeout=10
SlurmdTimeout=6
MessageTimeout=5
BatchStartTimeout=10
InactiveLimit=0
KillWait=3
WaitTime=0
UnkillableStepTimeout=20
GresTypes=gpu
NodeName=n[1-4] NodeAddr={subnet}.[1-4] CPUs=2 RealMemory=2000 Gres=gpu:2 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=60 State=UP
"""


def missing() -> str:
    """Why such a cluster cannot be had here, or an empty text."""
    if os.geteuid() != 0:
        return "needs root for network namespaces"
    absent = [name for name in PROGRAMS if not shutil.which(name)]
    if absent:
        return f"needs {', '.join(absent)} (apt-get install slurmctld slurmd slurm-client munge iproute2)"
    probe = ["unshare", "--net", "--uts", "--mount", "--ipc", "--pid", "--fork", "true"]
    if subprocess.run(probe, capture_output=True).returncode:
        return "may not make namespaces here"
    return ""


class Cluster:
    """The daemons and namespaces of four nodes; use as a context."""

    def __init__(self, root: Path) -> None:
        """Keep everything under `root`, an empty folder."""
        self.root = root
        self._tag = f"mds{os.getpid()}"
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in list(self._nodes):
            self.power_off(node)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(5)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for name in ("ctl", *NODES):
            subprocess.run(["ip", "netns", "del", self._net(name)], capture_output=True)

    def _start(self) -> None:
        for folder in ("run", "log", "state", "spool"):
            (self.root / folder).mkdir(parents=True)
        hosts = ["127.0.0.1 localhost", f"{_CONTROLLER} ctl"]
        hosts += [f"{_SUBNET}.{i} {node}" for i, node in enumerate(NODES, 1)]
        (self.root / "hosts").write_text("\n".join(hosts) + "\n")
        (self.root / "slurm.conf").write_text(
            _CONF.format(root=self.root, controller=_CONTROLLER, subnet=_SUBNET).lstrip()
        )
        gpus = [self.root / f"gpu{i}" for i in range(2)]
        for gpu in gpus:
            gpu.touch()
        (self.root / "gres.conf").write_text("".join(f"Name=gpu File={gpu}\n" for gpu in gpus))
        self._wire()
        self._munge()
        self._daemons.append(self._inside("ctl", f"exec slurmctld -D -c -f {self.root}/slurm.conf", "--uts --mount"))
        for node in NODES:
            self.power_on(node)
        wait_for(lambda: self.sinfo().count("idle") == len(NODES), 30, lambda: f"nodes do not come up: {self.sinfo()}")

    def _wire(self) -> None:
        """A network namespace for the controller, with a bridge, and one a node, a cable each."""
        ctl = self._net("ctl")
        _run("ip", "netns", "add", ctl)
        _run("ip", "-n", ctl, "link", "set", "lo", "up")
        _run("ip", "-n", ctl, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", ctl, "addr", "add", f"{_CONTROLLER}/24", "dev", "br0")
        _run("ip", "-n", ctl, "link", "set", "br0", "up")
        for i, node in enumerate(NODES, 1):
            net = self._net(node)
            _run("ip", "netns", "add", net)
            _run("ip", "-n", net, "link", "set", "lo", "up")
            _run("ip", "-n", ctl, "link", "add", node, "type", "veth", "peer", "name", "eth0", "netns", net)
            _run("ip", "-n", ctl, "link", "set", node, "master", "br0", "up")
            _run("ip", "-n", net, "addr", "add", f"{_SUBNET}.{i}/24", "dev", "eth0")
            _run("ip", "-n", net, "link", "set", "eth0", "up")

    def _munge(self) -> None:
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        run, socket = self.root / "run", self.root / "run" / "munge.socket"
        # --force: it dislikes a private folder above its socket.
        command = ["munged", "--force", "--foreground", f"--key-file={key}", f"--socket={socket}"]
        command += [f"--pid-file={run}/munged.pid", f"--seed-file={run}/munged.seed"]
        command += [f"--log-file={self.root}/log/munged.log"]
        self._daemons.append(self._popen(command, "munged"))
        wait_for(socket.exists, 10, lambda: "munged does not start")

    def _popen(self, command: list[str], name: str) -> subprocess.Popen[bytes]:
        with (self.root / "log" / f"{name}.out").open("ab") as out:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)

    def _inside(self, name: str, script: str, namespaces: str) -> subprocess.Popen[bytes]:
        """Run a shell script as the first process of a machine."""
        setup = f"hostname {name}; mount --bind {self.root}/hosts /etc/hosts; {script}"
        command = ["nsenter", f"--net=/run/netns/{self._net(name)}", "unshare", *namespaces.split()]
        return self._popen([*command, "bash", "-c", setup], name)

    def _net(self, name: str) -> str:
        return f"{self._tag}-{name}"

    def power_on(self, node: str) -> None:
        """Boot a node; its cable is where it was."""
        # The first process of a process table must collect what is orphaned in it.
        script = f"mount -t tmpfs tmpfs /dev/shm; slurmd -D -b -N {node} -f {self.root}/slurm.conf & "
        script += "while :; do wait; sleep 0.2; done"
        namespaces = "--uts --mount --ipc --pid --fork --kill-child --mount-proc"
        self._nodes[node] = self._inside(node, script, namespaces)

    def power_off(self, node: str) -> None:
        """Cut a node's power: everything on it dies at once."""
        outer = self._nodes.pop(node)
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
        first = children.read_text().split() if children.exists() else []
        for pid in first:
            os.kill(int(pid), signal.SIGKILL)
        outer.kill()
        outer.wait()

    def cable(self, node: str, plugged: bool) -> None:
        """Pull a node's network cable, or plug it in."""
        _run("ip", "-n", self._net(node), "link", "set", "eth0", "up" if plugged else "down")

    def run(self, *command: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
        """Run a client command beside the controller; its output."""
        done = subprocess.run(
            ["nsenter", "-t", str(self._daemons[1].pid), "--net", "--uts", "--mount", f"--wdns={cwd or Path.cwd()}",
             "env", f"SLURM_CONF={self.root}/slurm.conf", *command],
            capture_output=True, text=True, env=os.environ | (env or {}), timeout=60,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def sinfo(self) -> str:
        """State of every node, a line each."""
        try:
            return self.run("sinfo", "--noheader", "--Node", "--format=%N %T")
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            return str(error)

    def submit(self, *arguments: str, cwd: Path, env: dict[str, str]) -> int:
        """Submit with sbatch; the job's number."""
        return int(self.run("sbatch", "--parsable", *arguments, cwd=cwd, env=env))

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` knows."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", str(number))))

    def lose(self, node: str) -> None:
        """Tell the controller that a node is gone, instead of waiting until it has noticed."""
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")


def wait_for(condition: Callable[[], bool], seconds: float, otherwise: Callable[[], str]) -> None:
    """Wait until the condition holds; fail with the text of `otherwise` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(otherwise())
        time.sleep(0.1)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
