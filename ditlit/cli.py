"""The command line: Lightning's CLI on our module and datamodules, with the rules of a run's folder."""

import os
import re
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jsonargparse import Namespace
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from ditlit.callbacks import SampleGrid
from ditlit.callbacks.curves import RunLogger
from ditlit.callbacks.loggers import log_text
from ditlit.callbacks.overview import ModelLine
from ditlit.data import LatentDataModule
from ditlit.data.folders import check_writable, is_remote, open_folder
from ditlit.data.workers import own_words
from ditlit.errors import InputError
from ditlit.models import DiT
from ditlit.parallel.ddp import prepare_ddp
from ditlit.parallel.processes import decided_by_rank_0, launched
from ditlit.parser import Parser, Setting, parsed
from ditlit.resilience import CheckpointFiles, Heartbeat, Interrupted, StopOnSignal
from ditlit.resilience.checkpoint_files import newest_complete, set_aside
from ditlit.resilience.memory import out_of_memory, ran_out
from ditlit.resilience.nonfinite import Diverged
from ditlit.resilience.run_folder import CONFIG, checkpoint_folders, find_checkpoint, run_folder, trace_of_a_run
from ditlit.resilience.saving import with_checkpoints
from ditlit.run_help import texts
from ditlit.settings.configs import CONFIG_OPTIONS, shipped_configs, with_found_configs
from ditlit.training import DiTModule

# Settings of Lightning's Trainer that ``--help`` shows; ``--help trainer`` shows them all.
TRAINER = (
    "default_root_dir", "max_steps", "max_epochs", "max_time", "accelerator", "devices", "num_nodes", "strategy",
    "precision", "accumulate_grad_batches", "gradient_clip_val", "val_check_interval", "check_val_every_n_epoch",
    "log_every_n_steps", "callbacks", "logger", "enable_progress_bar",
)  # fmt: skip
LIGHTNING = ("seed_everything", "ckpt_path")
LEFT_OUT = ("data", "print_config", "weights_only")


def mistake_in(error: ValueError) -> InputError:
    """What a class says of its arguments, without what jsonargparse says around it of the setting's other types."""
    text = str(error)
    if text.startswith("Does not validate"):
        said = re.search(r"^ *- (?!Expected a |Does not validate|Not a valid subclass)(.+)$", text, re.MULTILINE)
        text = said[1] if said else text
    return InputError(text)


def words_and_place(error: Exception) -> str:
    """An error's type and words, and where it was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"


def format_warning(message: Warning | str, category: type, filename: str, lineno: int, line: str | None = None) -> str:
    """Warnings of this package as one line, those of others as ever."""
    if Path(__file__).parent in Path(filename).parents:
        return f"ditlit: warning: {message}\n"
    return others_format(message, category, filename, lineno, line)


others_format = warnings.formatwarning


class RunParser(Parser, LightningArgumentParser):
    """The parser of a command that takes model, data and trainer."""

    classes: ClassVar = {"model.denoiser": DiT, "data": LatentDataModule}

    def brief(self) -> list[Setting]:
        """All of ours, then of Lightning's those in common use, in a sentence each."""
        settings = super().brief()
        found = {setting.name: setting for setting in settings}
        ours = [s for first in ("model.", "data.") for s in settings if s.name.startswith(first)]
        theirs = [found[f"trainer.{name}"]._replace(group="Trainer") for name in TRAINER]
        run = [s._replace(group="Run") for s in settings if "." not in s.name and s.name not in LEFT_OUT]
        return ours + [in_a_sentence(s) for s in theirs] + [in_a_sentence(s) if s.name in LIGHTNING else s for s in run]


def in_a_sentence(setting: Setting) -> Setting:
    return setting._replace(text=re.split(r"\.(?=\s|[A-Z]|$)", setting.text)[0] + ".")


class SaveFitConfig(SaveConfigCallback):
    """Keeps the configuration of ``fit`` as config.yaml in the run's folder, in a form that every command takes.

    Other commands on the run leave it as it is, and what belongs to one command only is not in it.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **kwargs):
        config = config.clone()
        for name in ("ckpt_path", "weights_only"):
            config.pop(name, None)
        super().__init__(parser, config, **kwargs)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet: a run that is refused leaves the configuration of the one before."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            open_folder(trainer.default_root_dir).write(CONFIG, self.text().encode())
            self.save_config(trainer, pl_module, "fit")

    def text(self) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # jsonargparse has another name for skip_none from 4.49 on
            return self.parser.dump(self.config, skip_none=False)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Show it in the loggers that take texts."""
        log_text(trainer.loggers, "config", f"```yaml\n{self.text()}\n```")


class DitlitCLI(LightningCLI):
    """Lightning's command line for :class:`DiTModule` and any :class:`LatentDataModule`.

    Args:
        args: words of the command line; by default those of this process.
        changes: to the settings of LightningCLI, for a command line that is built on this one.
    """

    def __init__(self, args: list[str] | None = None, **changes: Any):
        warnings.formatwarning = format_warning
        settings = dict(
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_callback=SaveFitConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                "callbacks": [StopOnSignal(), Heartbeat(), ModelLine()],
                "enable_model_summary": False,  # ModelLine instead
            },
            parser_class=RunParser,
            parser_kwargs={"prog": "ditlit"} | {name: texts(name) for name in ("fit", "validate", "test", "predict")},
        )
        try:
            super().__init__(DiTModule, LatentDataModule, args=args, **(settings | changes))
        except MisconfigurationException as error:
            raise InputError(str(error)) from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--matmul_precision",
            type=Literal["highest", "high", "medium"],
            default="highest",
            help="of float32 matrix products on GPUs: highest is float32, high is TF32, medium bf16. Products "
            "in 16 bits (trainer.precision bf16-mixed) are not concerned. The VAE follows, highest being float32.",
        )
        parser.add_argument(
            "--save_in_background",
            type=bool,
            default=True,
            help="Write checkpoints while training goes on, for which the CPU's memory must hold one; false where it "
            "does not.",
        )
        parser.add_argument(
            "--save_every",
            type=int | None,
            default=None,
            help="Write last.ckpt, from which a run continues, every so many optimizer steps, and not only where "
            "training ends.",
        )
        parser.add_argument(
            "--keep_every",
            type=int | None,
            default=None,
            help="Keep a checkpoint every so many optimizer steps, as step=00050000.ckpt.",
        )
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str] | None) -> None:
        words = with_found_configs(sys.argv[1:] if args is None else args)
        commands = getattr(self, "_subcommand_parsers", {})
        command = next((word for word in words if word in commands), None)
        if commands and command is None and words:
            raise InputError(f"a command comes first: ditlit {' | '.join(commands)}, then its settings")
        try:
            self.config = parsed(parser, words, commands.get(command, parser))
        except InputError as error:
            if "required" not in str(error) or any(word.split("=")[0] in CONFIG_OPTIONS for word in words):
                raise
            raise InputError(
                f"{error}. A configuration says what to train on what: give one with --config, your own or a shipped "
                f"one ({shipped_configs('*.yaml')})"
            ) from error

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration as the user wrote it: Lightning would let the checkpoint override it."""

    def before_instantiate_classes(self) -> None:
        """Keep everything of a run in one folder, so that ``--ckpt_path last`` finds it again."""
        torch.set_float32_matmul_precision(self._get(self.config, "matmul_precision"))
        trainer = self._get(self.config, "trainer")
        if trainer.default_root_dir is None:
            trainer.default_root_dir = "runs/default"
        # RunLogger below default_root_dir itself, not in a new lightning_logs/version_n each time.
        self._default_logger = trainer.logger is None or trainer.logger is True

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (InputError, MisconfigurationException):
            raise
        except ValueError as error:
            raise mistake_in(error) from error
        except Exception as error:  # of whatever class the user has named
            raise InputError(f"a class of the settings cannot be made: {words_and_place(error)}") from error

    def instantiate_trainer(self, **kwargs):
        settings = self._get(self.config_init, "trainer")
        if self._default_logger:
            kwargs["logger"] = RunLogger(settings.default_root_dir, name="", version="")
        kwargs |= launched(settings)
        if settings.enable_checkpointing is not False:
            periods = (self._get(self.config_init, name) for name in ("save_every", "keep_every"))
            kwargs["callbacks"] = with_checkpoints(settings.callbacks, *periods)
        if settings.enable_progress_bar is False:  # Lightning would refuse the one of the configuration
            callbacks = kwargs.get("callbacks", settings.callbacks) or []
            callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
            kwargs["callbacks"] = [each for each in callbacks if not isinstance(each, ProgressBar)]
        trainer = super().instantiate_trainer(**kwargs)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:  # not in a logger's folder
                callback.dirpath = os.path.join(trainer.default_root_dir, "checkpoints")
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # no other one in trainer.plugins
            trainer.strategy.checkpoint_io = CheckpointFiles(self._get(self.config_init, "save_in_background"))
        prepare_ddp(trainer, self.model)
        return trainer

    def before_fit(self) -> None:
        """Refuse to write over an old run, or where nothing can be written; a requeued SLURM job continues."""
        if self.trainer.overfit_batches:
            raise InputError(
                "trainer.overfit_batches would replace the order of the samples, by which a run is continued; train on "
                "a small store instead"
            )
        if not self.trainer.fast_dev_run and not self._is_remote():
            check_writable(Path(self.trainer.default_root_dir), "--trainer.default_root_dir")
        self.model.configure_optimizers()  # once for nothing: a mistake is found before anything is written
        if self._get(self.config_init, "ckpt_path") is not None or self.trainer.fast_dev_run:
            return
        if int(os.environ.get("SLURM_RESTART_COUNT", 0)):
            self.config_init[self.subcommand]["ckpt_path"] = "last"
            return
        trace = trace_of_a_run(run_folder(self.trainer), checkpoint_folders(self.trainer))
        if trace is not None:
            anew = "" if trace.suffix == ".ckpt" else "; it has no checkpoint, so that --ckpt_path last starts it anew"
            raise InputError(
                f"{self.trainer.default_root_dir} holds a run already. Continue it with --ckpt_path last, choose "
                f"another folder with --trainer.default_root_dir, or delete it (there is {trace}{anew})"
            )

    def before_predict(self) -> None:
        """Have the samples written, also where the configuration shows none while it trains."""
        if not any(isinstance(callback, (SampleGrid, BasePredictionWriter)) for callback in self.trainer.callbacks):
            self.trainer.callbacks.append(SampleGrid())

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except Interrupted as stop:
            if not self.trainer.is_global_zero:
                sys.exit(0)  # a launcher would take anything else for a crash, and kill rank 0
            print(f"ditlit: {stop}", file=sys.stderr)
            sys.exit(128 + stop.signum)  # as a shell reports a command that a signal has ended
        except Diverged as error:
            if self.trainer.is_global_zero:
                print(f"\nditlit: error: {error}", file=sys.stderr)
            sys.exit(1)
        except InputError as error:
            raise InputError(own_words(error)) from error
        except RuntimeError as error:
            if subcommand != "fit" or not ran_out(error):
                raise
            raise InputError(out_of_memory(self.trainer, self.model, error)) from error

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """The arguments of a command, with the checkpoint that is meant: ``last`` is the newest that is whole."""
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        given = kwargs.get("ckpt_path")
        if given is None or is_remote(given) or (given in ("last", "best") and self._is_remote()):
            return kwargs
        kwargs["ckpt_path"] = decided_by_rank_0(self.trainer, lambda: self._checkpoint(given, subcommand))
        return kwargs

    def _checkpoint(self, given: str, subcommand: str) -> str | None:
        folders = checkpoint_folders(self.trainer)
        if given != "last":
            return find_checkpoint(given, subcommand, folders)
        found = newest_complete(folders)
        if found is not None:
            path, step, damaged = found
            for other in damaged:
                rank_zero_info(f"{other} is damaged and passed over.")
            if subcommand == "fit" and self.trainer.is_global_zero:
                set_aside(damaged)
            rank_zero_info(f"Continuing from {path}, step {step}, the newest whole checkpoint.")
            return str(path)
        if subcommand == "fit":
            rank_zero_info(f"There is no checkpoint in {folders[0]} yet: training starts.")
            return None
        raise InputError(f"there is no checkpoint in {folders[0]}; give one with --ckpt_path")

    def _is_remote(self) -> bool:
        """Whether the run's folder is at a URL; what is there is left to Lightning."""
        return is_remote(self.trainer.default_root_dir)
