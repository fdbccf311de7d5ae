"""What a figure was made with: the facts of a group and the environment of a run."""

import hashlib
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chimera_cli import __version__
from chimera_cli.runs import content_hash, source_hash
from chimera_cli.runtime import cpu_cores, cpu_name, hardware

if TYPE_CHECKING:
    import torch

    from chimera_cli.data.pack import Pack

# What decides figures; the whole set is in requirements.lock, whose hash is recorded beside them.
_PACKAGES = (
    "torch",
    "timm",
    "transformers",
    "tokenizers",
    "numpy",
    "pillow",
    "simplejpeg",
    "pyarrow",
    "safetensors",
    "mlflow",
)


def pack_facts(pack: "Pack") -> dict[str, Any]:
    """Return what identifies a pack in result files."""
    return {"name": pack.name, "fingerprint": pack.fingerprint, "source": pack.manifest["source"]}


def group_facts(command: str, pack: "Pack | None", config: Mapping[str, Any], device: "torch.device") -> dict[str, Any]:
    """Return what group.json says beside kind, status and times: command, pack, hashes, hardware, version.

    `plan` is there where the command applies a step of a contingency plan.
    """
    plan = plan_facts(command)
    return {
        "command": command,
        "pack": None if pack is None else pack_facts(pack),
        "config_hash": content_hash(dict(config)),
        "source_hash": source_hash(),
        "hardware": hardware(device),
        "chimera_version": __version__,
        **({"plan": plan} if plan else {}),
    }


def plan_facts(command: str) -> dict[str, Any] | None:
    """Return the contingency step that a command applies: objective, action, the file of both; None without one.

    Of several `--plan OBJECTIVE/ACTION` it is the last; those `before` it stay in force.
    """
    from chimera_cli.slo.contingency import option, planned

    steps = planned(command)
    if not steps:
        return None
    objective, _, action = steps[-1].partition("/")
    slo = option(command, "--slo") or "configs/slo.yaml"
    return {"objective": objective, "action": action, "slo": slo, "before": list(steps[:-1])}


def environment(device: "torch.device") -> dict[str, Any]:
    """Return the content of environment.json: code, packages, torch build, machine."""
    import psutil
    import torch

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "schema_version": 1,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if (status := _git("status", "--porcelain")) is None else bool(status),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda},
        "gpu": gpu,
        "driver": _driver() if gpu else None,
        "cpu": cpu_name(),
        "cores": cpu_cores(),
        "ram_gb": round(psutil.virtual_memory().total / 2**30, 2),
        "lock_sha256": _lock_hash(),
    }


def command_line(*arguments: str) -> str:
    """Return the command that does this again, with `arguments` in place of what was typed where given."""
    import shlex

    return shlex.join(["chimera", *(arguments or sys.argv[1:])])


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Return what git says of the source tree, None where this is no checkout or git is missing."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _driver() -> str | None:
    from chimera_cli.telemetry.nvml import driver_version

    return driver_version()


def _lock_hash() -> str | None:
    lock = Path(__file__).parents[2] / "requirements.lock"
    return hashlib.sha256(lock.read_bytes()).hexdigest() if lock.is_file() else None
