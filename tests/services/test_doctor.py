"""The doctor against faked machines: what it says of each card, and the exact command that mends it."""

from dataclasses import replace
from pathlib import Path

import pytest

from chimera_cli.runtime import runs_on
from chimera_cli.services.doctor import Check, MachineFacts, diagnose, driver_suffices, fitting_wheel, gather

CU126 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CU128 = ("sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
LOCKED = "pip install torch==2.7.1 torchvision==0.22.1"
BLACKWELL = 'pip install "torch>=2.8,<2.11" "torchvision>=0.23,<0.26"'

CPU_ONLY = MachineFacts(
    home="home", home_writable=True, disk_free_gb=100.0, cpu="Ryzen", cores=8, ram_total_gb=32.0, ram_free_gb=20.0,
    python="3.11.7", torch_version="2.7.1", torch_cuda="12.6", torch_archs=CU126, torch_sees_gpu=False,
    weights={"image-weights": True, "text-weights": True},
)  # fmt: skip


def machine(name: str, capability: tuple[int, int], vram_gb: float, driver: str = "560.35.03") -> MachineFacts:
    return replace(
        CPU_ONLY, torch_sees_gpu=True, gpu_name=name, capability=capability, driver_version=driver,
        vram_total_gb=vram_gb, vram_free_gb=vram_gb - 0.5,
    )  # fmt: skip


GTX_1080 = machine("NVIDIA GeForce GTX 1080", (6, 1), 8.0)
RTX_3090 = machine("NVIDIA GeForce RTX 3090", (8, 6), 24.0)
RTX_5090 = machine("NVIDIA GeForce RTX 5090", (12, 0), 32.0, "570.86.16")
H100 = machine("NVIDIA H100 80GB HBM3", (9, 0), 80.0)


def found(facts: MachineFacts, name: str) -> Check:
    return next(check for check in diagnose(facts) if check.name == name)


@pytest.mark.parametrize(
    ("facts", "precision"),
    [(GTX_1080, "float32"), (RTX_3090, "bfloat16"), (H100, "bfloat16"), (CPU_ONLY, "float32")],
)
def test_the_locked_wheel_is_fit_for_all_cards_but_blackwell(facts: MachineFacts, precision: str) -> None:
    assert {check.level for check in diagnose(facts)} == {"ok"}
    assert f"auto chooses {precision} on" in found(facts, "precision").message


def test_a_pascal_card_with_a_wheel_without_pascal_gets_the_locked_one() -> None:
    facts = replace(GTX_1080, torch_version="2.8.0", torch_cuda="12.8", torch_archs=CU128)
    check = found(facts, "gpu")
    assert (check.level, check.fix) == ("fail", LOCKED)
    assert "compute capability 6.1" in check.message
    assert "sm_70" in check.message


def test_a_blackwell_card_with_the_locked_wheel_gets_a_newer_one() -> None:
    check = found(RTX_5090, "gpu")
    assert (check.level, check.fix) == ("fail", BLACKWELL)
    assert found(replace(RTX_5090, torch_version="2.8.0", torch_cuda="12.8", torch_archs=CU128), "gpu").level == "ok"


def test_a_driver_too_old_for_the_cuda_of_torch_gets_a_wheel_that_fits_it() -> None:
    new_torch = replace(
        RTX_3090, torch_version="2.11.0", torch_cuda="13.0", torch_archs=("sm_86",), torch_sees_gpu=False
    )
    check = found(new_torch, "gpu")
    assert check.level == "warn"
    assert check.fix == f"update the NVIDIA driver to 580 or newer, or {LOCKED}"
    ancient = replace(RTX_3090, driver_version="470.82.01", torch_sees_gpu=False)
    assert found(ancient, "gpu").fix == "update the NVIDIA driver to 525 or newer"


def test_a_cpu_build_beside_a_card_leaves_it_idle() -> None:
    facts = replace(RTX_3090, torch_version="2.7.1+cpu", torch_cuda=None, torch_archs=(), torch_sees_gpu=False)
    check = found(facts, "gpu")
    assert (check.level, check.fix) == ("warn", LOCKED)
    assert "float32 on the CPU" in found(facts, "precision").message


def test_a_card_that_torch_cannot_see_for_no_known_reason() -> None:
    check = found(replace(RTX_3090, torch_sees_gpu=False), "gpu")
    assert check.level == "warn"
    assert "nvidia-smi" in check.fix


def test_no_card_and_a_hidden_one_are_fit() -> None:
    assert "none found: runs use the CPU" in found(CPU_ONLY, "gpu").message
    assert "hidden by CUDA_VISIBLE_DEVICES" in found(replace(CPU_ONLY, gpus_hidden=True), "gpu").message


@pytest.mark.parametrize(
    ("changes", "name", "level", "words"),
    [
        ({"torch_version": None}, "torch", "fail", LOCKED),
        ({"pynvml_distribution": "11.5.3"}, "pynvml", "warn", "pip uninstall -y pynvml"),
        ({"ram_free_gb": 0.5}, "ram", "fail", "close other programs"),
        ({"ram_free_gb": 3.0}, "ram", "warn", "--set batch=16"),
        ({"disk_free_gb": 0.5}, "disk", "fail", "CHIMERA_HOME"),
        ({"disk_free_gb": 3.0}, "disk", "warn", "CHIMERA_HOME"),
        ({"home_writable": False}, "disk", "fail", "CHIMERA_HOME"),
        ({"weights": {"here": True, "gone": False}}, "weights", "fail", "pip install gone"),
        ({"broken_packs": ("flickr8k",)}, "data", "warn", "chimera data verify flickr8k"),
    ],
)
def test_what_else_can_be_wrong(changes: dict[str, object], name: str, level: str, words: str) -> None:
    check = found(replace(CPU_ONLY, **changes), name)  # type: ignore[arg-type]
    assert check.level == level
    assert words in check.fix


def test_memory_that_others_hold_is_told() -> None:
    assert found(replace(GTX_1080, vram_free_gb=1.0), "vram").level == "warn"
    assert "7.5 of 8.0 GiB free" in found(GTX_1080, "vram").message


@pytest.mark.parametrize(
    ("capability", "archs", "fits"),
    [
        ((6, 1), ["sm_60"], True),
        ((6, 0), ["sm_61"], False),
        ((7, 5), ["sm_70"], True),
        ((8, 0), ["sm_75", "sm_86"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((10, 3), ["sm_100"], True),
        ((9, 0), ["sm_90a"], True),
        ((10, 0), ["sm_90a"], False),
        ((8, 6), ["compute_90"], False),
        ((8, 6), ["gfx90a"], False),
    ],
)
def test_which_kernels_run_on_which_card(capability: tuple[int, int], archs: list[str], fits: bool) -> None:
    assert runs_on(capability, archs) is fits


def test_least_drivers_by_cuda_version() -> None:
    assert driver_suffices("525.60.13", "12.6")
    assert not driver_suffices("525.59", "12.6")
    assert not driver_suffices("575.51.03", "13.0")
    assert driver_suffices(None, "13.0")
    assert fitting_wheel((3, 5), "560.35.03") is None


def test_this_machine_is_looked_at_without_harm(tmp_path: Path) -> None:
    facts = gather(tmp_path / "not" / "there")
    assert facts.home_writable
    assert facts.torch_version is not None
    assert facts.torch_archs or facts.torch_cuda is None
    assert facts.packs == ()
    assert 0 < facts.ram_free_gb <= facts.ram_total_gb
    assert all(facts.weights.values())
    assert not (tmp_path / "not").exists()
