"""diffusers folders: what stock diffusers makes of them, and what comes back."""

import json

import pytest
import torch
from calls import convert
from weights import LATENTS, assert_same, parameters, scrambled

from ditlit import checkpoints
from ditlit.checkpoints.timesteps import MLP, refitted
from ditlit.diffusion import ClassifierFreeGuidance, GaussianDiffusion, ddim
from ditlit.errors import InputError
from ditlit.models import DiT


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A tiny AutoencoderKL of four channels that halves its pictures."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
    )
    folder = tmp_path_factory.mktemp("vae") / "vae"
    model.save_pretrained(folder)
    return str(folder)


def noise_errors(model, theirs, timesteps):
    """Relative differences of both models' outputs at each timestep."""
    generator = torch.Generator().manual_seed(0)
    n = len(timesteps)
    x = torch.randn(n, model.in_channels, *model.input_size, generator=generator)
    y = torch.arange(n) % (model.num_classes + 1)
    with torch.no_grad():
        ours = model(x, timesteps, y)
        difference = theirs(x, timestep=timesteps, class_labels=y).sample - ours
    return difference.flatten(1).norm(dim=1) / ours.flatten(1).norm(dim=1)


TIMESTEPS = torch.cat([torch.arange(0, 1000, 37), torch.tensor([1, 2, 3, 500, 997, 998, 999])])


@pytest.mark.parametrize("width, heads, learn_sigma", [(1152, 16, True), (1024, 16, False)])
def test_stock_diffusers_computes_the_same_model_where_it_is_wide_enough(
    source, tmp_path, width, heads, learn_sigma, capsys
):
    from diffusers import DiTTransformer2DModel

    model = scrambled(hidden_size=width, num_heads=heads, learn_sigma=learn_sigma, depth=1, num_classes=1000)
    for p in (*model.blocks.parameters(), *model.time_embed.parameters()):
        p.data *= 0.2  # a standard deviation of 0.02, as at the start of training
    convert(source(model), str(tmp_path / "folder"))
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path / "folder").eval()
    assert noise_errors(model, theirs, TIMESTEPS).max() < 2e-5
    assert "timestep embedding in diffusers:" in capsys.readouterr().out
    between = TIMESTEPS[:-1] + 0.5
    assert noise_errors(model, theirs, between).max() < 0.03
    # What a copy of the weights would have given.
    state = checkpoints.names.to_diffusers(dict(model.state_dict()), 2, 1)
    theirs.load_state_dict(state)
    assert noise_errors(model, theirs, TIMESTEPS).max() > 0.1 < noise_errors(model, theirs, between).max()


def test_what_diffusers_cannot_compute_exactly_is_fitted_closer_than_a_copy_and_said(source, tmp_path, capsys):
    from diffusers import DiTTransformer2DModel

    model = scrambled(hidden_size=64)
    convert(source(model), str(tmp_path / "folder"))
    printed = float(capsys.readouterr().out.split("timestep embedding in diffusers: ")[1].split()[0])
    _, error = refitted(dict(model.state_dict()), 1000)
    assert printed == pytest.approx(error, rel=0.1) and 1e-4 < error < 1
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path / "folder").eval()
    fitted = noise_errors(model, theirs, TIMESTEPS).mean()
    copies = checkpoints.names.to_diffusers(dict(model.state_dict()), 2, 2)
    theirs.load_state_dict({key: value for key, value in copies.items() if "timestep" in key}, strict=False)
    assert fitted < noise_errors(model, theirs, TIMESTEPS).mean()


def test_everything_but_the_timestep_embedding_is_diffusers_to_rounding(source, tmp_path):
    """With an embedder that ignores the time, copies are exact at any width."""
    from diffusers import DiTTransformer2DModel

    model = scrambled(hidden_size=64, num_classes=1003)
    model.time_embed.mlp[0].weight.data.zero_()
    convert(source(model, latents=LATENTS | {"class_names": None}), str(tmp_path / "folder"))
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path / "folder").eval()
    assert theirs.config.num_embeds_ada_norm == 1003
    assert noise_errors(model, theirs, TIMESTEPS).max() < 2e-6


def test_a_stock_pipeline_draws_our_samples_for_any_number_of_classes(source, vae, tmp_path):
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

    model = scrambled(hidden_size=64)
    model.time_embed.mlp[0].weight.data.zero_()  # see above
    convert(source(model), str(tmp_path / "pipeline"), vae=vae)
    pipeline = DiTPipeline.from_pretrained(tmp_path / "pipeline")
    assert isinstance(pipeline.scheduler, DDIMScheduler) and isinstance(pipeline.vae, AutoencoderKL)
    assert pipeline.vae.config.scaling_factor == 0.18215  # the store's, not that of the file
    assert pipeline.labels["owl"] == 2 and pipeline.labels["the other one"] == 1
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pictures = pipeline([2, 6], 3.0, torch.Generator().manual_seed(0), 10, output_type="np").images
        pictures = torch.from_numpy(pictures).permute(0, 3, 1, 2)
        guided, process = ClassifierFreeGuidance(model, 3.0, model.num_classes), GaussianDiffusion()
        x0 = ddim(process, guided, noise, torch.tensor([2, 6]), process.timesteps(10, "ddim"))
        expected = (pipeline.vae.decode(x0 / 0.18215).sample / 2 + 0.5).clamp(0, 1)
    assert pictures.std() > 0.01
    torch.testing.assert_close(pictures, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpm++"])
@pytest.mark.parametrize("schedule, steps", [("linear", 1000), ("linear", 500), ("cosine", 1000)])
def test_schedulers_have_the_noise_of_the_process(source, vae, tmp_path, scheduler, schedule, steps):
    from diffusers import DiTPipeline

    process = GaussianDiffusion(steps, schedule)
    convert(source(scrambled(), process), str(tmp_path / "pipeline"), vae=vae, scheduler=scheduler)
    pipeline = DiTPipeline.from_pretrained(tmp_path / "pipeline")
    torch.testing.assert_close(pipeline.scheduler.alphas_cumprod.double(), process.alphas_cumprod, rtol=1e-4, atol=1e-9)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline([0], num_inference_steps=3, output_type="np").images.shape == (1, 16, 16, 3)


def test_a_pipeline_comes_back_with_its_latents_and_class_names(source, vae, tmp_path):
    model = scrambled(num_classes=1000)
    names = [f"class {i}" for i in range(1000)]
    convert(source(model, latents=LATENTS | {"class_names": names}), str(tmp_path / "pipeline"), vae=vae)
    loaded = checkpoints.load(tmp_path / "pipeline")
    assert loaded.latents == LATENTS | {"class_names": names} and loaded.format == "diffusers pipeline"
    # Without what ditlit adds, as diffusers' own conversion leaves it.
    transformer = tmp_path / "pipeline" / "transformer"
    (transformer / "ditlit.safetensors").unlink()
    with pytest.raises(InputError, match="exported by ditlit and saved again by diffusers"):
        checkpoints.load(tmp_path / "pipeline")
    edit(transformer / "config.json", norm_num_groups=32, norm_eps=1e-5)
    weights = checkpoints.names.to_diffusers(dict(model.state_dict()), 2, 2)
    checkpoints.safetensors_files.save(weights, None, transformer / "diffusion_pytorch_model.safetensors")
    loaded = checkpoints.load(tmp_path / "pipeline")
    assert_same(parameters(loaded.denoiser), parameters(model))
    assert loaded.latents["class_names"] == names and loaded.latents["scale"] == LATENTS["scale"]
    assert loaded.latents["vae"] == {"class": "AutoencoderKL", "source": str(tmp_path / "pipeline" / "vae")}
    assert loaded.latents["image_size"] == 16


def test_a_folder_that_diffusers_saved_is_read_in_parts_and_as_bin(tmp_path):
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    theirs = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=12, out_channels=8, num_layers=2, sample_size=8, num_embeds_ada_norm=7
    )
    own = theirs.transformer_blocks[0].norm1.emb.state_dict()
    for block in theirs.transformer_blocks:
        block.norm1.emb.load_state_dict(own)
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    theirs.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    models = [checkpoints.load(tmp_path / name).denoiser for name in ("parts", "bin")]
    assert_same(parameters(models[0]), parameters(models[1]))
    assert checkpoints.load(tmp_path / "bin").format == "diffusers transformer"
    qkv = models[0].blocks[1].attn.qkv.weight
    assert torch.equal(qkv[48:96], theirs.transformer_blocks[1].attn1.to_k.weight)
    with torch.no_grad():
        theirs.transformer_blocks[1].norm1.emb.timestep_embedder.linear_2.bias += 1
    theirs.save_pretrained(tmp_path / "own")
    with pytest.raises(
        InputError, match=r"'transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias' differs from that of other"
    ):
        checkpoints.load(tmp_path / "own")


def test_an_export_that_was_changed_is_not_taken_for_the_original(source, tmp_path):
    from diffusers import DiTTransformer2DModel

    convert(source(scrambled()), str(tmp_path / "folder"))
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path / "folder")
    with torch.no_grad():
        for block in theirs.transformer_blocks:
            block.norm1.emb.timestep_embedder.linear_1.weight += 1
    theirs.save_pretrained(tmp_path / "folder")
    with pytest.raises(InputError, match=r"changed after ditlit exported it"):
        checkpoints.load(tmp_path / "folder")
    theirs.save_pretrained(tmp_path / "again")
    with pytest.raises(InputError, match=r"ditlit.safetensors, is gone; convert the first export instead"):
        checkpoints.load(tmp_path / "again")


def test_the_fit_is_of_the_function_and_reports_its_own_error():
    model = DiT("DiT-L/2", input_size=8, depth=1)
    fitted, error = refitted(dict(model.state_dict()), 1000)
    assert error < 1e-5
    assert [tuple(fitted[name].shape) for name in MLP] == [(1024, 256), (1024,), (1024, 1024), (1024,)]
    assert fitted[MLP[2]].abs().max() < 2 * model.time_embed.mlp[2].weight.abs().max()  # 16 bits can hold it


def test_a_pipeline_that_could_not_draw_is_refused(source, vae, tmp_path):
    model = scrambled()
    for latents, message in (
        (LATENTS | {"scale": [0.1, 0.2, 0.3, 0.4]}, "scales all channels of its latents by one number"),
        (LATENTS | {"shift": [0.5] * 4}, "and shifts none"),
        (LATENTS | {"vae": None}, "this model draws pixels"),
        (LATENTS | {"vae": {"source": "sd", "hash": "0" * 64}}, "is not the one that the model was trained with"),
    ):
        with pytest.raises(InputError, match=message):
            convert(source(model, latents=latents), str(tmp_path / "out"), vae=vae)
    with pytest.raises(InputError, match="cannot load the VAE"):
        convert(source(model), str(tmp_path / "out"), vae=str(tmp_path))
    with pytest.raises(InputError, match=r"only a diffusers pipeline holds a VAE"):
        convert(source(model), str(tmp_path / "x.pt"), vae=vae)
    assert not (tmp_path / "out").exists()


def test_foreign_folders_are_refused(source, vae, tmp_path):
    convert(source(scrambled()), str(tmp_path / "pipeline"), vae=vae)
    with pytest.raises(InputError, match=r"vae holds a AutoencoderKL, not a DiTTransformer2DModel"):
        checkpoints.load(tmp_path / "pipeline" / "vae")
    edit(tmp_path / "pipeline" / "model_index.json", _class_name="FluxPipeline")
    with pytest.raises(InputError, match=r"is a FluxPipeline, not a DiTPipeline"):
        checkpoints.load(tmp_path / "pipeline")
    edit(tmp_path / "pipeline" / "model_index.json", _class_name="DiTPipeline")
    (tmp_path / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no diffusion_pytorch_model.safetensors"):
        checkpoints.load(tmp_path / "pipeline")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
