"""Training: one state, one step."""

from jaxcompress.train.convolutions import fast_kernel_gradients
from jaxcompress.train.state import Trainable, TrainState, create, label_learned
from jaxcompress.train.step import cross_entropy, hinton_loss, make_step, number_at, stateless

__all__ = [
    "TrainState",
    "Trainable",
    "create",
    "cross_entropy",
    "fast_kernel_gradients",
    "hinton_loss",
    "label_learned",
    "make_step",
    "number_at",
    "stateless",
]
