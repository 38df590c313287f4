"""The command line: every shipped configuration and every command of the README."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from ditlit import run_help
from ditlit.__main__ import command_parser, joined, let_idle_threads_sleep, main
from ditlit.benchmarking.cli import BenchmarkCLI
from ditlit.cli import DitlitCLI
from ditlit.commands import COMMANDS
from ditlit.diffusion import GaussianDiffusion, RectifiedFlow
from ditlit.errors import InputError
from ditlit.mistakes import unknown_setting
from ditlit.settings.configs import find_config, with_found_configs

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
READMES = [path for path in sorted(ROOT.rglob("README.md")) if not any(part.startswith(".") for part in path.parts)]


@pytest.fixture
def cli(monkeypatch, tmp_path):
    """Parses and builds, on the meta device, without running."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DitlitCLI, "_run_subcommand", lambda self, subcommand: None)
    monkeypatch.setattr(sys, "argv", ["ditlit"])

    def run(*args):
        with torch.device("meta"):
            return DitlitCLI(list(args))

    return run


def ditlit(*args, cwd):
    return subprocess.run([sys.executable, "-m", "ditlit", *args], capture_output=True, text=True, cwd=cwd)


def shipped_name(config):
    return str(config.relative_to(ROOT / "configs"))


@pytest.mark.parametrize("config", CONFIGS, ids=shipped_name)
def test_every_configuration_builds(cli, config):
    """Those that change another one say in their command which it is."""
    header = config.read_text().split("\n\n")[0]
    name = shipped_name(config)
    base = re.search(rf"--config (\S+) --config {re.escape(name)}", header)
    words = ("Command", "Expect") if name.startswith("scaling/") else ("Reproduces", "Command", "Hardware", "Expect")
    assert all(word in header for word in words)
    given = [word for file in ([base[1]] if base else []) + [name] for word in ("--config", file)]
    built = cli("fit", *given, "--trainer.accelerator", "cpu", "--trainer.precision", "32-true")
    if base:
        changed = yaml.safe_load(config.read_text())["trainer"]["default_root_dir"]
        assert built.trainer.default_root_dir.endswith(changed)
    if name.removeprefix("sit-") in ("s2.yaml", "b2.yaml", "l2.yaml", "xl2.yaml"):
        flow = name.startswith("sit-")
        assert built.model.denoiser.config["variant"] == f"DiT-{config.stem.removeprefix('sit-')[:-1].upper()}/2"
        assert type(built.model.process) is (RectifiedFlow if flow else GaussianDiffusion)
        assert built.model.denoiser.config["learn_sigma"] is not flow
        optimizer = built.model.optimizer([torch.nn.Parameter(torch.zeros(1))])
        group = optimizer.param_groups[0]
        assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-4, (0.9, 0.999), 0.0)
        assert built.model.ema.decay == 0.9999 and not built.model.ema.warmup
        assert built.model.class_dropout_prob == 0.1 and built.trainer.gradient_clip_val is None
        assert built.datamodule.global_batch_size == 256 and built.datamodule.flip
        assert yaml.safe_load(config.read_text())["trainer"]["precision"] == "bf16-mixed"


@pytest.mark.parametrize(
    "name, changed",
    [
        ("conditioning_in_context", dict(conditioning="in_context")),
        ("conditioning_cross_attention", dict(conditioning="cross_attention")),
        ("conditioning_adaln", dict(conditioning="adaln")),
        ("positions_learned", dict(positions="learned")),
        ("patch_4", dict(variant="DiT-XL/4", patch_size=4)),
        ("patch_8", dict(variant="DiT-XL/8", patch_size=8)),
        ("epsilon_only", dict(learn_sigma=False)),
    ],
)
def test_an_ablation_changes_one_thing_of_the_paper_s_recipe(cli, name, changed):
    assert len(list((ROOT / "configs" / "ablations").iterdir())) == 7
    paper, ablation = (
        cli("fit", "--config", "xl2.yaml", *more, "--trainer.accelerator", "cpu", "--trainer.precision", "32-true")
        for more in ((), ("--config", f"ablations/{name}.yaml"))
    )
    assert ablation.model.denoiser.config == paper.model.denoiser.config | changed
    assert ablation.model.process.config == paper.model.process.config
    settings = [built.config.fit.as_dict() for built in (paper, ablation)]
    for setting in settings:
        setting["model"].pop("denoiser"), setting["trainer"].pop("default_root_dir"), setting.pop("config")
    assert settings[0] == settings[1]


def test_seed_reaches_module_and_data(cli):
    built = cli("fit", "--config", "digits.yaml", "--seed_everything", "7")
    assert built.model.seed == built.datamodule.seed == 7


def test_settings_can_be_changed_one_by_one(cli):
    built = cli(
        "fit", "--config", "s2.yaml", "--model.denoiser.num_classes", "10", "--model.ema.decay", "0.99",
        "--model.sampling.guidance_interval", "[100,800]", "--data.global_batch_size", "64",
        "--model.denoiser.input_size", "[16,32]", "--trainer.accelerator", "cpu",
    )  # fmt: skip
    assert built.model.denoiser.num_classes == 10 and built.model.denoiser.input_size == (16, 32)
    assert built.model.ema.decay == 0.99 and built.datamodule.global_batch_size == 64
    assert tuple(built.model.sampling.guidance_interval) == (100, 800)
    built = cli("fit", "--config", "s2.yaml", "--model.sampling.guidance_interval", "100,900")
    assert built.model.sampling.guidance_interval == (100, 900)


def test_everything_of_a_run_goes_to_its_folder(cli):
    built = cli("fit", "--config", "digits.yaml", "--trainer.default_root_dir", "runs/mine")
    assert Path(built.trainer.log_dir) == Path("runs/mine")


def test_configurations_are_found_as_given_or_shipped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("xl2.yaml") == str(ROOT / "configs" / "xl2.yaml")
    Path("xl2.yaml").write_text("trainer: {}")
    assert find_config("xl2.yaml") == "xl2.yaml"
    assert with_found_configs(["fit", "-c", "s2.yaml", "--config=b2.yaml"])[2:] == [
        str(ROOT / "configs" / "s2.yaml"), f"--config={ROOT / 'configs' / 'b2.yaml'}",
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"no configuration 'xl3.yaml'.* xl2.yaml"):
        find_config("xl3.yaml")


def test_the_checkpoint_does_not_override_the_configuration(cli, make_module, make_trainer, datamodule, tmp_path):
    trainer = make_trainer(max_steps=1)
    trainer.fit(make_module(), datamodule)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    path = str(tmp_path / "x.ckpt")
    built = cli("fit", "--config", "digits.yaml", "--ckpt_path", path, "--model.class_dropout_prob", "0.3")
    assert built.model.class_dropout_prob == 0.3 and built.model.denoiser.num_classes == 10


def help_of(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["ditlit", *words])
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capsys.readouterr()
    assert not end.value.code and not err
    return out


def test_help_is_what_one_can_read(monkeypatch, capsys):
    """Ours with their explanations, then the Trainer's in common use, without the classes of other libraries."""
    text = help_of(monkeypatch, capsys, "fit", "--help")
    assert len(text.splitlines()) < 180 and max(map(len, text.splitlines())) <= 120
    for name in (
        "model.class_dropout_prob", "model.sampling.num_steps", "model.denoiser.num_heads", "model.ema.decay",
        "data.store", "trainer.max_steps", "trainer.default_root_dir", "matmul_precision", "ckpt_path", "config",
    ):  # fmt: skip
        assert f"\n  --{name}" in text
    assert "probability of replacing a label by the null class, for classifier-free guidance." in text
    plain = " ".join(text.split())
    assert "(float, default: 0.1)" in plain and "(linear | cosine, default: linear)" in plain
    assert text.index("\n  --model.class_") < text.index("\n  --data.store") < text.index("\n  --trainer.max_steps")
    for absent in ("barebones", "subclasses", "torch.nn.", "BatchSizeFinder", "usage:", "SUPPRESS", "model.seed"):
        assert absent not in text
    assert "--help all" in text and "digits.yaml" in text


@pytest.mark.parametrize("command", run_help.DESCRIPTIONS)
def test_help_that_is_kept_is_what_the_parsers_say(monkeypatch, capsys, command):
    """Without torch where the code is what it was made from; from the parsers themselves where it is not."""
    without = "import sys; sys.modules['torch'] = None; from ditlit.__main__ import main; main()"
    run = subprocess.run([sys.executable, "-c", without, command, "--help"], capture_output=True, text=True,
                         env=os.environ | {"COLUMNS": "120"})  # fmt: skip
    monkeypatch.setattr(run_help, "made_from", lambda: "other code")
    expected = help_of(monkeypatch, capsys, command, "--help")
    assert run.returncode == 0, f"{run.stderr}\nIf settings have changed: python tests/keep_help.py"
    assert run.stdout == expected, "settings have changed: python tests/keep_help.py"


def test_files_are_read_before_torch_is(tmp_path):
    (tmp_path / "list.yaml").write_text("- 1")
    for config, said in (("nowhere.yaml", "there is no configuration 'nowhere.yaml'"), ("list.yaml", "no settings")):
        without = f"import sys; sys.modules['torch'] = None; sys.argv[1:] = ['fit', '--config', {config!r}]"
        script = f"{without}; from ditlit.__main__ import main; main()"
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
        assert run.returncode == 2 and said in run.stderr


def test_help_finds_settings_by_a_word_and_shows_all(monkeypatch, capsys):
    text = help_of(monkeypatch, capsys, "fit", "--config", "digits.yaml", "--help", "guidance")
    assert re.findall(r"^  --(\S+)", text, re.M) == [
        f"model.sampling.guidance_{part}" for part in ("scale", "channels", "interval")
    ]  # fmt: skip
    assert "trainer.barebones" in help_of(monkeypatch, capsys, "fit", "--help", "trainer")
    text = help_of(monkeypatch, capsys, "fit", "--help", "all")
    assert "trainer.barebones" in text and "model.class_dropout_prob" in text and len(text.splitlines()) < 400
    assert "no setting has 'xyzzy' in its name" in said_by(monkeypatch, capsys, "fit", "--help", "xyzzy")


def test_help_shows_the_settings_of_a_class(monkeypatch, capsys):
    text = help_of(monkeypatch, capsys, "fit", "--trainer.callbacks.help", "ditlit.callbacks.SampleGrid")
    assert "every_n_steps" in text and "draw every so many optimizer steps" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_commands(monkeypatch, capsys, command):
    text = help_of(monkeypatch, capsys, *command.split(), "--help")
    description = " ".join(command_parser(command).description.split())
    assert " ".join(text.split()).startswith(description) and "usage:" not in text
    settings = [action for action in command_parser(command)._actions if action.help and action.dest != "help"]
    assert all(f"--{action.dest}" in text for action in settings if "print" not in action.dest)


def test_print_config(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    printed = yaml.safe_load(help_of(monkeypatch, capsys, "fit", "--config", "xl2.yaml", "--print_config"))
    assert printed["model"]["denoiser"]["init_args"]["variant"] == "DiT-XL/2"
    assert not list(tmp_path.iterdir())


def test_mistakes_are_one_line_and_leave_nothing(tmp_path):
    result = ditlit("fit", "--config", "s2.yaml", "--data.store", "nowhere", cwd=tmp_path)
    assert result.returncode == 2
    assert "ditlit: error: there is no latent store at nowhere" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "words, said",
    [
        (["--data.global_batch_size", "0"], "^global_batch_size must be positive, got 0$"),
        (["--model.sampling.num_steps", "2000"], "^num_steps must lie between 1 and 1000, got 2000$"),
        (["--model.sampling.guidance_channels", "7"], "^cannot guide 7 channels of latents that have 1$"),
        # Within a setting that has several types, or that Lightning checks
        (["--model.ema.decay", "1.5"], r"^the decay of the EMA lies in \[0, 1\), got 1.5$"),
        (
            ["--trainer.callbacks+=ditlit.callbacks.SampleGrid", "--trainer.callbacks.per_class", "0"],
            "^per_class must be positive, got 0$",
        ),
        (["--model.denoiser.num_heads", "0"], "^num_heads must be positive, got 0$"),
        (["--trainer.max_steps", "-5"], "max_steps.* must be a non-negative integer"),
        (["--trainer.strategy", "nope"], "^You selected an invalid strategy name"),
    ],
)
def test_settings_out_of_range_are_refused_before_anything_runs(cli, words, said):
    with pytest.raises(InputError, match=said):
        cli("fit", "--config", "digits.yaml", *words)


def last_words(monkeypatch, capsys, *words):
    """The line with which a command ends that is refused after Lightning has said something."""
    monkeypatch.setattr(sys, "argv", ["ditlit", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert text.startswith("ditlit: error: ")
    return text


def said_by(monkeypatch, capsys, *words):
    """What a command that is refused says: one line, on standard error alone."""
    monkeypatch.setattr(sys, "argv", ["ditlit", *words])
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == ""
    assert err.startswith("\nditlit: error: ") and err.count("\n") == 2, err
    return err.removeprefix("\nditlit: error: ").rstrip("\n")


@pytest.mark.parametrize(
    "words, said",
    [
        ("fit --model.smapling.num_steps 5", "--model.smapling.num_steps; did you mean --model.sampling.num_steps?"),
        ("fit --model.sampling.num_step 5", "--model.sampling.num_step; did you mean --model.sampling.num_steps?"),
        ("fit --num_steps=5", "--num_steps; did you mean --model.sampling.num_steps?"),
        ("fit --trainer.max_step 5", "--trainer.max_step; did you mean --trainer.max_steps?"),
        ("fit --model.denoiser.num_head 5", "--model.denoiser.num_head; did you mean --model.denoiser.num_heads?"),
        ("fit --data.glob_batch_size 5", "--data.glob_batch_size; did you mean --data.global_batch_size?"),
        ("fit --model.optimizer.lrr 1", "--model.optimizer.lrr; did you mean --model.optimizer.lr?"),
        (
            "fit --trainer.callbacks+=SampleGrid --trainer.callbacks.per_clas 1",
            "--trainer.callbacks.per_clas; did you mean --trainer.callbacks.per_class?",
        ),
        ("fit --xyzzy 5", "--xyzzy"),
        ("benchmark --repeat 5", "--repeat; did you mean --repeats?"),
        ("sample --ckpt a --out b --num_stes 5", "--num_stes; did you mean --num_steps?"),
        ("sample --ckpt a --out b --guidance 5", "--guidance; did you mean --guidance_scale?"),
        ("encode --image a --out b", "--image; did you mean --images?"),
        ("evaluate --refrence a", "--refrence; did you mean --reference?"),
        ("evaluate sweep --ckpts a", "--ckpts; did you mean --ckpt?"),
        ("convert --source a --outt b", "--outt; did you mean --out?"),
    ],
)
def test_a_setting_that_does_not_exist_is_named_with_the_nearest(monkeypatch, capsys, words, said):
    words = words.split()
    if words[0] in ("fit", "benchmark"):
        words[1:1] = ["--config", "digits.yaml"]
    assert said_by(monkeypatch, capsys, *words) == f"there is no setting {said}"


@pytest.mark.parametrize(
    "words, said",
    [
        ("--model.optimizer AdmW", "AdmW; did you mean AdamW?"),
        ("--model.optimizer torch.optim.Adamm", "torch.optim.Adamm; did you mean torch.optim.Adam?"),
        ("--trainer.callbacks+=SampleGird", "SampleGird; did you mean SampleGrid?"),
        ("--trainer.callbacks+=ditlit.trainin.SampleGrid", "ditlit.trainin.SampleGrid; did you mean SampleGrid?"),
        (
            "--data.class_path ditlit.data.DigitsModule",
            "ditlit.data.DigitsModule; did you mean ditlit.data.Digits",
        ),
    ],
)
def test_a_class_that_does_not_exist_is_named_with_the_nearest(monkeypatch, capsys, words, said):
    words = ["fit", "--config", "digits.yaml", *words.split()]
    assert said_by(monkeypatch, capsys, *words).startswith(f"there is no class {said}")


@pytest.mark.parametrize(
    "command, text, said",
    [
        (
            "fit",
            "model: {smapling: {num_steps: 5}}",
            "model.smapling.num_steps in x.yaml; did you mean model.",
        ),
        ("fit", "trainr: {max_steps: 5}", "trainr.max_steps in x.yaml; did you mean trainer.max_steps?"),
        (
            "fit",
            "data: {class_path: ditlit.data.LatentDataModule, init_args: {store: a, val_sise: 5}}",
            "data.init_args.val_sise in x.yaml; did you mean data.init_args.val_size?",
        ),
        (
            "fit",
            "trainer: {callbacks: [{class_path: ditlit.callbacks.SampleGrid, init_args: {every_steps: 5}}]}",
            "trainer.callbacks.init_args.every_steps in x.yaml; did you mean trainer.callbacks.init_args.every_n_",
        ),
        ("sample", "num_stes: 5", "num_stes in x.yaml; did you mean num_steps?"),
    ],
)
def test_a_setting_that_does_not_exist_is_named_with_its_file(monkeypatch, capsys, command, text, said):
    Path("x.yaml").write_text(text)
    words = ["--config", "digits.yaml"] if command == "fit" else ["--ckpt", "a", "--out", "b"]
    assert said_by(monkeypatch, capsys, command, *words, "--config", "x.yaml").startswith(f"there is no setting {said}")


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "x.yaml holds no settings"),
        (b"3", "x.yaml holds no settings, but 3"),
        (b"a: [", "x.yaml is no YAML: while parsing a flow node"),
        (b"\x81\x00", "x.yaml is no YAML: unacceptable character"),
    ],
)
def test_a_file_without_settings_is_named(monkeypatch, capsys, content, said):
    Path("x.yaml").write_bytes(content)
    assert said_by(monkeypatch, capsys, "fit", "--config", "x.yaml").startswith(said)


def test_settings_without_a_command_are_answered_with_the_commands(monkeypatch, capsys):
    said = said_by(monkeypatch, capsys, "--config", "digits.yaml")
    assert said.startswith("a command comes first: ditlit fit | validate | test | predict")


@pytest.mark.parametrize(
    "words, said",
    [
        ("sample --ckpt a --out b --num_steps x", "--num_steps takes int, got 'x'"),
        ("sample --ckpt a --out b --weights avg", "--weights takes ema or raw, got 'avg'"),
        ("sample --ckpt a --out b --guidance_channels x", "--guidance_channels takes int, got 'x'"),
        ("fit --trainer.max_steps x", "--trainer.max_steps takes int, got 'x'"),
        ("fit --model.denoiser.positions x", "--model.denoiser.positions takes sincos or learned, got 'x'"),
        ("fit --model.ema.decay x", "--model.ema.decay takes float, got 'x'"),
        ("fit --data.seed x", "--data.seed takes int, got 'x'"),
        ("benchmark --compare x", "--compare takes auto or diffusers or none, got 'x'"),
    ],
)
def test_a_value_that_a_setting_does_not_take_is_answered_with_what_it_takes(monkeypatch, capsys, words, said):
    command, *settings = words.split()
    given = ["--config", "digits.yaml"] if command in ("fit", "benchmark") else []
    assert said_by(monkeypatch, capsys, command, *given, *settings) == said


def test_fit_without_a_configuration_says_what_one_is_and_which_are_shipped(monkeypatch, capsys):
    text = said_by(monkeypatch, capsys, "fit")
    assert "give one with --config" in text and "digits.yaml" in text and "xl2.yaml" in text


def test_an_optimizer_that_cannot_take_these_parameters_is_one_line(monkeypatch, capsys):
    """Muon is for matrices only."""
    short = ["--trainer.max_steps", "1", "--trainer.default_root_dir", "run", "--trainer.enable_progress_bar", "false"]
    if hasattr(torch.optim, "Muon"):  # since torch 2.9
        text = said_by(monkeypatch, capsys, "fit", "--config", "digits.yaml", "--model.optimizer", "Muon", *short)
        assert text.startswith("model.optimizer does not take the denoiser's parameters: Muon ")
    text = said_by(monkeypatch, capsys, "fit", "--config", "digits.yaml", "--model.optimizer", "AdamW",
                   "--model.optimizer.betas", "[2, 0.9]", *short)  # fmt: skip
    assert "betas" in text or "beta parameter" in text


def test_no_setting_of_the_shipped_configurations_is_taken_for_a_mistake(cli):
    parser = cli("fit", "--config", "digits.yaml")._subcommand_parsers["fit"]
    for config in CONFIGS:
        assert unknown_setting(parser, ["--config", str(config)]) is None


def test_a_command_that_does_not_exist_is_named_with_the_nearest(monkeypatch, capsys):
    for word, said in (("smaple", "'smaple'; did you mean sample?"), ("xyz", "'xyz'. All are shown by ditlit --help")):
        monkeypatch.setattr(sys, "argv", ["ditlit", word])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 2 and f"there is no command {said}" in capsys.readouterr().err


def test_idle_threads_sleep_unless_the_user_says_how_they_wait(monkeypatch):
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    for given in (None, *names):
        for name in names:
            monkeypatch.setenv(name, "")  # so that it is as before at the end
            monkeypatch.delenv(name)
        if given:
            monkeypatch.setenv(given, "mine")
        let_idle_threads_sleep()
        assert {n: os.environ[n] for n in names if n in os.environ} == (
            {given: "mine"} if given else {names[0]: "PASSIVE"}
        )


def test_the_command_line_sets_how_threads_wait_before_torch_reads_it():
    """OpenMP looks at the environment once, when it is loaded."""
    code = "import sys, ditlit.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_run_is_not_written_over(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/digits/checkpoints").mkdir(parents=True)
    (tmp_path / "runs/digits/checkpoints/last.ckpt").write_bytes(b"precious")
    text = last_words(monkeypatch, capsys, "fit", "--config", "digits.yaml")
    assert "holds a run already. Continue it with --ckpt_path last" in text
    assert (tmp_path / "runs/digits/checkpoints/last.ckpt").read_bytes() == b"precious"


def test_overfitting_by_lightning_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = ["fit", "--config", "digits.yaml", "--trainer.overfit_batches", "1"]
    assert "train on a small store instead" in last_words(monkeypatch, capsys, *words)


# All that a run says on standard error, beside its progress bars.
SAID = re.compile(
    r"Seed set to 0|GPU available: (True \(.*\)|False), used: (True|False)|"
    r"Training a DiT: trained parameters [\d,]+, multiply-adds [\d.]+ G a sample and forward pass|"
    r"`Trainer.fit` stopped: `max_steps=4` reached\.|"
    r"(Restoring states|Loaded model weights) from the checkpoint (path )?at runs/digits/checkpoints/last\.ckpt"
)


def said(err):
    lines = re.split(r"[\r\n]+|\x1b\[A", err)
    return [line.strip() for line in lines if line.strip() and not re.search(r"\d+/(\d+|\?) \[", line)]


def test_fit_then_validate_and_predict(tmp_path):
    """The quickstart's path, shortened: the commands hand over to each other through the run's folder."""
    config = yaml.safe_load((ROOT / "configs" / "digits.yaml").read_text())
    config["trainer"] |= dict(max_steps=4, val_check_interval=2)
    config["save_every"] = 2
    config["model"]["sampling"]["num_steps"] = 2
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(config))
    fit = ditlit("fit", "--config", "short.yaml", cwd=tmp_path)
    assert fit.returncode == 0, fit.stderr
    assert "drawn digits are read as their label" in fit.stdout
    assert [line for line in said(fit.stderr) if not SAID.fullmatch(line)] == []
    run = tmp_path / "runs" / "digits"
    assert f"Look at them: {Path('runs/digits/samples/step-00000004.png')}" in fit.stdout
    assert (run / "samples" / "step-00000004.png").is_file()
    again = ["--config", "runs/digits/config.yaml", "--ckpt_path", "runs/digits/checkpoints/last.ckpt"]
    validate = ditlit("validate", *again, cwd=tmp_path)
    assert validate.returncode == 0 and "val/loss" in validate.stdout, validate.stderr
    assert [line for line in said(validate.stderr) if not SAID.fullmatch(line)] == []
    predict = ditlit("predict", *again, "--data.predict_samples", "12", cwd=tmp_path)
    assert predict.returncode == 0, predict.stderr
    assert len(list((run / "predictions").iterdir())) == 12
    assert "12 PNG files, one a sample, are in runs/digits/predictions" in predict.stdout
    assert [line for line in said(predict.stderr) if not SAID.fullmatch(line)] == []
    kept = yaml.safe_load((run / "config.yaml").read_text())
    assert "ckpt_path" not in kept and kept["trainer"]["max_steps"] == 4
    assert kept["data"]["init_args"]["predict_samples"] == 100  # of the training, not of the prediction


def test_two_reports_are_compared_as_two_words_or_one():
    assert joined(["--compare", "a.json", "b.json", "--metrics", "fid"]) == [
        "--compare", "a.json,b.json", "--metrics", "fid",
    ]  # fmt: skip
    for words in (["--compare", "a,b"], ["--compare", "a,b", "--out", "c"], ["--generated", "a"]):
        assert joined(words) == words


def readme_commands():
    """Of every README, each once: what stands behind ``python -m ditlit``, also where torchrun or srun starts it."""
    seen = []
    for readme in READMES:
        for block in re.findall(r"```(?:bash|sh)\n(.*?)```", readme.read_text(), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                for command in line.split("&&"):
                    words = shlex.split(command, comments=True)
                    if words[:1] in (["python"], ["torchrun"], ["srun"]) and "ditlit" in words:
                        words = words[words.index("ditlit") :]
                    if words[:1] == ["ditlit"] and words[1:] not in seen:
                        seen.append(words[1:])
    return seen


@pytest.mark.parametrize("words", readme_commands(), ids=" ".join)
def test_readme_commands_parse(cli, words, monkeypatch):
    command = next((name for name in (" ".join(words[:2]), words[0]) if name in COMMANDS), None)
    if command is not None:
        command_parser(command).parse_args(joined(words[len(command.split()) :]))
        return
    if words[0] == "benchmark":
        BenchmarkCLI([*words[1:], "--trainer.accelerator", "cpu"])  # parses, builds nothing
        return
    run_config = "runs/digits/config.yaml"
    if run_config in words:
        words = ["digits.yaml" if word == run_config else word for word in words]
    cli(*words, "--trainer.accelerator", "cpu")
