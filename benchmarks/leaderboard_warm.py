"""Imports what cells of the leaderboard need, once for all of them. Computes nothing: cells are forked from here."""

import peft  # noqa: F401
import torch  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import leaderboard_cell  # noqa: F401
from holdfast import models  # noqa: F401
from holdfast.hosts import plain  # noqa: F401
from holdfast.measure import scorer, suites, tuned_task  # noqa: F401
from holdfast.runs import job  # noqa: F401
