"""Pretrained models: names, weights, a new head. Importing it registers the networks for CIFAR with timm."""

from samtune.models import cifar_resnet as cifar_resnet
from samtune.models import shaken as shaken
