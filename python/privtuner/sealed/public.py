"""STAND-IN until branch enc is merged."""

from __future__ import annotations

from typing import Any

Public = Any
Refresh = Any
