"""The passes of a filter on a cluster: what worker processes do here is a task of Spark each, and writes the same files."""

import os
from functools import partial

from vtp.config import ConfigError
from vtp.curation.filter.spill import begin_process
from vtp.host import Host
from vtp.processes import WorkerPool
from vtp.spark import SparkPool

# A second attempt at a task that is still at work would write into the same file.
SETTINGS = {"spark.speculation": "false", "spark.log.level": "ERROR", "spark.ui.showConsoleProgress": "false"}


def workers_for(host: Host) -> WorkerPool:
    """On this machine, or on the cluster that the host names, whose nodes share the folder that the command runs in.

    Raises ConfigError when that cannot be had.
    """
    if not host.spark:
        return WorkerPool(host.processes, begin_process)
    try:
        return SparkPool(host.spark, "filter", SETTINGS, partial(_begin_in, os.getcwd()))
    except ConfigError as error:
        raise ConfigError(f"$VTP_SPARK: {error}") from None


def _begin_in(folder: str) -> None:
    os.chdir(folder)
    begin_process()
