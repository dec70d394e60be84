"""Private fine-tuning with PyTorch: frozen layers computed by a server on encrypted activations."""

from __future__ import annotations

from privtuner.nn.bundle import GroupSpec, OwnerBundle
from privtuner.nn.groups import EncryptedGroup
from privtuner.nn.layers import EncryptedLayer, EncryptedLinear, traffic_of
from privtuner.nn.model import build, build_embeddings
from privtuner.nn.padding import visible_only
from privtuner.nn.prepared import Prepared
from privtuner.nn.pretrained import own_files
from privtuner.nn.sealed_encoder import SealedEncoder
from privtuner.nn.sealing import Sealing
from privtuner.nn.session import Session
from privtuner.nn.split import Split, split, split_pretrained
from privtuner.nn.traffic import Traffic, TrafficMeter
from privtuner.parties import Transport
from privtuner.schemes import LocalTransport

__all__ = [
    "EncryptedGroup",
    "EncryptedLayer",
    "EncryptedLinear",
    "GroupSpec",
    "LocalTransport",
    "OwnerBundle",
    "Prepared",
    "SealedEncoder",
    "Sealing",
    "Session",
    "Split",
    "Traffic",
    "TrafficMeter",
    "Transport",
    "build",
    "build_embeddings",
    "own_files",
    "split",
    "split_pretrained",
    "traffic_of",
    "visible_only",
]
