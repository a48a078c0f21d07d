"""The laboratory's data: where the sets lie, how they are checked on reading, and how to get them."""

from archopt.lab.data.cifar10 import half_note, load_cifar10, load_cifar100
from archopt.lab.data.digits import load_digits
from archopt.lab.data.folder import DataError, DataFolder, default_data_folder
from archopt.lab.data.idx import read_idx
from archopt.lab.data.image_folder import ImageFolder, load_image_folder
from archopt.lab.data.mnist import load_fashion_mnist, load_mnist
from archopt.lab.data.multi30k import load_multi30k
from archopt.lab.data.sets import SetInfo, list_sets
from archopt.lab.data.tinyshakespeare import load_tinyshakespeare
from archopt.lab.data.transfer import Progress, fetch, import_folder
from archopt.lab.data.wikitext2 import load_wikitext2

__all__ = [
    "DataError",
    "DataFolder",
    "ImageFolder",
    "Progress",
    "SetInfo",
    "default_data_folder",
    "fetch",
    "half_note",
    "import_folder",
    "list_sets",
    "load_cifar10",
    "load_cifar100",
    "load_digits",
    "load_fashion_mnist",
    "load_image_folder",
    "load_mnist",
    "load_multi30k",
    "load_tinyshakespeare",
    "load_wikitext2",
    "read_idx",
]
