"""Shares of a GPU's peak: exact names, dense rates, and FLOP/s alone where the peak is not known."""

import csv

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from pretended import pretended_gpu

from ditlit.callbacks import TrainingMonitor
from ditlit.callbacks.peaks import PEAKS, peak_flops
from ditlit.models import macs


@pytest.mark.parametrize(
    ("name", "bf16", "tf32", "fp32"),
    [
        ("NVIDIA A100-SXM4-40GB", 312, 156, 19.5),
        ("NVIDIA A100-SXM4-80GB", 312, 156, 19.5),
        ("A100-SXM4-80GB", 312, 156, 19.5),  # an older driver
        ("NVIDIA A100-PCIE-40GB", 312, 156, 19.5),
        ("NVIDIA A100 80GB PCIe", 312, 156, 19.5),
        ("NVIDIA A10", 125, 62.5, 31.2),
        ("NVIDIA A10G", 70, 35, 35),
        ("NVIDIA L4", 121, 60, 30.3),
        ("NVIDIA L40", 181, 90.5, 90.5),
        ("NVIDIA L40S", 362, 183, 91.6),
        ("NVIDIA GeForce RTX 3080", 59.6, 29.8, 29.8),
        ("NVIDIA GeForce RTX 3080 Ti", 68.2, 34.1, 34.1),
        ("NVIDIA GeForce RTX 3090", 71.2, 35.6, 35.6),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6, 82.6),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 88.2, 44.1, 44.1),
        ("NVIDIA GeForce RTX 5090", 209.6, 104.8, 104.8),
        ("NVIDIA H100 80GB HBM3", 989.4, 494.7, 66.9),
        ("NVIDIA H100 PCIe", 756, 378, 51.2),
        ("NVIDIA H100 NVL", 835.5, 417.5, 60),
        ("NVIDIA H200", 989.4, 494.7, 66.9),
        ("NVIDIA GH200 480GB", 989.4, 494.7, 66.9),
        ("NVIDIA B200", 2250, 1100, 75),
        ("NVIDIA GB200", 2500, 1250, 80),
        ("AMD Instinct MI300X", 1307.4, 653.7, 163.4),
    ],
)
def test_peaks_are_dense_rates_with_sums_in_float32(name, bf16, tf32, fp32):
    for dtype in (torch.bfloat16, torch.float16):
        assert peak_flops(name, dtype) == peak_flops(name, dtype, tf32=True) == pytest.approx(bf16 * 1e12)
    assert peak_flops(name, torch.float32, tf32=True) == pytest.approx(tf32 * 1e12)
    assert peak_flops(name, torch.float32) == pytest.approx(fp32 * 1e12)
    assert peak_flops(name, torch.float64) is None


@pytest.mark.parametrize(
    "name", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-40GB MIG 3g.20gb", "NVIDIA H100", "A1000", ""]
)
def test_a_name_that_only_resembles_a_known_one_is_not_known(name):
    assert peak_flops(name, torch.bfloat16) is None


def test_a_gpu_without_units_for_a_type_has_no_peak_there():
    assert peak_flops("Tesla V100-SXM2-32GB", torch.bfloat16) is None
    assert peak_flops("Tesla V100-SXM2-32GB", torch.float16) == 125e12
    assert peak_flops("Tesla V100-SXM2-32GB", torch.float32, tf32=True) == 15.7e12  # the setting has no effect there


def test_the_table_is_sound():
    for name, peak in PEAKS.items():
        assert not name.startswith("NVIDIA "), "looked up without it"
        assert peak.fp32 <= (peak.tf32 or peak.fp32) <= peak.fp16 and peak.bf16 in (None, peak.fp16), name


NAMES = {"a known GPU": "NVIDIA A10", "an unknown GPU": "NVIDIA Unheard Of"}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_the_monitor_shows_a_share_where_the_peak_is_known_and_flops_always(
    make_module, make_trainer, datamodule, tmp_path, monkeypatch, name
):
    module = make_module()
    with pretended_gpu():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        trainer = make_trainer(accelerator="gpu", precision="bf16-mixed", callbacks=[TrainingMonitor()],
                               logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=2)  # fmt: skip
        trainer.fit(module, datamodule)
    with open(tmp_path / "metrics.csv") as file:
        *_, last = csv.DictReader(file)
    tflops = float(last["throughput/tflops"])
    expected = 6 * macs(module.denoiser) * float(last["throughput/images_per_second"]) / 1e12
    assert tflops == pytest.approx(expected)
    shown = trainer.progress_bar_metrics
    if name == "NVIDIA A10":
        assert float(last["throughput/mfu"]) == pytest.approx(tflops / 125) == pytest.approx(shown["MFU"], rel=1e-5)
        assert "TFLOP/s" not in shown
    else:
        assert "throughput/mfu" not in last and "MFU" not in shown
        assert shown["TFLOP/s"] == pytest.approx(tflops, rel=1e-5)
