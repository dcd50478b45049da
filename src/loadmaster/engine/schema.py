"""Moved."""

from loadmaster.schema import *  # noqa: F403
from loadmaster.schema import SchemaError, from_json, to_json  # noqa: F401
