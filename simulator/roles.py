"""What a storage is for: the rows of every breakdown and the colours of every plot."""

from __future__ import annotations

import enum


class Role(enum.Enum):
    """The purpose of a storage; the value is the text people read."""

    PARAMETER = "parameter"
    MASTER_WEIGHT = "master weight"
    GRADIENT = "gradient"
    OPTIMIZER_STATE = "optimizer state"
    ACTIVATION = "activation"
    WEIGHT_CAST = "weight cast"
    RECOMPUTE = "recompute"
    LOSS_HEAD = "loss head"
    BACKWARD = "backward temporary"
    OPTIMIZER = "optimizer temporary"
    GATHERED = "gathered parameter"
    POST_FORWARD_SHARD = "post-forward shard"
    GATHER = "gather buffer"
    REDUCE = "reduce buffer"
    BUCKET = "bucket"
    RECEIVED = "receive buffer"
    WORKSPACE = "workspace"
    INPUT = "input"
    BUFFER = "buffer"

    __hash__ = object.__hash__  # there is one of each; Enum hashes the name, in Python


class Phase(enum.Enum):
    """The part of a training step that a step of the program belongs to."""

    LOAD = "load"
    INPUT = "input"
    FORWARD = "forward"
    BACKWARD = "backward"
    RECOMPUTE = "recompute"
    OPTIMIZER = "optimizer"

    __hash__ = object.__hash__  # as above
