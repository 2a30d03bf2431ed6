"""Choose rows of metadata, before the download, or pictures of a pool, after it, by an ordered list of rules.

Ranks share the pictures that rules look at; all else the first does, with the processes of its machine. A killed run goes
on, on any number of ranks.
"""

import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from stages.runner.run import Input, OptionalInput, Output, main
from vtp.artefact import whole_file, write_json
from vtp.config import Config, ConfigError
from vtp.curation.filter.cluster import workers_for
from vtp.curation.filter.columns import ColumnsConfig, PoolColumns, open_metadata
from vtp.curation.filter.engine import FilterEngine
from vtp.curation.filter.hash_list import prepare
from vtp.curation.filter.measure_images import ImageMeasurement
from vtp.curation.filter.row_rules import prepared_list
from vtp.curation.filter.rules import ClipScore, Downloaded, HashList, ImageRule, Rule, needs
from vtp.curation.filter.spill import begin_process
from vtp.curation.places import REMEDY, leads_out
from vtp.distributed import ranks
from vtp.evaluation.clip_score import build_scorer, check_model
from vtp.host import Host
from vtp.processes import WorkerPool
from vtp.texts import shown


class Filter(Config):
    """A section such as `filter_metadata` or `filter_images`."""

    columns: ColumnsConfig
    keep_columns: list[str] | Literal["all"] = Field(
        description="columns of the source, by its names, that the output carries besides the roles; a pool's own always"
    )
    rules: list[Rule] = Field(description="rules in their order; each sees what those before it left")
    rows_per_part: int = Field(ge=1, description="rows of a file of the output")
    max_unreadable: float = Field(
        ge=0, le=1, description="share of rows with an unreadable key, text or image above which the stage fails"
    )


def run(
    config: Filter,
    *,
    rows: Annotated[Input, "folder of metadata, or a pool of the stage download"],
    tokenizer: Annotated[
        OptionalInput, "folder of a tokenizer that scores captions, for the rule clip_score; default: none"
    ] = None,
    lists: Annotated[OptionalInput, "folder of the lists that the rule hash_list names; default: none"] = None,
    selection: Annotated[Output, "folder for the rows that are left"],
    funnel: Annotated[Output, "JSON file for how many rows each rule removed"],
    examples: Annotated[Output, "Markdown file with examples of what each rule removed"],
    host: Host,
) -> None:
    first = ranks().first
    if first:
        _check_inputs(config, rows, tokenizer, lists, host)
    with workers_for(host) if first else WorkerPool(host.rank_processes, begin_process) as workers:
        images = ImageMeasurement(
            [rule for rule in config.rules if isinstance(rule, ImageRule)],
            pool=rows,
            outside_links=isinstance(config.columns, PoolColumns) and config.columns.outside_links,
            build_scorer=lambda rule: build_scorer(
                rule.model, weights=host.weights, tokenizer=tokenizer, device=host.device
            ),
            workers=workers,
            host=host,
        )
        if not first:
            images.follow()
            return
        wanted = [need for rule in config.rules for need in needs(rule)]
        source = open_metadata(rows, config.columns, wanted, config.keep_columns)
        _prepare_lists(config, lists, host.folder / "lists")
        engine = FilterEngine(source, config.rules, host.folder, images=images, workers=workers, host=host)
        result = engine.run(
            host.folder / "selection", rows_per_part=config.rows_per_part, max_unreadable=config.max_unreadable
        )
    (host.folder / "selection").rename(selection)
    write_json(funnel, result.metrics())
    with whole_file(examples) as temporary:
        temporary.write_text(result.markdown(), encoding="utf-8")
    host.record(rows_in=result.rows_in, rows_out=result.rows_out)
    sys.stderr.write(f"{result.table()}\n")  # beside the bars
    images.end()


def _check_inputs(config: Filter, rows: Path, tokenizer: Path | None, lists: Path | None, host: Host) -> None:
    """All that rules need besides rows is there, before the long work; no tar of a pool is elsewhere without permission."""
    if isinstance(config.columns, PoolColumns) and not config.columns.outside_links:
        for tar in sorted((rows / "tars").glob("*")):
            if leads_out(rows, tar):
                raise ConfigError(f"{shown(str(tar))}: a link leads outside of the pool; {REMEDY}")
    for rule in config.rules:
        if isinstance(rule, Downloaded | ImageRule) and not isinstance(config.columns, PoolColumns):
            raise ConfigError(f"rule {rule.name} looks at a pool: it needs columns: {{name: pool}}, after the download")
        if isinstance(rule, HashList) and lists is None:
            raise ConfigError(f"rule hash_list reads {rule.file}: give the command --lists FOLDER")
        if isinstance(rule, ClipScore):
            check_model(rule.model, weights=host.weights, tokenizer=tokenizer)


def _prepare_lists(config: Filter, lists: Path | None, folder: Path) -> None:
    for rule in config.rules:
        if isinstance(rule, HashList) and lists is not None:
            prepare(lists / rule.file, prepared_list(folder, rule.file))


def looks_at_images(config: Filter) -> bool:
    """Whether other ranks have something to do."""
    return any(isinstance(rule, ImageRule) for rule in config.rules)


if __name__ == "__main__":
    main(run, distributed=looks_at_images)
