"""What a run says: console and file, the report, TensorBoard, W&B, and the facts that let it be repeated."""

from mambair_ds.runlog.environment import describe_environment
from mambair_ds.runlog.log import LIVE, Progress, log_to_console, log_to_file
from mambair_ds.runlog.report import save_detail
from mambair_ds.runlog.trackers import Trackers

__all__ = ["LIVE", "Progress", "Trackers", "describe_environment", "log_to_console", "log_to_file", "save_detail"]
