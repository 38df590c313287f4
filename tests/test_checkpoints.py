"""Checkpoints: our own read back as plain data, and the released key names."""

import pytest
import torch

from ditlit import checkpoints
from ditlit.diffusion import GaussianDiffusion
from ditlit.errors import InputError
from ditlit.models import DiT
from ditlit.training import DiTModule


@pytest.fixture
def trained(make_module, make_trainer, datamodule, tmp_path):
    module = make_module(process=GaussianDiffusion(schedule="cosine"))
    trainer = make_trainer()
    trainer.fit(module, datamodule)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    return module, tmp_path / "x.ckpt"


def parameters(module):
    return dict(module.named_parameters())


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_average_and_raw_weights_come_back(trained):
    module, path = trained
    ema, raw = checkpoints.load(path), checkpoints.load(path, "raw")
    assert_same(parameters(ema.denoiser), parameters(module.denoiser))  # the module holds the average by now
    module.ema._swap_out(module)
    assert_same(parameters(raw.denoiser), parameters(module.denoiser))
    assert ema.step == 4 and not ema.denoiser.training
    assert ema.process.config == module.process.config and ema.process.config["schedule"] == "cosine"
    assert ema.latents["scale"] == pytest.approx([0.3, 0.4, 0.5]) and ema.latents["kind"] == "moments"


def test_lightning_loads_it_too(trained):
    module, path = trained
    loaded = DiTModule.load_from_checkpoint(path)
    assert_same(parameters(loaded.denoiser), parameters(module.denoiser))
    assert torch.equal(loaded.latent_scale, module.latent_scale)
    assert loaded.process.config == module.process.config
    y = torch.tensor([0, 1])
    loaded.sampling = module.sampling
    with torch.no_grad():
        assert torch.equal(loaded.eval().sample(y, [0, 1]), module.eval().sample(y, [0, 1]))


def test_foreign_and_broken_files_are_refused(trained, tmp_path):
    _, path = trained
    with pytest.raises(InputError, match="there is no checkpoint at"):
        checkpoints.load(tmp_path / "nothing.ckpt")
    (tmp_path / "cut.ckpt").write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match="truncated or foreign"):
        checkpoints.load(tmp_path / "cut.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(InputError, match="not a ditlit training checkpoint: it lacks global_step, hyper_parameters"):
        checkpoints.load(tmp_path / "other.ckpt")


def test_no_code_in_a_checkpoint_is_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(InputError):
        checkpoints.load(tmp_path / "evil.ckpt")
    assert not (tmp_path / "owned").exists()
    with pytest.raises(InputError, match=r"names os.system, which is no class of ditlit"):
        checkpoints.build({"class_path": "os.system", "init_args": {"command": "true"}})


def test_released_names_map_one_to_one():
    model = DiT(input_size=8, num_classes=3, hidden_size=16, depth=2, num_heads=2)
    released = {
        "x_embedder.proj.weight": torch.zeros(16, 4, 2, 2),
        "x_embedder.proj.bias": torch.zeros(16),
        "pos_embed": torch.zeros(1, 16, 16),
    }
    with pytest.raises(InputError, match=r"'head.weight' is not a key of the released DiT weights"):
        checkpoints.from_released(released | {"head.weight": torch.zeros(1)})
    ours = checkpoints.from_released(released)
    assert ours["patch_embed.weight"].shape == model.patch_embed.weight.shape and "pos_embed" not in ours
