"""The workloads that come with the laboratory, one file an experiment."""

import importlib
from collections.abc import Iterator, Mapping

from archopt.lab.workload import Workload

_PLACES = {
    "digits": "archopt.lab.workloads.digits:Digits",
    "mnist-mlp100": "archopt.lab.workloads.mnist_mlp100:MnistMLP100",
    "mnist-cwn": "archopt.lab.workloads.mnist_cwn:MnistCWN",
    "cifar10-resnet-small": "archopt.lab.workloads.cifar10_resnet_small:CIFAR10ResNetSmall",
    "cifar10-vgg11": "archopt.lab.workloads.cifar10_vgg11:CIFAR10VGG11",
    "cifar10-resnet18": "archopt.lab.workloads.cifar10_resnet18:CIFAR10ResNet18",
    "imagenet-resnet50": "archopt.lab.workloads.imagenet_resnet50:ImageNetResNet50",
    "classify": "archopt.lab.workloads.classify:Classify",
    "cifar10-gan": "archopt.lab.workloads.cifar10_gan:CIFAR10GAN",
    "shakespeare-gpt": "archopt.lab.workloads.shakespeare_gpt:ShakespeareGPT",
    "shakespeare-lstm": "archopt.lab.workloads.shakespeare_lstm:ShakespeareLSTM",
    "pong-ppo": "archopt.lab.workloads.pong_ppo:PongPPO",
    "wikitext2-transformer": "archopt.lab.workloads.wikitext2_transformer:WikiText2Transformer",
    "multi30k-transformer": "archopt.lab.workloads.multi30k_transformer:Multi30kTransformer",
    # Its paper's name for it; what it trains on is Multi30k.
    "wmt16": "archopt.lab.workloads.multi30k_transformer:Multi30kTransformer",
}


class _Registry(Mapping[str, type[Workload]]):
    """Name -> class; a workload's file is imported when it is asked for."""

    def __getitem__(self, name: str) -> type[Workload]:
        module, _, attribute = _PLACES[name].partition(":")
        found: type[Workload] = getattr(importlib.import_module(module), attribute)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(_PLACES)

    def __len__(self) -> int:
        return len(_PLACES)


def registry() -> Mapping[str, type[Workload]]:
    """All workloads by name, in the order in which they are listed."""
    return _Registry()
