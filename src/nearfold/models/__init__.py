"""Networks: the seeds' published ones by name, and the small ones of the studies.

>>> import nearfold.models
>>> nearfold.models.list_models("vgg11*")
['vgg11_conv', 'vgg11_convnn', 'vgg11_hybrid']
"""

from nearfold.models import densenet, gwo, pvt, resnet, resnet8, san, swin, vgg, vit  # their networks enter the table
from nearfold.models.denoise import DenoiseNet
from nearfold.models.hub import from_pretrained, push_to_hub, save_pretrained
from nearfold.models.look import look_into
from nearfold.models.network import Features, Network
from nearfold.models.plain import PlainNet
from nearfold.models.registry import MODELS, Entry, Published, create, list_models, register
from nearfold.models.small import SpectrumNet, stem_stride

__all__ = [
    "MODELS",
    "DenoiseNet",
    "Entry",
    "Features",
    "Network",
    "PlainNet",
    "Published",
    "SpectrumNet",
    "create",
    "densenet",
    "from_pretrained",
    "gwo",
    "list_models",
    "look_into",
    "push_to_hub",
    "pvt",
    "register",
    "resnet",
    "resnet8",
    "san",
    "save_pretrained",
    "stem_stride",
    "swin",
    "vgg",
    "vit",
]
