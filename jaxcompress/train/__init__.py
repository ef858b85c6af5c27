"""Training: one state, one step, and a loop that goes on where it was killed."""

from jaxcompress.core.numbers import number_at
from jaxcompress.train import augment
from jaxcompress.train.convolutions import fast_kernel_gradients
from jaxcompress.train.data import Batches, batches, key_at, place
from jaxcompress.train.log import read_log
from jaxcompress.train.loop import fit, progress_bar
from jaxcompress.train.step import cross_entropy, hinton_loss, make_step, stateless
from jaxcompress.train.train_checkpoint import Checkpoints, restore
from jaxcompress.train.train_state import Trainable, TrainState, create, label_learned

__all__ = [
    "Batches",
    "Checkpoints",
    "TrainState",
    "Trainable",
    "augment",
    "batches",
    "create",
    "cross_entropy",
    "fast_kernel_gradients",
    "fit",
    "hinton_loss",
    "key_at",
    "label_learned",
    "make_step",
    "number_at",
    "place",
    "progress_bar",
    "read_log",
    "restore",
    "stateless",
]
