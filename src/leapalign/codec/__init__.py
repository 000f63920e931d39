"""Convert dataclasses to JSON and back, strictly: run.json replays the run, and a typo in it is an error.

Each plug-in names its class: {"type": "leapalign.methods.leapalign.LeapAlign", ...}. Reading imports only modules of
leapalign, each from its field's folder. A user-defined class is recorded as "my_recipe.py:MyReward" and found only if
the user gives that file again: a run.json never runs code by itself.
"""

from leapalign.codec.messages import suggestion
from leapalign.codec.reading import Plugins, check_fields, decode, field_types, loads, with_new_names
from leapalign.codec.writing import classes_in, dumps, encode, type_name

__all__ = [
    "Plugins",
    "check_fields",
    "classes_in",
    "decode",
    "dumps",
    "encode",
    "field_types",
    "loads",
    "suggestion",
    "type_name",
    "with_new_names",
]
