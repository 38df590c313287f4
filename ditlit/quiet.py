"""What libraries say that is no business of the user's, by its exact words; everything else they say is heard."""

import logging
import warnings

# Logged by Lightning: hints of other products, and of devices that nobody asked for.
LOGGED = (
    "💡 Tip: For seamless cloud logging and experiment tracking, try installing [litlogger]"
    "(https://pypi.org/project/litlogger/) to enable LitLogger, which logs metrics and artifacts automatically to the "
    "Lightning Experiments platform.",
    "💡 Tip: For seamless cloud uploads and versioning, try installing [litmodels]"
    "(https://pypi.org/project/litmodels/) to enable LitModelCheckpoint, which syncs automatically with the Lightning "
    "model registry.",
    "TPU available: False, using: 0 TPU cores",
)
LOGGER = "lightning.pytorch.utilities.rank_zero"

# Warned of, with the reason why it does not matter here.
WARNED = (
    # Stores are mapped into memory: reading ahead in other processes is slower.
    (
        UserWarning,
        r"The '(train|val|test|predict)_dataloader' does not have many workers which may be a bottleneck. Consider "
        r"increasing the value of the `num_workers` argument` to `num_workers=\d+` in the `DataLoader` to improve "
        r"performance.",
    ),
    # Without samples to validate on.
    (UserWarning, r"Total length of `list` across ranks is zero. Please make sure this was your intention."),
    # Curves are entered by steps, over the bounds of epochs.
    (
        UserWarning,
        r"The number of training batches \(\d+\) is smaller than the logging interval "
        r"Trainer\(log_every_n_steps=\d+\). Set a lower value for log_every_n_steps if you want to see logs for "
        r"the training epoch.",
    ),
    # Between Lightning and torch.
    (
        FutureWarning,
        r"`isinstance\(treespec, LeafSpec\)` is deprecated, use `isinstance\(treespec, TreeSpec\) and "
        r"treespec.is_leaf\(\)` instead.",
    ),
)


def quieten() -> None:
    """Leave these messages out, in this process."""
    logging.getLogger(LOGGER).addFilter(is_heard)
    for category, words in WARNED:
        warnings.filterwarnings("ignore", words + r"\Z", category)


def is_heard(record: logging.LogRecord) -> bool:
    return record.getMessage() not in LOGGED
