"""The command line of ``ditlit benchmark``: the settings of ``fit``, and those of the benchmark."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from ditlit.benchmarking.benchmark import Benchmark
from ditlit.benchmarking.table import as_text
from ditlit.benchmarking.training import Subject
from ditlit.cli import DitlitCLI
from ditlit.data.folders import SHOWN, check_output, write_atomically, writing
from ditlit.run_help import texts
from ditlit.settings.benchmark import BenchmarkSettings

RESULTS = "benchmark.json"


class BenchmarkCLI(DitlitCLI):
    """Reads a configuration of ``fit`` and measures its steps."""

    def __init__(self, args: list[str]):
        parser = {"prog": "ditlit benchmark"} | texts("benchmark")
        super().__init__(args, run=False, save_config_callback=None, parser_kwargs=parser)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(BenchmarkSettings)

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
        settings = BenchmarkSettings(**{field.name: self.config[field.name] for field in fields(BenchmarkSettings)})
        out = Path(settings.out or f"{self.config.trainer.default_root_dir}/{RESULTS}")
        check_output(out, "--out")
        report = Benchmark(self.build, settings, self.config.matmul_precision).run()
        print(f"\n{as_text(report)}\n")
        with writing(out, SHOWN):
            write_atomically(out, json.dumps(report.as_dict(), indent=1).encode())
        print(f"Written to {out}")
