"""Whatever shows how a run goes can be taken out of it: the same is learned with it and without."""

import numpy as np
import pytest
import torch

from ditlit import callbacks
from ditlit.callbacks import (
    ActivationMaxima,
    DigitsReport,
    RunProgressBar,
    SampleGrid,
    SampleMetrics,
    TrainingMonitor,
)
from ditlit.data import DigitsDataModule
from ditlit.models import DiT

MAKE = {
    "ActivationMaxima": lambda real, cache: ActivationMaxima(every_n_steps=1),
    "DigitsReport": lambda real, cache: DigitsReport(num_samples=20, batch_size=20),
    "RunProgressBar": lambda real, cache: RunProgressBar(),
    "SampleGrid": lambda real, cache: SampleGrid(every_n_steps=2, per_class=1),
    "SampleMetrics": lambda real, cache: SampleMetrics(
        real, every_n_steps=2, num_samples=12, extractor="extractor.Colours", num_workers=0, cache=cache
    ),
    "TrainingMonitor": lambda real, cache: TrainingMonitor(),
}


@pytest.fixture
def learned(make_module, make_trainer, tmp_path):
    """What three steps leave behind: weights, their average, the optimizer, and the state of torch's generator."""
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "real.npz", arr_0=images)

    def run(*names):
        sizes = dict(input_size=8, in_channels=1, num_classes=10, patch_size=4, hidden_size=16, depth=1, num_heads=2)
        torch.manual_seed(0)
        module = make_module(denoiser=DiT(**sizes, dropout=0.1))
        shown = [MAKE[name](str(tmp_path / "real.npz"), str(tmp_path / "cache")) for name in names]
        bar = "RunProgressBar" in names
        trainer = make_trainer(max_steps=3, callbacks=shown, log_every_n_steps=1, enable_progress_bar=bar)
        trainer.fit(module, DigitsDataModule(str(tmp_path / "digits"), global_batch_size=8, val_batch_size=360))
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        saved = torch.load(tmp_path / "end.ckpt", weights_only=False)
        return {name: saved[name] for name in ("state_dict", "current_model_state", "optimizer_states")}

    return run


def test_nothing_is_learned_from_what_is_shown(learned):
    assert set(MAKE) == set(callbacks.__all__)
    expected = learned()
    for name in MAKE:
        torch.testing.assert_close(learned(name), expected, rtol=0, atol=0, msg=lambda text, n=name: f"{n}: {text}")
    torch.testing.assert_close(learned(*MAKE), expected, rtol=0, atol=0)
