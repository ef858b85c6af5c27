"""Published networks, with the multiply-accumulates (MACs) and parameters printed for them.

    network = ZOO["resnet50"]
    apply_fn, variables, inputs = network.build()
    jaxcompress.graph.tracing(apply_fn, variables, *inputs).macs

Nothing is allocated: variables and inputs are shapes and dtypes. `network.model.init` gives random
weights. Parameters are what is trained, so BatchNorm's running statistics are none.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from experiments.models import mlperf_tiny, resnet_cifar
from experiments.models.convnext import ConvNeXt
from experiments.models.efficientnet import EfficientNetB0
from experiments.models.mobilenet import MobileNetV1, MobileNetV2
from experiments.models.published import Figure, printed
from experiments.models.resnet import Basic, Bottleneck, ResNet
from experiments.models.transformer import Bert, Gpt2, ViT
from experiments.models.vgg import VGG, AlexNet


class Abstract(NamedTuple):
    """A network as shapes and dtypes.

    Attributes:
      apply_fn: the pure function `(variables, *inputs) -> outputs`.
      variables: {"params": ..., "batch_stats": ...}, the latter if there is BatchNorm.
      inputs: of a batch of one.
    """

    apply_fn: Callable[..., Any]
    variables: Any
    inputs: tuple[jax.ShapeDtypeStruct, ...]


@dataclasses.dataclass(frozen=True)
class Network:
    """A network, and what is published about it.

    Attributes:
      name: for tables.
      model: a Linen module, in inference.
      inputs: shapes and dtypes of a batch of one.
      macs: multiply-accumulates as printed; None where no source prints them.
      params: number of parameters as printed.
      source: where both are printed.
    """

    name: str
    model: nn.Module
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    _: dataclasses.KW_ONLY
    macs: str | None
    params: str
    source: str

    @property
    def published_macs(self) -> Figure | None:
        """`macs` as a number, with the tolerance that its digits imply."""
        return None if self.macs is None else printed(self.macs)

    @property
    def published_params(self) -> Figure:
        """`params` as a number, with the tolerance that its digits imply."""
        return printed(self.params)

    def build(self) -> Abstract:
        """The network, without allocating its weights."""
        variables = jax.eval_shape(self.model.init, jax.random.key(0), *self.inputs)
        return Abstract(lambda v, *x: self.model.apply(v, *x), variables, self.inputs)


class DeepResNetCifar(resnet_cifar.ResNetCifar):
    """A CIFAR ResNet of any depth 6 n + 2, also where there are no trained weights to load."""

    def _check(self, x: jax.Array) -> None:
        if self.depth < 8 or self.depth % 6 != 2:
            raise ValueError(f"depth must be 6 n + 2, got {self.depth}")


def floats(*shape: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """One input, float32 [1, *shape]."""
    return (jax.ShapeDtypeStruct((1, *shape), jnp.float32),)


def integers(length: int, *, inputs: int = 1) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Inputs of a language model, each int32 [1, length]."""
    return (jax.ShapeDtypeStruct((1, length), jnp.int32),) * inputs


def torchvision(name: str, model: nn.Module, *, macs: str, params: str, file: str) -> Network:
    """A network for ImageNet with the figures that torchvision gives beside its weights."""
    source = (
        f"torchvision 0.29.1, torchvision/models/{file}.py, weights IMAGENET1K_V1: _ops, in 10^9 "
        "multiply-accumulates, and num_params"
    )
    return Network(name, model, floats(224, 224, 3), macs=macs, params=params, source=source)


def convolutional() -> dict[str, Network]:
    """Networks for ImageNet that are not ResNets."""
    rows = {
        "alexnet": ("AlexNet", AlexNet(), "0.714 G", "61,100,840", "alexnet"),
        "vgg16": ("VGG-16", VGG(), "15.47 G", "138,357,544", "vgg"),
        "mobilenet_v2": ("MobileNetV2", MobileNetV2(), "0.301 G", "3,504,872", "mobilenetv2"),
        "efficientnet_b0": (
            *("EfficientNet-B0", EfficientNetB0()),
            *("0.386 G", "5,288,548", "efficientnet"),
        ),
        "convnext_t": ("ConvNeXt-T", ConvNeXt(), "4.456 G", "28,589,128", "convnext"),
    }
    mobilenet_v1 = Network(
        "MobileNetV1",
        MobileNetV1(),
        floats(224, 224, 3),
        macs="569 M",
        params="4.2 M",
        source="Howard et al. (2017), https://arxiv.org/abs/1704.04861, table 8",
    )
    return {"mobilenet_v1": mobilenet_v1} | {
        key: torchvision(name, model, macs=macs, params=params, file=file)
        for key, (name, model, macs, params, file) in rows.items()
    }


def resnets() -> dict[str, Network]:
    """The ResNets for ImageNet, version 1.5 (see `resnet`)."""
    rows = {
        18: (Basic, (2, 2, 2, 2), "1.814 G", "11,689,512"),
        34: (Basic, (3, 4, 6, 3), "3.664 G", "21,797,672"),
        50: (Bottleneck, (3, 4, 6, 3), "4.089 G", "25,557,032"),
        101: (Bottleneck, (3, 4, 23, 3), "7.801 G", "44,549,160"),
        152: (Bottleneck, (3, 8, 36, 3), "11.514 G", "60,192,808"),
    }
    return {
        f"resnet{depth}": torchvision(
            f"ResNet-{depth}", ResNet(stages, block), macs=macs, params=params, file="resnet"
        )
        for depth, (block, stages, macs, params) in rows.items()
    }


def vision_transformers() -> dict[str, Network]:
    """Vision transformers for ImageNet; the products inside the attention are counted."""
    rows = {
        "vit_b_32": ("ViT-B/32", ViT(32, 768, 12, 12), "4.409 G", "88,224,232"),
        "vit_b_16": ("ViT-B/16", ViT(16, 768, 12, 12), "17.564 G", "86,567,656"),
        "vit_l_16": ("ViT-L/16", ViT(16, 1024, 24, 16), "61.555 G", "304,326,632"),
    }
    deit = Network(
        "DeiT-Ti/16",
        ViT(16, 192, 12, 3),
        floats(224, 224, 3),
        macs="1.3 G",
        params="5.7 M",
        source="Wang et al. (2021), https://arxiv.org/abs/2102.12122, results on ImageNet",
    )
    return {"deit_ti_16": deit} | {
        key: torchvision(name, model, macs=macs, params=params, file="vision_transformer")
        for key, (name, model, macs, params) in rows.items()
    }


def language_models() -> dict[str, Network]:
    """Language models; of the attention all S x S products count, also those that a mask drops."""
    bert = Network(
        "BERT-base",
        Bert(),
        integers(128, inputs=3),
        macs="11.17 G",
        params="109,482,240",
        source="README of calflops 0.3.2, hfl/chinese-roberta-wwm-ext (BERT-base with another "
        "vocabulary): MACs; Transformers, BertModel of bert-base-uncased: parameters",
    )
    gpt2 = Network(
        "GPT-2 small",
        Gpt2(),
        integers(1024),
        macs="145,824,153,600",
        params="124,439,808",
        source="transformer_sizing.ipynb of https://github.com/karpathy/nanoGPT, half of "
        "forward_total 291,648,307,200 FLOPs: MACs; Transformers, GPT2LMHeadModel of gpt2: "
        "parameters",
    )
    return {"bert_base": bert, "gpt2_small": gpt2}


def cifar_resnets() -> dict[str, Network]:
    """The ResNets for CIFAR-10, whose shortcuts have no parameters."""
    he = "He et al. (2016), https://arxiv.org/abs/1512.03385, table 6: parameters"
    lin = f"{he}; Lin et al. (2020), https://arxiv.org/abs/2002.10179, CIFAR-10: MACs"
    rows = {
        20: (None, "0.27 M", he),
        56: ("125.49 M", "0.85 M", lin),
        110: ("252.89 M", "1.7 M", lin),
    }
    return {
        f"resnet{depth}_cifar": Network(
            f"ResNet-{depth} (CIFAR)",
            DeepResNetCifar(depth),
            floats(32, 32, 3),
            macs=macs,
            params=params,
            source=source,
        )
        for depth, (macs, params, source) in rows.items()
    }


def tiny() -> dict[str, Network]:
    """The networks of MLPerf Tiny, closed division."""
    rows = {
        "resnet8": ("image_classification", "pretrainedResnet_quant", "12,501,632", "78,186"),
        "ds_cnn": ("keyword_spotting", "kws_ref_model", "2,656,768", "23,756"),
        "mobilenet_v1_025": ("visual_wake_words", "vww_96_int8", "7,489,664", "216,322"),
        "autoencoder": ("anomaly_detection", "ad01_int8", "264,192", "267,928"),
    }
    networks = {
        "resnet8": ("ResNet-8", mlperf_tiny.ResNet8(), floats(32, 32, 3)),
        "ds_cnn": ("DS-CNN", mlperf_tiny.DsCnn(), floats(49, 10, 1)),
        "mobilenet_v1_025": ("MobileNetV1 x0.25", mlperf_tiny.VisualWakeWords(), floats(96, 96, 3)),
        "autoencoder": ("Autoencoder", mlperf_tiny.Autoencoder(), floats(640)),
    }
    return {
        key: Network(
            *networks[key],
            macs=macs,
            params=params,
            source=f"https://github.com/mlcommons/tiny, benchmark/training/{task}: MACs of the "
            f"operators in trained_models/{file}.tflite, trainable parameters of the Keras network",
        )
        for key, (task, file, macs, params) in rows.items()
    }


ZOO: dict[str, Network] = {
    **tiny(),
    **cifar_resnets(),
    **convolutional(),
    **resnets(),
    **vision_transformers(),
    **language_models(),
}
