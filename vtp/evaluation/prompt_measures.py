"""Measures of how well pictures follow the prompts that they were asked to show.

All take pictures of one set after another: samples of a setting, the real pictures of the same prompts, which are the
ceiling, and their reconstructions, which are what the tokenizer leaves of it. A figure that such a set does not have is
left out.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Protocol, Self

from pydantic import Field, model_validator
from torch import Tensor

from vtp.config import Config, ConfigError
from vtp.curation.filter.rules import OpenClipModel, TokenizerModel
from vtp.evaluation.clip_score import build_scorer, check_model, model_name, weights_digest
from vtp.evaluation.prompt_clip import ClipMeasure, RetrievalConfig
from vtp.evaluation.prompt_text import RapidOcr, RapidOcrConfig, TextMeasure, engine_facts, quoted_words

USER = "clip_scores"  # the parameter that asks for models
ScoringModel = Annotated[OpenClipModel | TokenizerModel, Field(discriminator="name")]


class PromptMeasure(Protocol):
    """Figures of a set of pictures and their prompts, which are of one set until `figures` is asked."""

    def add(self, images: Tensor, prompts: Sequence[str]) -> None:
        """This rank's next images [B, 3, H, W] uint8 and what each was asked to show; those of ranks follow each other."""
        ...

    def figures(self) -> dict[str, float]:
        """Of the pictures of all ranks since the last call, by name, equal on every rank; each of them must ask."""
        ...


class PromptFollowing(Config):
    """Which measures of prompt-following are taken."""

    clip_scores: list[ScoringModel] = Field(
        description="models that tell how near pictures are to their prompts; one that conditions the generator is its "
        "teacher, and its figures end with `_own`"
    )
    retrieval: RetrievalConfig | None = Field(
        description="whether pictures find their prompt among others, by each of clip_scores; null leaves it out"
    )
    ocr: RapidOcrConfig | None = Field(
        description="engine that reads the words which prompts put in quotes; null leaves it out"
    )
    scenes: bool = Field(description="whether composed scenes show what their captions say, and where")

    @model_validator(mode="after")
    def _models_are_told_apart(self) -> Self:
        names = [model_name(model) for model in self.clip_scores]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"clip_scores: two models are called {twice[0]} in metrics; leave one out")
        if self.retrieval is not None and not names:
            raise ValueError("retrieval is by the models of clip_scores, which names none; add one, or set it to null")
        return self


def build_measures(
    config: PromptFollowing,
    *,
    prompts: Iterable[str],
    weights: Path,
    tokenizer: Path | None,
    own: Callable[[OpenClipModel | TokenizerModel], bool],
    device: str,
    scenes: PromptMeasure | None = None,
) -> list[PromptMeasure]:
    """The measures that the parameters name.

    `prompts` are all that pictures will be asked to show; those that retrieval draws are among them. `weights` is the
    folder of external weights, `tokenizer` the folder that `{name: tokenizer}` means. `own` says whether a model is the
    one that conditions the generator. `scenes` is the
    measure of composed scenes. Raises ConfigError and ArtefactError for what is missing or cannot be measured.
    """
    texts = list(dict.fromkeys(prompts))
    if config.retrieval is not None and len(texts) < config.retrieval.among:
        raise ConfigError(
            f"retrieval.among asks for {config.retrieval.among} different prompts, there are {len(texts)}; lower it, draw "
            "samples of more prompts, or set retrieval to null"
        )
    if config.ocr is not None and not any(map(quoted_words, texts)):
        raise ConfigError(f"ocr reads words that prompts put in quotes, and none of {len(texts)} does; set it to null")
    if config.scenes and scenes is None:
        raise ConfigError("scenes: give --detector FOLDER of train_detector on the command, or set it to false")
    for model in config.clip_scores:
        check_model(model, weights=weights, tokenizer=tokenizer, user=USER)
    measures: list[PromptMeasure] = []
    if config.ocr is not None:
        measures.append(TextMeasure(RapidOcr()))
    for model in config.clip_scores:
        scorer = build_scorer(model, weights=weights, tokenizer=tokenizer, device=device)
        name = model_name(model) + ("_own" if own(model) else "")
        measures.append(ClipMeasure(name, scorer, texts, config.retrieval))
    if config.scenes and scenes is not None:
        measures.append(scenes)
    return measures


def measure_facts(config: PromptFollowing, *, tokenizer: Path | None) -> dict[str, str]:
    """What measures, for provenance: the SHA-256 of every model's weights by its name, and the engine that reads."""
    models = {model_name(model): weights_digest(model, tokenizer=tokenizer) for model in config.clip_scores}
    return models | (engine_facts() if config.ocr is not None else {})
