"""A whole DiTPipeline around a transformer: VAE, scheduler and index."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from ditlit.checkpoints.contents import CheckpointContents
from ditlit.checkpoints.diffusers_folders import write_json, write_transformer
from ditlit.errors import InputError

# The first visits the timesteps of DiT's "ddimN". A pipeline drops the learned variance, so DDPM takes the
# posterior's.
SCHEDULERS = {
    "ddim": {
        "_class_name": "DDIMScheduler",
        "timestep_spacing": "leading",
        "steps_offset": 0,
        "set_alpha_to_one": True,
    },
    "ddpm": {"_class_name": "DDPMScheduler", "timestep_spacing": "linspace", "variance_type": "fixed_small"},
    "dpm++": {
        "_class_name": "DPMSolverMultistepScheduler",
        "timestep_spacing": "linspace",
        "final_sigmas_type": "zero",
        "algorithm_type": "dpmsolver++",
    },
}


def write_pipeline(contents: CheckpointContents, folder: Path, vae: Any, scheduler: str) -> float:
    """Write a DiTPipeline folder with this autoencoder of diffusers.

    Returns:
        The relative error of the timestep embedder; see :mod:`ditlit.checkpoints.timesteps`.

    Raises:
        InputError: for what a DiTPipeline cannot hold.
    """
    shift, scale = set(contents.latents["shift"]), set(contents.latents["scale"])
    if shift != {0.0} or len(scale) != 1:
        raise InputError(
            "DiTPipeline scales all channels of its latents by one number and shifts none, but this model's have shift "
            f"{sorted(shift)} and scale {sorted(scale)}; write the transformer alone, without vae"
        )
    error = write_transformer(contents, folder / "transformer")
    vae.register_to_config(scaling_factor=round(scale.pop(), 7))  # a float32 of the store, as a person writes it
    vae.save_pretrained(folder / "vae")
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config(contents, scheduler))
    names = contents.latents.get("class_names")
    index = {
        "_class_name": "DiTPipeline",
        "_diffusers_version": version("diffusers"),
        "scheduler": ["diffusers", SCHEDULERS[scheduler]["_class_name"]],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", type(vae).__name__],
    }
    if names:
        index["id2label"] = {str(label): name for label, name in enumerate(names)}
    write_json(folder / "model_index.json", index)
    return error


def scheduler_config(contents: CheckpointContents, scheduler: str) -> dict[str, Any]:
    """A scheduler's configuration for the model's own noise schedule."""
    process = contents.process["init_args"]
    steps = process["num_timesteps"]
    if process["schedule"] == "linear":
        betas = {"beta_schedule": "linear", "beta_start": 0.1 / steps, "beta_end": 20 / steps}
    else:
        betas = {"beta_schedule": "squaredcos_cap_v2"}
    config = {"num_train_timesteps": steps, "prediction_type": "epsilon"} | betas
    if scheduler != "dpm++":  # which clips nothing
        config["clip_sample"] = process["clip_x0"]
    return SCHEDULERS[scheduler] | {"_diffusers_version": version("diffusers")} | config
