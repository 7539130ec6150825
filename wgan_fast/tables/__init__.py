"""Tables: typed columns, and numbers that a network learns in their place, exactly inverted."""

from .columns import KINDS as KINDS
from .columns import Column as Column
from .columns import columns_of as columns_of
from .columns import read_table as read_table
from .preparation import Preparation as Preparation
from .synthesizer import TableSynthesizer as TableSynthesizer
