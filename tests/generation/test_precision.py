"""Float32 on GPUs is float32, or TF32 where that is asked for; what was set before is set again afterwards."""

import numpy as np
import pytest
import torch
from calls import encode, sample
from diffusers import AutoencoderTiny
from PIL import Image
from weights import scrambled

from ditlit.images.vae import Autoencoder
from ditlit.precision import HAS_WORDS, convolutions_as_products, float32_products

backends = torch.backends
SETTINGS = {
    "nothing": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "no TF32 in convolutions": lambda: setattr(backends.cudnn, "allow_tf32", False),
    "TF32 in all": lambda: setattr(backends.cuda.matmul, "allow_tf32", True),
}
WORDS = {
    "products by word": lambda: setattr(backends.cuda.matmul, "fp32_precision", "tf32"),
    "convolutions by word": lambda: setattr(backends.cudnn.conv, "fp32_precision", "ieee"),
    "the rest by word": lambda: setattr(backends, "fp32_precision", "tf32"),
}


def words():
    if not HAS_WORDS:
        return ()
    return (backends, backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv, backends.cudnn.rnn)


def state():
    """All that is set; None where torch refuses to say."""
    found = [place.fp32_precision for place in words()]
    for read in (torch.get_float32_matmul_precision, lambda: backends.cudnn.allow_tf32):
        try:
            found.append(read())
        except RuntimeError:
            found.append(None)
    return found


@pytest.fixture(autouse=True)
def as_before():
    before = [place.fp32_precision for place in words()]
    torch.set_float32_matmul_precision("highest")
    backends.cudnn.allow_tf32 = True
    yield
    torch.set_float32_matmul_precision("highest")
    backends.cudnn.allow_tf32 = True
    for place, value in zip(words(), before, strict=True):
        place.fp32_precision = value


def tf32_in_convolutions():
    return backends.cudnn.conv.fp32_precision == "tf32" if HAS_WORDS else backends.cudnn.allow_tf32


@pytest.mark.parametrize("tf32", [True, False])
@pytest.mark.parametrize("name", [*SETTINGS, *(WORDS if HAS_WORDS else ())])
def test_products_are_what_is_asked_for_and_afterwards_what_they_were(name, tf32):
    (SETTINGS | WORDS)[name]()
    before = state()
    with pytest.raises(KeyError), float32_products(tf32):
        assert tf32_in_convolutions() == tf32
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
        x = torch.randn(1, 1, 4, 4, requires_grad=True)
        torch.nn.functional.conv2d(x, x).sum().backward()  # torch refuses settings that contradict each other
        raise KeyError
    assert all(now == then for now, then in zip(state(), before, strict=True) if then is not None)


@pytest.mark.parametrize("name", [*SETTINGS, *(WORDS if HAS_WORDS else ())])
def test_convolutions_follow_products(name):
    (SETTINGS | WORDS)[name]()
    before = state()
    with convolutions_as_products():
        assert tf32_in_convolutions() == (name in ("high", "medium", "TF32 in all", "products by word"))
    assert state() == before


@pytest.fixture
def seen(monkeypatch):
    """What is set while a VAE computes: (TF32 in convolutions, autocast)."""
    found = set()
    for name in ("encode", "decode"):
        computed = getattr(AutoencoderTiny, name)

        def spied(self, x, computed=computed):
            found.add((tf32_in_convolutions(), torch.is_autocast_enabled("cpu")))
            return computed(self, x)

        monkeypatch.setattr(AutoencoderTiny, name, spied)
    return found


@pytest.fixture
def vae(tmp_path):
    blocks = dict(encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4),
                  num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))  # fmt: skip
    AutoencoderTiny(latent_channels=4, **blocks).save_pretrained(tmp_path / "vae")
    return str(tmp_path / "vae")


@pytest.mark.parametrize(("precision", "expected"), [("32", (False, False)), ("tf32", (True, False))])
def test_sample_decodes_in_float32_unless_tf32_is_asked_for(vae, source, tmp_path, seen, precision, expected):
    latents = {"shift": [0.0] * 4, "scale": [1.0] * 4, "vae": Autoencoder(vae).entry}
    seen.clear()
    ckpt = source(scrambled(), latents=latents)
    sample(ckpt, str(tmp_path / "out"), per_class=1, classes="1", num_steps=2, precision=precision, accelerator="cpu")
    assert seen == {expected, (False, False)}  # the latter also while it is loaded


@pytest.mark.parametrize(("precision", "autocast"), [("32", False), ("bf16", True)])
def test_encode_does_what_its_precision_says_and_decodes_in_float32(vae, tmp_path, seen, precision, autocast):
    (tmp_path / "images" / "ant").mkdir(parents=True)
    Image.fromarray(np.zeros((16, 16, 3), dtype=np.uint8)).save(tmp_path / "images" / "ant" / "0.png")
    encode(str(tmp_path / "images"), str(tmp_path / "store"), vae, image_size=16, precision=precision, num_workers=0,
           accelerator="cpu")  # fmt: skip
    assert seen == {(False, autocast), (False, False)}
