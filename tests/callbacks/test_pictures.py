"""Pictures: the fixed grid, its independence of the run, decoding, and prediction."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ditlit.callbacks import SampleGrid, SampleMetrics
from ditlit.data import DigitsDataModule, LatentDataModule, write_store
from ditlit.errors import InputError
from ditlit.images.vae import Autoencoder, load_decoder, weights_hash
from ditlit.models import DiT
from ditlit.pictures import grid_of, read_png, to_uint8, with_captions


@pytest.fixture
def pixels(tmp_path):
    """A datamodule of 3-channel pixels."""
    images = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    write_store(tmp_path / "pixels", images, torch.arange(40) % 5, 5)
    return LatentDataModule(str(tmp_path / "pixels"), val_size=10, global_batch_size=8, predict_samples=7)


def grid(path):
    return np.asarray(Image.open(path))


def test_rounding_to_bytes_is_unbiased():
    values = torch.arange(256)
    assert torch.equal(to_uint8(values / 127.5 - 1), values.to(torch.uint8))
    assert to_uint8(torch.tensor([-1.2, 1.2])).tolist() == [0, 255]
    x = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 1.9 - 0.95
    assert abs((to_uint8(x) / 127.5 - 1 - x).mean().item()) < 0.002  # truncating 255x would give -0.004


def test_a_grid_at_every_validation(make_module, make_trainer, pixels, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    make_trainer(
        callbacks=[SampleGrid(classes=[0, 3], per_class=4, min_side=16)], val_check_interval=2, logger=logger
    ).fit(make_module(), pixels)
    files = sorted((tmp_path / "samples").iterdir())
    assert [f.name for f in files] == ["step-00000002.png", "step-00000004.png"]
    height, width, _ = grid(files[0]).shape  # 2 rows of 4 doubled 8x8 pictures in frames of 2, captions beside them
    assert height == 2 * 18 + 2 and 4 * 18 + 2 < width < 4 * 18 + 40
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [image.step for image in events.Images("samples")] == [2, 4]


def test_a_grid_that_will_never_be_drawn_is_said(make_module, make_trainer, pixels, store, caplog):
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    make_trainer(callbacks=[SampleGrid(per_class=1)], max_steps=1).fit(make_module(), pixels)
    assert "draw nothing" not in caplog.text
    alone = LatentDataModule(pixels.store, global_batch_size=8)
    make_trainer(callbacks=[SampleGrid(per_class=1)], max_steps=1).fit(make_module(), alone)
    assert "it will draw nothing. Hold samples out with --data.val_size, or set its every_n_steps" in caplog.text


def test_real_images_of_the_classes_are_shown_once_beside_the_samples(make_module, make_trainer, tmp_path):
    """Class 3 has one image, class 4 none: the rest of their rows is white."""
    images = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    labels = torch.tensor([0, 1, 2] * 3 + [3, 0, 0])
    write_store(tmp_path / "s", images, labels, 5, class_names=["tench, Tinca tinca", "cat", "owl", "bee", "ант"])
    logger = TensorBoardLogger(tmp_path, name="", version="")
    shown = SampleGrid(every_n_steps=2, classes=[1, 3, 4], per_class=2, min_side=8)
    make_trainer(callbacks=[shown], logger=logger).fit(
        make_module(), LatentDataModule(str(tmp_path / "s"), global_batch_size=4)
    )
    picture = read_png(tmp_path / "real.png")

    def cell(row, column):
        return picture[:, 2 + row * 10 : 10 + row * 10, 2 + column * 10 : 10 + column * 10]

    for place, image in (((0, 0), 1), ((0, 1), 4), ((1, 0), 9)):
        assert torch.equal(cell(*place), to_uint8(images[image]))
    assert all((cell(*place) == 255).all() for place in ((1, 1), (2, 0), (2, 1)))
    assert shown._captions == ["1 cat", "3 bee", "4"]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [image.step for image in events.Images("real")] == [2]


def test_captions_stand_beside_their_rows():
    """Dark letters at the height of each row, none in the pictures, and as many lines as there is room for."""
    pictures = torch.full((4, 3, 32, 32), 200, dtype=torch.uint8)
    plain = grid_of(pictures, 2, 32)
    names = ["0 tench", "1 hammerhead shark with a name of many words that has to end somewhere"]
    picture = with_captions(plain, names)
    assert torch.equal(picture[:, :, : plain.shape[2]], plain)
    margin = picture[0, :, plain.shape[2] :]
    dark = (margin < 100).any(1)
    assert dark[10:26].any() and not dark[28:38].any() and dark[44:60].any() and not dark[-2:].any()
    assert not (margin[:, -2:] < 100).any() and margin.shape[1] < 120


def test_the_grid_is_drawn_from_the_average_with_fixed_noise(make_module, make_trainer, pixels, tmp_path):
    module = make_module()
    make_trainer(callbacks=[SampleGrid(every_n_steps=4, per_class=2, min_side=8, batch_size=3)]).fit(module, pixels)
    picture = grid(tmp_path / "samples" / "step-00000004.png")
    # After training the module holds the average; the third row is class 2, samples 4 and 5.
    module.eval()
    with torch.no_grad():
        expected = to_uint8(module.sample(torch.tensor([2, 2]), [4, 5], seed=0).clamp(-1, 1))
    for column in range(2):
        cell = picture[2 + 2 * 10 : 10 + 2 * 10, 2 + column * 10 : 10 + column * 10]
        assert np.abs(cell.astype(int) - expected[column].permute(1, 2, 0).numpy()).max() <= 1


def test_drawing_does_not_disturb_training(make_module, make_trainer, pixels):
    modules = []
    for callbacks in ([], [SampleGrid(every_n_steps=1, per_class=1)]):
        module = make_module(ema=None, denoiser=DiT(input_size=8, in_channels=3, num_classes=5, patch_size=4,
                                                    hidden_size=16, depth=1, num_heads=2, dropout=0.2))  # fmt: skip
        with torch.no_grad():
            for p in module.denoiser.parameters():
                torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(0))
        make_trainer(callbacks=callbacks).fit(module, pixels)
        assert module.training
        modules.append(module)
    for a, b in zip(*(m.denoiser.parameters() for m in modules), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_prediction_writes_one_file_a_sample(make_module, make_trainer, pixels, tmp_path, num_workers):
    pixels.num_workers = num_workers
    make_trainer(callbacks=[SampleGrid()]).predict(make_module(), pixels)
    names = sorted(f.name for f in (tmp_path / "predictions").iterdir())
    assert names == [f"{i:06d}-class-{i % 5}.png" for i in range(7)]
    assert grid(tmp_path / "predictions" / names[0]).shape == (8, 8, 3)


@pytest.mark.parametrize("where", ["drawn", "decoded"])
def test_a_prediction_that_is_not_finite_is_an_error(make_module, make_trainer, pixels, tmp_path, monkeypatch, where):
    module, grid = make_module(), SampleGrid()
    if where == "drawn":
        for parameter in module.denoiser.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        module.denoiser.label_embed.weight.data[1] = 1e38
    else:
        monkeypatch.setattr("ditlit.callbacks.pictures.load_decoder", lambda *_: lambda z: z / torch.zeros(()))
    said = {
        "drawn": r"image 1 \(class 1\) is not finite from step 1 of 3",
        "decoded": "image 0 is not finite once it is",
    }
    with pytest.raises(InputError, match=said[where]):
        make_trainer(callbacks=[grid]).predict(module, pixels)
    assert not list(tmp_path.glob("predictions/*.png"))


@pytest.fixture
def vae(tmp_path):
    torch.manual_seed(0)
    blocks = dict(encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4),
                  num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))  # fmt: skip
    model = AutoencoderTiny(latent_channels=3, **blocks)
    model.save_pretrained(tmp_path / "vae")
    return model, str(tmp_path / "vae")


def test_latents_that_are_no_pixels_are_not_drawn_as_such(vae):
    """Of a store that names no VAE, as older ones may."""
    with pytest.raises(InputError, match="latents of 4 channels are no pixels, and nothing names their VAE: give it"):
        load_decoder(None, None, torch.device("cpu"), 4)
    assert load_decoder(None, vae[1], torch.device("cpu"), 4)(torch.zeros(1, 3, 8, 8)).shape[1] == 3


def test_latents_are_decoded_by_the_vae_of_the_store(make_module, make_trainer, vae, tmp_path):
    model, folder = vae
    about = {"class": "AutoencoderTiny", "source": folder, "hash": weights_hash(model)}
    latents = torch.randn(16, 3, 8, 8)
    write_store(tmp_path / "s", latents, torch.arange(16) % 5, 5, vae=about)
    decode = load_decoder(about, None, torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(decode(latents), model.decode(latents).sample.clamp(-1, 1))
    make_trainer(callbacks=[SampleGrid(every_n_steps=4, per_class=1, min_side=8)]).fit(
        make_module(), LatentDataModule(str(tmp_path / "s"), global_batch_size=8)
    )
    picture = grid(tmp_path / "samples" / "step-00000004.png")
    assert len(picture) == 5 * 18 + 2 and (picture[:, 18:20] == picture[0, 0]).all()  # 16x16 pictures in frames of 2


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_latents_are_the_same_picture_whatever_the_training_precision(
    make_module, make_trainer, vae, tmp_path, precision, monkeypatch
):
    """Autocast would round what the VAE computes, and with fp16 end in NaN."""
    model, folder = vae
    about = {"class": "AutoencoderTiny", "source": folder, "hash": weights_hash(model)}
    write_store(tmp_path / "s", torch.randn(16, 3, 8, 8), torch.arange(16) % 5, 5, vae=about)
    data = LatentDataModule(str(tmp_path / "s"), val_size=4, global_batch_size=8, predict_samples=3)
    np.savez(tmp_path / "real.npz", arr_0=np.zeros((6, 16, 16, 3), dtype=np.uint8))
    decoded, decode = [], Autoencoder.decode

    def spied(self, latents):
        decoded.append((latents, decode(self, latents)))
        return decoded[-1][1]

    monkeypatch.setattr(Autoencoder, "decode", spied)
    metrics = SampleMetrics(str(tmp_path / "real.npz"), every_n_steps=1, num_samples=4, num_workers=0,
                            extractor="extractor.Colours", cache=str(tmp_path / "cache"))  # fmt: skip
    trainer = make_trainer(callbacks=[SampleGrid(every_n_steps=1, per_class=1), metrics], max_steps=1,
                           precision=precision)  # fmt: skip
    module = make_module()
    trainer.fit(module, data)
    trainer.predict(module, data)
    assert len(decoded) == 4  # a grid, real images, samples to measure, a prediction
    for latents, images in decoded:
        assert latents.dtype == images.dtype == torch.float32
        assert torch.equal(images, model.to(memory_format=torch.channels_last).decode(latents).sample.clamp(-1, 1))


def test_a_wrong_or_missing_vae_stops_the_run_before_it_starts(make_module, make_trainer, vae, tmp_path):
    _, folder = vae
    about = {"class": "AutoencoderTiny", "source": str(tmp_path / "nowhere"), "hash": "0" * 64}
    write_store(tmp_path / "s", torch.randn(16, 3, 8, 8), torch.arange(16) % 5, 5, vae=about)
    datamodule = LatentDataModule(str(tmp_path / "s"), global_batch_size=8)
    with pytest.raises(
        InputError, match=r"cannot load the VAE '.*nowhere'.*Where it has moved, give its place now with"
    ):
        make_trainer(callbacks=[SampleGrid()]).fit(make_module(), datamodule)
    with pytest.raises(InputError, match="is not the one that encoded this store"):
        make_trainer(callbacks=[SampleGrid(vae=folder)]).fit(make_module(), datamodule)


def test_pixels_need_no_vae(make_module, make_trainer, pixels):
    with pytest.raises(InputError, match="latents of this store are pixels"):
        make_trainer(callbacks=[SampleGrid(vae="some/vae")]).fit(make_module(), pixels)


def test_classes_out_of_range_are_refused(make_module, make_trainer, pixels):
    with pytest.raises(InputError, match="no class 5: this model knows classes 0 to 4"):
        make_trainer(callbacks=[SampleGrid(classes=[5])]).fit(make_module(), pixels)


def test_digits_are_written_once_and_judged_by_real_ones(tmp_path):
    from ditlit.data.digits import DigitJudge, load_digits

    datamodule = DigitsDataModule(str(tmp_path))
    datamodule.prepare_data()
    written = (tmp_path / "train" / "shard-00000.safetensors").stat().st_mtime_ns
    datamodule.prepare_data()
    assert (tmp_path / "train" / "shard-00000.safetensors").stat().st_mtime_ns == written
    datamodule.setup()
    assert (len(datamodule._train), len(datamodule._val)) == (1437, 360)
    batch = datamodule._val[torch.arange(360), torch.ones(360, dtype=torch.bool)]
    images, labels = load_digits()
    assert torch.equal(batch["latents"].float(), images[:360]) and torch.equal(batch["labels"], labels[:360])
    judge = DigitJudge()
    assert judge.real_accuracy > 0.97
    assert judge.accuracy(images[:360], (labels[:360] + 1) % 10) < 0.02
