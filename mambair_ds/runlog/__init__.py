"""What a run says: console and file, TensorBoard, Weights & Biases, and the facts that let it be repeated."""

from mambair_ds.runlog.environment import describe_environment
from mambair_ds.runlog.log import log_to_console, log_to_file
from mambair_ds.runlog.trackers import Trackers

__all__ = ["Trackers", "describe_environment", "log_to_console", "log_to_file"]
