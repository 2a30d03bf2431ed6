"""How well pictures match their prompts by a CLIP: the mean cosine, and whether each finds its prompt among others.

The CLIP score is the plain cosine, neither scaled by 2.5 or 100 nor clamped (Hessel et al. 2021 do both): figures of two
models do not compare, nor do those of models whose tokenizer cuts prompts elsewhere. Retrieval is R-precision of
text-to-image papers (Xu et al. 2018): a picture's own prompt and others that are drawn, in the order of their cosines.
A CLIP whose text tower conditions the generator is its teacher and no judge: such figures end with `_own`.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from pydantic import Field
from torch import Tensor

from vtp.config import Config
from vtp.distributed import gather_objects, gather_rows, own_rows, ranks
from vtp.draws import numpy_draws
from vtp.evaluation.checks import require_prompted
from vtp.evaluation.clip_score import ClipScorer
from vtp.finite import require_finite

CAPTIONS = 256  # of a pass through the text tower
ROWS = 64  # pictures whose candidates are compared at once
KS = (1, 5)  # ranks of recall


class RetrievalConfig(Config):
    """The other prompts among which a picture has to find its own."""

    among: int = Field(
        gt=max(KS), description="prompts that a picture chooses from, its own among them; published: 100"
    )
    seed: int = Field(ge=0, lt=2**32, description="seed of the choice of the others")


class ClipMeasure:
    """The figures of pictures by one CLIP (`vtp.evaluation.prompt_measures.PromptMeasure`)."""

    def __init__(
        self, name: str, scorer: ClipScorer, prompts: Iterable[str], retrieval: RetrievalConfig | None
    ) -> None:
        """`prompts`: all that pictures will be asked to show; `name`: of the model, with which those of figures end."""
        self._name, self._scorer, self._retrieval = name, scorer, retrieval
        self._numbers = {text: number for number, text in enumerate(dict.fromkeys(prompts))}
        self._images: list[Tensor] = []
        self._asked: list[int] = []

    def add(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Images [B, 3, H, W] uint8 and what each was asked to show. Raises ValueError for a prompt that is none of all."""
        from PIL.Image import fromarray

        require_prompted(images, prompts)
        if unknown := [text for text in prompts if text not in self._numbers]:
            raise ValueError(f"{unknown[0]!r} is none of the {len(self._numbers)} prompts that were announced")
        pictures = [self._scorer.prepare(fromarray(pixels)) for pixels in images.permute(0, 2, 3, 1).cpu().numpy()]
        embeddings = self._scorer.embed_images(torch.stack(pictures))
        require_finite(embeddings, f"image embeddings of {self._name}", "fetch the weights behind them again")
        self._images.append(embeddings.cpu())
        self._asked += [self._numbers[text] for text in prompts]

    def figures(self) -> dict[str, float]:
        """Over all ranks, each of which must ask."""
        captions = self._captions
        images, asked = torch.cat([captions[:0], *self._images]), torch.tensor(self._asked, dtype=torch.long)
        self._images, self._asked = [], []
        names, values = [f"clip_score_{self._name}"], [(images * captions[asked]).sum(1, dtype=torch.float64)[:, None]]
        if self._retrieval is not None:
            first = sum(gather_objects(len(asked))[: ranks().rank])
            names += [f"retrieval_r{k}_of{self._retrieval.among}_{self._name}" for k in KS]
            values.append(retrieval(images, captions, asked, self._retrieval, first=first))
        table = gather_rows(torch.cat(values, 1))  # of all pictures in order, so that rounding is that of one rank
        if not len(table):
            raise ValueError("no pictures were held against their prompts; is the set empty?")
        return dict(zip(names, table.mean(0).tolist(), strict=True))

    @cached_property
    def _captions(self) -> Tensor:
        """Embeddings [P, E] of all prompts, of which ranks share whole batches; those that the tower reads alike are one."""
        tokens = self._scorer.tokenize(list(self._numbers))
        tokens, places = tokens.unique(dim=0, return_inverse=True)
        batches = tokens.split(CAPTIONS)
        own = [self._scorer.embed_captions(batches[number]).cpu() for number in own_rows(len(batches))]
        width = max(gather_objects(own[0].shape[1] if own else 0))
        embeddings = gather_rows(torch.cat([torch.empty(0, width), *own]))
        require_finite(embeddings, f"text embeddings of {self._name}", "fetch the weights behind them again")
        return embeddings[places]


def retrieval(images: Tensor, captions: Tensor, asked: Tensor, config: RetrievalConfig, *, first: int) -> Tensor:
    """Whether images [n, E] find their prompts, the `asked` [n] among captions [P, E], in first place and in the first five.

    [n, 2] float64 from 0 to 1. Of captions that are equally near none is preferred: where k places are left for m of them,
    the own one counts k/m, so that a model which tells nothing apart has chance, k of N. `first` is the number of the
    first image among all, by which its candidates are drawn.
    """
    hits = [torch.empty(0, len(KS), dtype=torch.float64)]
    for start in range(0, len(asked), ROWS):
        numbered = enumerate(asked[start : start + ROWS].tolist(), first + start)
        chosen = torch.tensor([_candidates(number, own, len(captions), config) for number, own in numbered])
        # In double precision and then rounded: what is equal stays equal, whatever the order of summation.
        some = images[start : start + ROWS].double()
        cosines = torch.einsum("ne,nce->nc", some, captions[chosen].double()).float()
        own, others = cosines[:, :1], cosines[:, 1:]
        before, alike = (others > own).sum(1), (others == own).sum(1) + 1
        hits.append(torch.stack([((k - before).double() / alike).clamp(0, 1) for k in KS], 1))
    return torch.cat(hits)


def _candidates(number: int, own: int, count: int, config: RetrievalConfig) -> list[int]:
    """The own prompt, and others of `count` by chance, no one twice: a function of the seed and the image's number."""
    drawn = numpy_draws(config.seed, "retrieval", number).choice(count - 1, config.among - 1, replace=False)
    return [own, *(drawn + (drawn >= own)).tolist()]
