"""What GPUs can multiply at most: FLOP/s on the vendors' datasheets, by the names that drivers report."""

from typing import NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer

from ditlit.precision import tf32_products


class Peak(NamedTuple):
    """Dense TFLOP/s; None where a GPU has no units for it.

    Attributes:
        fp16, bf16: products of 16 bits, added up in float32.
        tf32, fp32: products of float32, shortened or not.
    """

    fp16: float
    bf16: float | None
    tf32: float | None
    fp32: float


# NVIDIA's datasheets and architecture whitepapers of each product. Where these give figures "with sparsity", half of
# them; of a superchip, those of one GPU.
DATA_CENTER = {
    "GB200": Peak(2500, 2500, 1250, 80),
    "B200": Peak(2250, 2250, 1100, 75),
    "GH200 480GB": Peak(989.4, 989.4, 494.7, 66.9),
    "GH200 144G HBM3e": Peak(989.4, 989.4, 494.7, 66.9),
    "H200": Peak(989.4, 989.4, 494.7, 66.9),
    "H200 NVL": Peak(835.5, 835.5, 417.5, 60),
    "H100 80GB HBM3": Peak(989.4, 989.4, 494.7, 66.9),  # SXM
    "H100 NVL": Peak(835.5, 835.5, 417.5, 60),
    "H100 PCIe": Peak(756, 756, 378, 51.2),
    "H800": Peak(989.4, 989.4, 494.7, 66.9),
    "H20": Peak(148, 148, 74, 44),
    "L40S": Peak(362, 362, 183, 91.6),
    "L40": Peak(181, 181, 90.5, 90.5),
    "L4": Peak(121, 121, 60, 30.3),
    "A100-SXM4-40GB": Peak(312, 312, 156, 19.5),
    "A100-SXM4-80GB": Peak(312, 312, 156, 19.5),
    "A100-PCIE-40GB": Peak(312, 312, 156, 19.5),
    "A100 80GB PCIe": Peak(312, 312, 156, 19.5),
    "A100-PCIE-80GB": Peak(312, 312, 156, 19.5),
    "A800-SXM4-80GB": Peak(312, 312, 156, 19.5),
    "A800 80GB PCIe": Peak(312, 312, 156, 19.5),
    "A40": Peak(149.7, 149.7, 74.8, 37.4),
    "A30": Peak(165, 165, 82, 10.3),
    "A10": Peak(125, 125, 62.5, 31.2),
    "A10G": Peak(70, 70, 35, 35),
    "Tesla V100-SXM2-16GB": Peak(125, None, None, 15.7),
    "Tesla V100-SXM2-32GB": Peak(125, None, None, 15.7),
    "Tesla V100-PCIE-16GB": Peak(112, None, None, 14),
    "Tesla V100-PCIE-32GB": Peak(112, None, None, 14),
    "Tesla T4": Peak(65, None, None, 8.1),
    "RTX 6000 Ada Generation": Peak(364.2, 364.2, 182.1, 91.1),
    "RTX A6000": Peak(154.8, 154.8, 77.4, 38.7),
    "RTX A5000": Peak(111.1, 111.1, 55.6, 27.8),
    # AMD's datasheets of the MI300 series.
    "AMD Instinct MI300X": Peak(1307.4, 1307.4, 653.7, 163.4),
    "AMD Instinct MI325X": Peak(1307.4, 1307.4, 653.7, 163.4),
    "AMD Instinct MI300A": Peak(980.6, 980.6, 490.3, 122.6),
}

# Float32 TFLOP/s of GeForce cards (NVIDIA's whitepapers on GA102, AD102 and RTX Blackwell, and its pages of the smaller
# cards). Their tensor cores add up in float32 at half of the rate that is advertised for 16 bits: twice that of
# float32; TF32 is as fast as float32. Laptops' chips have other names and other rates.
GEFORCE = {
    "RTX 5090": 104.8, "RTX 5090 D": 104.8, "RTX 5080": 56.3, "RTX 5070 Ti": 43.9, "RTX 5070": 30.9,
    "RTX 5060 Ti": 23.7, "RTX 5060": 19.2, "RTX 5050": 13.2,
    "RTX 4090": 82.6, "RTX 4090 D": 73.5, "RTX 4080 SUPER": 52.2, "RTX 4080": 48.7, "RTX 4070 Ti SUPER": 44.1,
    "RTX 4070 Ti": 40.1, "RTX 4070 SUPER": 35.5, "RTX 4070": 29.1, "RTX 4060 Ti": 22.1, "RTX 4060": 15.1,
    "RTX 3090 Ti": 40.0, "RTX 3090": 35.6, "RTX 3080 Ti": 34.1, "RTX 3080": 29.8, "RTX 3070 Ti": 21.7,
    "RTX 3070": 20.3, "RTX 3060 Ti": 16.2, "RTX 3060": 12.7, "RTX 3050": 9.1,
}  # fmt: skip

PEAKS = DATA_CENTER | {f"GeForce {name}": Peak(2 * rate, 2 * rate, rate, rate) for name, rate in GEFORCE.items()}


def peak_flops(name: str, dtype: torch.dtype, tf32: bool = False) -> float | None:
    """FLOP/s of a GPU by its name; None where the name or its rate for the type is not known.

    Args:
        name: as the driver reports it, in full: a part of it may be another card's, and a MIG slice is no whole GPU.
        dtype: in which matrices are multiplied.
        tf32: whether float32 products are TF32.
    """
    peak = PEAKS.get(name.removeprefix("NVIDIA "))  # older drivers name cards without their maker
    if peak is None:
        return None
    rates = {torch.float16: peak.fp16, torch.bfloat16: peak.bf16, torch.float32: peak.fp32}
    rate = peak.tf32 or peak.fp32 if tf32 and dtype == torch.float32 else rates.get(dtype)
    return None if rate is None else rate * 1e12


def product_dtype(precision: str) -> torch.dtype:
    """In which type a trainer of this precision multiplies matrices."""
    if "bf16" in precision:
        return torch.bfloat16
    return {"16": torch.float16, "64": torch.float64}.get(precision.split("-")[0], torch.float32)


def peak_of(trainer: Trainer, pl_module: LightningModule) -> float | None:
    """FLOP/s on the datasheet of a module's GPU at the training precision; None where they are not known."""
    if pl_module.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(pl_module.device)
    return peak_flops(name, product_dtype(str(trainer.precision)), tf32_products())
