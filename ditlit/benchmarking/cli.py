"""The command line of ``ditlit benchmark``: the settings of ``fit``, and those of the benchmark."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from ditlit.benchmarking.benchmark import Benchmark, Settings
from ditlit.benchmarking.table import as_text
from ditlit.benchmarking.training import Subject
from ditlit.cli import DitlitCLI, help_texts
from ditlit.data.folders import SHOWN, check_output, write_atomically, writing

DESCRIPTION = """Measure what a configuration costs, before training it. Example: ditlit benchmark --config xl2.yaml.
    Steps are those of fit on one device, with every setting that fit takes, but for callbacks, loggers, validation and
    checkpoints. Without the store, synthetic latents take its place. Images per second, utilisation (of the datasheet,
    and of matrix products measured in the same run), memory, diffusers' DiT beside it, and what the whole run takes on
    so many GPUs are printed, and written as JSON."""
RESULTS = "benchmark.json"


class BenchmarkCLI(DitlitCLI):
    """Reads a configuration of ``fit`` and measures its steps."""

    def __init__(self, args: list[str]):
        parser = {"prog": "ditlit benchmark"} | help_texts(DESCRIPTION)
        super().__init__(args, run=False, save_config_callback=None, parser_kwargs=parser)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(Settings)

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        self.config.trainer.callbacks = None  # not even made: they may need files that are not here
        self.config.trainer.logger = False
        self.config.model.init_from = None

    def instantiate_classes(self) -> None:
        """Nothing yet: :meth:`build` does it for every measurement."""

    def instantiate_trainer(self, **kwargs: Any) -> None:
        """Nothing: a measurement makes its own."""

    def build(self) -> Subject:
        """Module, datamodule and the Trainer's settings as the configuration has them."""
        super().instantiate_classes()
        return Subject(self.model, self.datamodule, dict(self.config_init.trainer))

    def benchmark(self) -> None:
        """Measure, print the table, and write the results."""
        settings = Settings(**{field.name: self.config[field.name] for field in fields(Settings)})
        out = Path(settings.out or f"{self.config.trainer.default_root_dir}/{RESULTS}")
        check_output(out, "--out")
        report = Benchmark(self.build, settings, self.config.matmul_precision).run()
        print(f"\n{as_text(report)}\n")
        with writing(out, SHOWN):
            write_atomically(out, json.dumps(report.as_dict(), indent=1).encode())
        print(f"Written to {out}")
