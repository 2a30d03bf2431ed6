"""What the names of metrics mean: what each is, which way is better, its unit, and where it comes from."""

import re
from collections.abc import Iterable
from typing import NamedTuple

HIGHER, LOWER, NEITHER = "higher", "lower", "-"


class LegendEntry(NamedTuple):
    """Of all names that a pattern fits as a whole."""

    pattern: str
    what: str
    better: str
    unit: str
    source: str


SHARE = "share, 0 to 1"
LEGEND = [
    # understanding
    LegendEntry(r"not_measured", "why there are no figures", NEITHER, "-", "this project"),
    LegendEntry(
        r"zero_shot_top(1|5)_squash",
        "right class among the first 1 or 5 by class token and prompts; both sides of an image scaled",
        HIGHER,
        SHARE,
        "CLIP, Radford et al. 2021; VTP's script",
    ),
    LegendEntry(r"zero_shot_top(1|5)_centre", "the same of a centre crop", HIGHER, SHARE, "CLIP, Radford et al. 2021"),
    LegendEntry(
        r"linear_probe_bottleneck(_category)?",
        "linear classifier on the mean latent, chosen on held-out training images",
        HIGHER,
        SHARE,
        "VTP, section 4.1 and figures",
    ),
    LegendEntry(
        r"linear_probe_last(_category)?",
        "linear classifier on class token and mean patch, chosen on held-out training images",
        HIGHER,
        SHARE,
        "DINOv2, Oquab et al. 2023",
    ),
    LegendEntry(
        r"linear_probe_multi(_category)?",
        "linear classifier on class tokens of the last blocks, chosen on held-out training images",
        HIGHER,
        SHARE,
        "DINOv2, Oquab et al. 2023",
    ),
    LegendEntry(
        r"linear_probe_multi(_category)?_best_on_val",
        "the same, chosen on the validation images that it reports: too high by that choice",
        HIGHER,
        SHARE,
        "VTP, table 2 and its script",
    ),
    LegendEntry(
        r"knn\d*_\w+", "weighted k-nearest neighbours on frozen features", HIGHER, SHARE, "DINO, Caron et al. 2021"
    ),
    LegendEntry(r"chance", "accuracy of a guess: 1 / classes", NEITHER, SHARE, "this run's classes"),
    # reconstruction and generation
    LegendEntry(
        r"psnr(_[\d.e-]+)?",
        "peak signal-to-noise ratio of 8-bit reconstructions, mean over images; after _ the noise on latents",
        HIGHER,
        "dB",
        "definition",
    ),
    LegendEntry(r"ssim", "structural similarity, mean over images", HIGHER, "up to 1", "Wang et al. 2004"),
    LegendEntry(
        r"lpips_.+",
        "perceptual distance, mean over images; after _ the network",
        LOWER,
        "distance",
        "LPIPS, Zhang et al. 2018",
    ),
    LegendEntry(
        r"rfid_.+_reconstructed",
        "Fréchet distance of so many reconstructions to the real images of gFID: its floor by this decoder",
        LOWER,
        "squared distance of features",
        "this project",
    ),
    LegendEntry(
        r"rfid_.+(?<!_reconstructed)",
        "Fréchet distance of reconstructions to their originals; after _ the features and the number of images",
        LOWER,
        "squared distance of features",
        "Heusel et al. 2017",
    ),
    LegendEntry(
        r"fid_.+_real",
        "Fréchet distance of so many held-out real images to those that the generator learnt",
        LOWER,
        "squared distance of features",
        "this project",
    ),
    LegendEntry(
        r"fdr\d+_.+",
        "mean over so many networks of the distance over that of held-out real images, after _vs their number: they score 1",
        LOWER,
        "ratio",
        "FDr6, RAEv2",
    ),
    LegendEntry(r"guidance_scale|timestep_shift", "of the setting of the lowest gFID", NEITHER, "number", "this run"),
    LegendEntry(
        r"class_accuracy_.+_real",
        "share of held-out real images whose class a linear probe on features of real images tells: the ceiling",
        HIGHER,
        SHARE,
        "this project",
    ),
    LegendEntry(
        r"class_accuracy_.+(?<!_real)",
        "share of images whose class that probe tells; of reconstructions, the decoder's ceiling",
        HIGHER,
        SHARE,
        "this project; Ravuri & Vinyals 2019 for the idea",
    ),
    LegendEntry(
        r"gfid_.+",
        "Fréchet distance of samples to real images; after _ features, number, guidance, labels",
        LOWER,
        "squared distance of features",
        "Heusel et al. 2017",
    ),
    # samples of prompts
    LegendEntry(
        r"clip_score_.+",
        "mean cosine of pictures and prompts by a CLIP; _own: by the one whose text tower conditions the generator",
        HIGHER,
        "-1 to 1",
        "Hessel et al. 2021, without factor",
    ),
    LegendEntry(
        r"retrieval_r\d+_of\d+_.+",
        "share of pictures that find their prompt in the first so many places among so many prompts, by a CLIP",
        HIGHER,
        SHARE,
        "R-precision, Xu et al. 2018",
    ),
    LegendEntry(
        r"(object|count|position|background|scene)_accuracy",
        "share of prompts whose composed scene a detector finds: all things, their numbers, places, colour; all of it",
        HIGHER,
        SHARE,
        "this project; relations by GenEval's rule",
    ),
    LegendEntry(r"word_accuracy_.+", "share of quoted words that an OCR engine reads", HIGHER, SHARE, "this project"),
    LegendEntry(
        r"character_accuracy_.+",
        "1 - edit distance / length of the longer, mean over quoted words",
        HIGHER,
        SHARE,
        "AnyText, Tuo et al. 2024",
    ),
    LegendEntry(r"\w+_prompts|prompts_with_words", "prompts that ask for it", NEITHER, "prompts", "this run"),
    LegendEntry(r"sfid_.+", "the same in spatial features", LOWER, "squared distance of features", "Nash et al. 2021"),
    LegendEntry(
        r"kid_.+",
        "squared maximum mean discrepancy of samples and real images, cubic kernel",
        LOWER,
        "squared distance",
        "KID, Bińkowski et al. 2018",
    ),
    LegendEntry(
        r"is_.+",
        "inception score: sure of each sample's class, and all classes drawn",
        HIGHER,
        "1 to classes",
        "Salimans et al. 2016",
    ),
    LegendEntry(
        r"precision_.+",
        "share of samples within the manifold of real images",
        HIGHER,
        SHARE,
        "Kynkäänniemi et al. 2019",
    ),
    LegendEntry(
        r"recall_.+", "share of real images within the manifold of samples", HIGHER, SHARE, "Kynkäänniemi et al. 2019"
    ),
    # latents
    LegendEntry(
        r"channel_mean_largest",
        "largest mean of a channel of the latents, as absolute value",
        NEITHER,
        "latent",
        "this project",
    ),
    LegendEntry(
        r"channel_std_(smallest|median|largest)",
        "standard deviation of the channels",
        NEITHER,
        "latent",
        "this project",
    ),
    LegendEntry(
        r"anisotropy_mean_cosine",
        "mean cosine of pairs of tokens; 0: all directions alike",
        NEITHER,
        "-1 to 1",
        "Ethayarajh 2019",
    ),
    LegendEntry(
        r"anisotropy_largest_to_mean_eigenvalue",
        "of the tokens' covariance; 1: isotropic",
        NEITHER,
        "ratio",
        "this project",
    ),
    LegendEntry(
        r"effective_rank",
        "exponential of the entropy of the covariance's eigenvalues",
        NEITHER,
        "channels",
        "Roy & Vetterli 2007",
    ),
    # training and speed
    LegendEntry(r"steps", "updates of the weights", NEITHER, "count", "this run"),
    LegendEntry(r"samples", "training samples seen, repeats included", NEITHER, "count", "this run"),
    LegendEntry(
        r"evaluated|interpolated",
        "epochs of a generator until its distance is the number before: at an evaluation, or on the line between two",
        LOWER,
        "epochs",
        "EP-FID, RAEv2",
    ),
    LegendEntry(r"images", "training images that the epochs repeat", NEITHER, "count", "this run"),
    LegendEntry(r"flops", "training FLOPs, forward and backward", NEITHER, "FLOPs", "this run, counted from shapes"),
    LegendEntry(r"parameters", "weights of the model", NEITHER, "count", "this run"),
    LegendEntry(r"epochs", "passes over the training set", NEITHER, "count", "this run"),
    LegendEntry(
        r"median|p99|max",
        "of the gradient's norm before clipping along the training, or of an objective's on the trunk",
        NEITHER,
        "norm",
        "this run",
    ),
    LegendEntry(
        r"(encode|decode)_images_per_second",
        "speed of encoder or decoder; measured, so it varies",
        HIGHER,
        "images/s",
        "this run",
    ),
    LegendEntry(
        r"(encode|decode)_flops_per_image", "FLOPs of a forward pass", LOWER, "FLOPs", "this run, counted by torch"
    ),
    LegendEntry(
        r"(encode|decode)_peak_device_gigabytes",
        "largest memory of tensors on the GPU, weights included",
        LOWER,
        "GB",
        "this run",
    ),
    LegendEntry(r"peak_process_gigabytes", "largest resident memory of the measuring process", LOWER, "GB", "this run"),
    LegendEntry(
        r"device|threads|batch_size|warmup_batches|batches",
        "what the speed was measured with",
        NEITHER,
        "-",
        "this run",
    ),
]


def legend_of(names: Iterable[str]) -> dict[str, LegendEntry | None]:
    """The meaning of names of metrics; None for one that the legend lacks."""
    return {name: next((each for each in LEGEND if re.fullmatch(each.pattern, name)), None) for name in names}
