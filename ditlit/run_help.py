"""Help of the commands whose settings are arguments of torch's and Lightning's classes, without loading these.

What the parsers have found out of the signatures is kept in a file beside this one. It is used while the code that
declares the settings is what it was made from, and Lightning is of the same release; else the parsers are asked. After
a change, ``python tests/keep_help.py`` makes it anew.
"""

import hashlib
import json
import textwrap
from importlib.metadata import version
from pathlib import Path

from ditlit.parser import Setting, page
from ditlit.settings.configs import shipped_configs

DESCRIPTIONS = {
    "fit": """Train a DiT. Example: ditlit fit --config xl2.yaml --data.store /data/imagenet-latents
        --trainer.default_root_dir runs/xl2. Checkpoints, curves and sample grids go to the run's folder. Continue a
        stopped run with --ckpt_path last.""",
    "validate": """Compute the loss on held-out latents with the averaged weights. Example: ditlit validate --config
        runs/xl2/config.yaml --ckpt_path runs/xl2/checkpoints/last.ckpt""",
    "test": """Compute the loss on the test latents with the averaged weights; arguments as for validate.""",
    "predict": """Draw samples with the averaged weights, every class in turn, as PNG files in predictions/ in the
        run's folder. Example: ditlit predict --config runs/xl2/config.yaml --ckpt_path runs/xl2/checkpoints/last.ckpt
        --data.predict_samples 1000""",
    "benchmark": """Measure what a configuration costs, before training it. Example: ditlit benchmark --config xl2.yaml.
    Steps are those of fit on one device, with every setting that fit takes, but for callbacks, loggers, validation and
    checkpoints. Without the store, synthetic latents take its place. Images per second, utilisation (of the datasheet,
    and of matrix products measured in the same run), memory, diffusers' DiT beside it, and what the whole run takes on
    so many GPUs are printed, and written as JSON.""",
}
MORE = """
--config FILE is needed, one of yours or a shipped one; several are read in turn, and settings on the command
line change what they say. Shipped:
{shipped}.

  --help WORD                  settings with this word in their name: --help trainer, --help guidance
  --help all                   all settings
  --trainer.callbacks.help CLASS, --model.denoiser.help CLASS, ...
                               settings of a class, such as ditlit.callbacks.SampleGrid
  --print_config               the configuration as it would be run
"""
KEPT = Path(__file__).with_name("run_help.json")
DECLARED_IN = (
    "cli.py", "data/datamodule.py", "diffusion/gaussian.py", "models/dit.py", "parser.py", "settings/benchmark.py",
    "settings/sampling.py", "training/ema.py", "training/module.py",
)  # fmt: skip


def texts(command: str) -> dict[str, str]:
    """What a command's help says before and after the settings: arguments of its parser."""
    description = " ".join(DESCRIPTIONS[command].split())
    return {"description": description, "epilog": MORE.format(shipped=textwrap.fill(shipped_configs("*.yaml"), 110))}


def kept_help(command: str) -> str | None:
    """What ``ditlit COMMAND --help`` shows; None where what is kept is out of date."""
    kept = json.loads(KEPT.read_text())
    if kept["made from"] != made_from():
        return None
    return page(settings=[Setting(*kept["settings"][i]) for i in kept["commands"][command]], **texts(command))


def made_from() -> str:
    """A checksum of the code that declares the settings, and the release of Lightning."""
    code = b"".join((Path(__file__).parent / name).read_bytes() for name in DECLARED_IN)
    return f"{hashlib.sha256(code).hexdigest()} lightning {'.'.join(version('lightning').split('.')[:2])}"
