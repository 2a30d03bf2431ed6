"""What parameters alone show to be wrong with the sizes of pictures: rules as those of `stages.plans.rules`."""

from collections.abc import Iterator

from stages.cache_latents import CacheLatents
from stages.generate import Generate
from stages.import_tokenizer import ImportTokenizer
from stages.plans.recipe import Recipe
from stages.pretrain import Pretrain
from stages.reference import ReferenceStatistics
from stages.train_generator import TrainGenerator


def reference_has_the_size_of_what_is_compared(recipe: Recipe) -> Iterator[str]:
    """That of the drawn pictures; of what a generator learns the smallest squares, or the tokenizer's."""
    drawn = [(own, generate.size) for own, generate in recipe.of(Generate) if generate.size is not None]
    learnt = [(own, cache.sizes) for own, cache in recipe.of(CacheLatents) if cache.sizes is not None]
    learnt += [
        (f"{own}.images", each.images.sizes) for own, each in recipe.of(TrainGenerator) if each.images is not None
    ]
    encoded = [(f"{own}.tokenizer", pretrain.tokenizer.image_size) for own, pretrain in recipe.of(Pretrain)]
    # VTP's own stands in its folder.
    imported = [(f"{own}.source", imported.source) for own, imported in recipe.of(ImportTokenizer)]
    encoded += [(own, side) for own, source in imported if (side := getattr(source, "image_size", None))]
    places = (
        [(f"{own}.size.height", size.height) for own, size in drawn]
        or [(f"{own}.sizes, the smallest square,", sizes.square.height) for own, sizes in learnt]
        or [(f"{own}.image_size", side) for own, side in encoded]
    )
    for name, reference in recipe.of(ReferenceStatistics):
        for own, size in drawn:
            if size.height != size.width:
                yield f"{own}.size: {size.width} x {size.height}, and {name} compares squares"
        for place, side in places:
            if reference.image_size != side:
                yield f"{name}.image_size: {reference.image_size}, {place} is {side}"


def generators_fit_the_latents(recipe: Recipe) -> Iterator[str]:
    for own, pretrain in recipe.of(Pretrain):
        grid, pixels = pretrain.tokenizer.latent_shape[1], pretrain.tokenizer.pixels_per_latent
        caches = [(name, cache.sizes) for name, cache in recipe.of(CacheLatents) if cache.sizes is not None]
        for name, training in recipe.of(TrainGenerator):
            patch_size, sizes = training.model.patch_size, list(caches)
            if training.images is not None:
                sizes = [(f"{name}.images", training.images.sizes)]
            for place, given in sizes:
                if given.multiple % (pixels * patch_size):
                    yield (
                        f"{place}.sizes.multiple: {given.multiple} is no multiple of {pixels * patch_size}, the pixels per "
                        f"latent ({own}), {pixels}, times {name}.model.patch_size, {patch_size}"
                    )
            if not sizes and grid % patch_size:
                yield (
                    f"{name}.model.patch_size: {patch_size} does not divide {grid}, the side of the latents "
                    f"({own}.tokenizer.image_size / {pixels}, the pixels per latent)"
                )


def pictures_to_encode_are_given(recipe: Recipe) -> Iterator[str]:
    for name, training in recipe.of(TrainGenerator):
        if training.images is not None and not recipe.given(name, "--shards"):
            yield (
                f"{name}.images: asks for pictures, and the stage's command gives none; add --shards FOLDER to it, and the "
                "folder to its deps, or set it to null"
            )
        if training.images is None and recipe.given(name, "--shards"):
            yield f"{name}.images: null, and the stage's command gives --shards; say how they are encoded, or leave it out"
        if training.images is not None and recipe.given(name, "--latents") != (
            training.images.statistics_images is None
        ):
            yield (
                f"{name}.images.statistics_images: null takes those of --latents, which the stage's command then has; a "
                "number measures them, and it has none"
            )
