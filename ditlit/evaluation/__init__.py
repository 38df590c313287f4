"""How good generated images are, and how every number was made. Reads images and arrays; knows no model of ours."""

from ditlit.evaluation.extractors import Extractor, Features, load_extractor
from ditlit.evaluation.metrics import frechet_distance, inception_score, kernel_distance, precision_recall
from ditlit.evaluation.statistics import Statistics

__all__ = [
    "Extractor",
    "Features",
    "Statistics",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "load_extractor",
    "precision_recall",
]
