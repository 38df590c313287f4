"""One real training step of DiT-S/2 on latents of real images; needs files that are not part of the project."""

import os
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

from ditlit.callbacks import SampleGrid, TrainingMonitor
from ditlit.data import LatentDataModule, write_store
from ditlit.images.vae import load_vae, weights_hash
from ditlit.models import DiT
from ditlit.training import DiTModule

SHARED = Path(os.environ.get("DITLIT_SHARED") or Path(__file__).parents[3] / "shared")
IMAGES, VAE = SHARED / "data" / "imagenet-sample.tar", SHARED / "vae" / "taesd"


@pytest.mark.skipif(not (IMAGES.exists() and VAE.exists()), reason="needs real images and a VAE in DITLIT_SHARED")
def test_one_step_of_s2_on_real_latents(make_trainer, tmp_path):
    vae = load_vae(str(VAE)).float()
    images = []
    with tarfile.open(IMAGES) as tar:
        members = [m for m in tar if m.isfile()][:8]
        for member in members:
            with Image.open(tar.extractfile(member)) as image:
                image = center_crop(resize(image.convert("RGB"), 256), [256, 256])
                images.append(pil_to_tensor(image) / 127.5 - 1)
    with torch.no_grad():
        latents = vae.encode(torch.stack(images)).latents
    about = dict(vae={"class": "AutoencoderTiny", "source": str(VAE), "hash": weights_hash(load_vae(str(VAE)))})
    store = write_store(tmp_path / "store", latents.half(), torch.arange(8), 8, image_size=256, **about)
    assert store.manifest.shape == (4, 32, 32) and 0.5 < latents.std() < 1.2

    module = DiTModule(DiT("DiT-S/2", num_classes=8))
    module.sampling = type(module.sampling)(num_steps=1)
    losses = []
    grid = SampleGrid(every_n_steps=1, classes=[0, 1], per_class=1)
    trainer = make_trainer(max_steps=1, precision="bf16-mixed", callbacks=[TrainingMonitor(), grid])
    original = module.training_step
    module.training_step = lambda *args: losses.append(original(*args)) or losses[-1]
    before = module.denoiser.final.linear.weight.clone()
    trainer.fit(module, LatentDataModule(str(tmp_path / "store"), global_batch_size=2))
    assert losses[0]["terms"]["mse"].mean().item() == pytest.approx(1, abs=0.05)  # the output starts at zero
    module.ema._swap_out(module)
    # Adam's first step moves every weight by the learning rate; the gradients of the variances are too small for that.
    moved = (module.denoiser.final.linear.weight - before).abs().unflatten(0, (4, 8))[:, :4]
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-4), rtol=0.05, atol=0)
    with Image.open(tmp_path / "samples" / "step-00000001.png") as picture:
        assert picture.width > 260 and picture.height == 518  # two rows of one 256x256 picture, and captions
