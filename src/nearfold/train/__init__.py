"""Training: data, recipe and loop in plain PyTorch, on one process or, under torchrun, on several."""

from nearfold.train.begin import begin
from nearfold.train.checkpoint import load_weights, save_weights
from nearfold.train.data import ImageData, Split, load_data
from nearfold.train.evaluation import evaluate, prepare
from nearfold.train.loop import Result, fit
from nearfold.train.memory import require_trainable
from nearfold.train.recipe import Recipe
from nearfold.train.stream import StreamData, open_data
from nearfold.train.trainer import Diverged

__all__ = [
    "Diverged",
    "ImageData",
    "Recipe",
    "Result",
    "Split",
    "StreamData",
    "begin",
    "evaluate",
    "fit",
    "load_data",
    "load_weights",
    "open_data",
    "prepare",
    "require_trainable",
    "save_weights",
]
