"""Training: one state, one step."""

from jaxcompress.train import augment
from jaxcompress.train.convolutions import fast_kernel_gradients
from jaxcompress.train.data import Batches, batches, key_at, place
from jaxcompress.train.state import Trainable, TrainState, create
from jaxcompress.train.step import cross_entropy, hinton_loss, make_step, number_at, stateless

__all__ = [
    "Batches",
    "TrainState",
    "Trainable",
    "augment",
    "batches",
    "create",
    "cross_entropy",
    "fast_kernel_gradients",
    "hinton_loss",
    "key_at",
    "make_step",
    "number_at",
    "place",
    "stateless",
]
