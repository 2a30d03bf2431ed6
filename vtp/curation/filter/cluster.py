"""The passes of a filter on a cluster: what worker processes do here is a task of Spark each, and writes the same files.

Nothing of Spark's but the scheduling is used, so results are equal to the last byte. The folder that the command runs in
is one that all nodes share, under the same path, and this package is installed in the same Python of each.
"""

import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from vtp.config import ConfigError
from vtp.curation.filter.spill import begin_process
from vtp.host import Host
from vtp.processes import WorkerDied, WorkerPool

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

P = ParamSpec("P")
R = TypeVar("R")
TASKS = 256  # that Spark is given at a time; more cores than this are not used
# A second attempt at a task that is still at work would write into the same file.
SETTINGS = {"spark.speculation": "false", "spark.log.level": "ERROR", "spark.ui.showConsoleProgress": "false"}


def workers_for(host: Host) -> WorkerPool:
    """On this machine, or on the cluster that the host names. Raises ConfigError when that cannot be had."""
    return SparkPool(host.spark, begin_process) if host.spark else WorkerPool(host.processes, begin_process)


class SparkPool(WorkerPool):
    """Runs jobs on a cluster, as long as its `with` block. In a task `begin` comes first.

    Further settings are Spark's own: `spark-defaults.conf`, PYSPARK_SUBMIT_ARGS.
    """

    def __init__(self, master: str, begin: Callable[[], object]) -> None:
        self._session = _session(master)
        self._ahead = TASKS
        self._executor = _Tasks(self._session, begin)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._session.sparkContext.cancelAllJobs()
        super().__exit__(kind, error, trace)
        self._session.stop()


class _Tasks(ThreadPoolExecutor):
    """Each thread waits for a task."""

    def __init__(self, session: "SparkSession", begin: Callable[[], object]) -> None:
        super().__init__(TASKS)
        self._context, self._begin = session.sparkContext, begin

    def submit(self, function: Callable[P, R], /, *arguments: P.args, **more: P.kwargs) -> Future[R]:
        return super().submit(self._result, function, *arguments, **more)

    def _result(self, function: Callable[P, R], /, *arguments: P.args, **more: P.kwargs) -> R:
        from py4j.protocol import Py4JError

        folder, begin = os.getcwd(), self._begin

        def task(_: object) -> R | Exception:
            os.chdir(folder)
            begin()
            try:
                return function(*arguments, **more)
            except (ValueError, OSError) as error:  # which say all that there is to say
                return error

        try:
            # Not `first`: it leaves the rest unread, and Spark ends the process that holds it.
            (result,) = self._context.parallelize([None], 1).map(task).collect()
        except Py4JError as error:
            raise WorkerDied(
                "Spark gave up a task, most likely because a node or its memory was lost: see its log, and start again; "
                "finished work is kept"
            ) from error
        if isinstance(result, Exception):
            raise result
        return result


def _session(master: str) -> "SparkSession":
    try:
        from py4j.protocol import Py4JError
        from pyspark.errors import PySparkException
        from pyspark.sql import SparkSession
    except ImportError:
        raise ConfigError("$VTP_SPARK: pyspark is not installed here: pip install -e '.[spark]'") from None
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    builder = SparkSession.builder.master(master).appName("filter")
    for name, value in SETTINGS.items():
        builder = builder.config(name, value)
    try:
        return builder.getOrCreate()
    except (PySparkException, Py4JError) as error:
        lines = str(error).splitlines()
        reason = (lines[1] if len(lines) > 1 else lines[0]).removeprefix(": ")  # the first says that there is an error
        raise ConfigError(f"$VTP_SPARK: no session of Spark at {master!r} (it needs Java 17): {reason}") from error
