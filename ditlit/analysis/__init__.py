"""What is inside a checkpoint and a run: for notebooks, as functions."""

from ditlit.analysis.activations import Sizes, sizes
from ditlit.analysis.attention import attended_distance, attention_maps
from ditlit.analysis.curves import Curve, read_curves
from ditlit.analysis.denoising import Snapshots, snapshots
from ditlit.analysis.embeddings import class_similarities, neighbours
from ditlit.analysis.gates import block_changes, gate_values
from ditlit.analysis.guidance import LabelEffect, label_effect
from ditlit.analysis.latents import ChannelStatistics, channel_statistics, mirrored, round_trips
from ditlit.analysis.opening import OpenCheckpoint, find_store, open_checkpoint
from ditlit.analysis.quality import Pixels, Quality
from ditlit.analysis.scaling import losses_at_scales, predictions_at_scales
from ditlit.analysis.weights import by_block, weight_distances

__all__ = [
    "ChannelStatistics",
    "Curve",
    "LabelEffect",
    "OpenCheckpoint",
    "Pixels",
    "Quality",
    "Sizes",
    "Snapshots",
    "attended_distance",
    "attention_maps",
    "block_changes",
    "by_block",
    "channel_statistics",
    "class_similarities",
    "find_store",
    "gate_values",
    "label_effect",
    "losses_at_scales",
    "mirrored",
    "neighbours",
    "open_checkpoint",
    "predictions_at_scales",
    "read_curves",
    "round_trips",
    "sizes",
    "snapshots",
    "weight_distances",
]
