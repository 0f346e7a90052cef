"""The names of our backbones, as in `config.model.name`."""

from clop_jax.models import resnet
from clop_jax.models import vit

RESNETS = {
  'resnet8': resnet.ResNet8,
  'resnet18': resnet.ResNet18,
  'resnet34': resnet.ResNet34,
  'resnet50': resnet.ResNet50,
}
VITS = {'vit_ti': vit.ViTTi, 'vit_s': vit.ViTS, 'vit_b': vit.ViTB}
BACKBONES = {**RESNETS, **VITS}
