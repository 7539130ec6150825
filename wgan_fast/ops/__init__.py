"""The package's operators, one file each: schema, plain form, what it returns without data, derivative, launch."""

from . import normalization as normalization
from .assemble import assemble as assemble
from .cast import cast as cast
from .clip_weights import clip_weights_ as clip_weights_
from .clipped_rmsprop import clipped_rmsprop_ as clipped_rmsprop_
from .gradient_norm_penalty import gradient_norm_penalty as gradient_norm_penalty
from .interpolate import interpolate as interpolate
from .interpolate import interpolate_into as interpolate_into
from .mlp_critic_step import mlp_critic_step as mlp_critic_step
