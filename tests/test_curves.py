"""Curves and folders that cannot be written: one line each, and no more than that."""

import subprocess
import sys

import pytest

from ditlit.cli import check_writable
from ditlit.errors import InputError


def test_curves_that_cannot_be_written_end_with_one_line(tmp_path):
    """A limit on the size of files stands for the full disk."""
    script = f"""
import resource, signal, torch
from ditlit.training.curves import RunLogger
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
logger = RunLogger({str(tmp_path)!r}, name="", version="")
logger.log_metrics({{"loss": 1.0}}, 0)
logger.experiment.flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))
for step in range(1, 200):
    logger.log_metrics({{"loss": 1.0}}, step)
    logger.experiment.add_image("samples", torch.zeros(3, 8, 8), step)
    if step % 50 == 0:
        logger.experiment.flush()
logger.experiment.flush()
logger.experiment.close()
print("trained")
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert result.returncode == 0 and "trained" in result.stdout, result.stderr
    assert result.stderr.count("cannot be written (File too large): they end here, and training goes on") == 1


def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path):
    check_writable(tmp_path / "runs" / "new")
    assert not list((tmp_path / "runs" / "new").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write to the run's folder .*file: File exists; .*default_root_dir"):
        check_writable(tmp_path / "file")
    with pytest.raises(InputError, match=r"cannot write to the run's folder .*below: Not a directory"):
        check_writable(tmp_path / "file" / "below")
