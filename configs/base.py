"""Every key of a tcq config, with its unit and default. Other files change some of them.

The allowed values of each key are in tcq/config/checks.py.
"""

from ml_collections import ConfigDict, FieldReference

FEW_KINDS = 170  # up to which each anchor loses its share; with more, fewer than 3 of 510 (LEAST of kinds.py)


def arguments(text: str, **defaults: str) -> dict[str, str]:
    """Parses "key=value,key=value", the text after --config=file.py:; a path may hold commas."""
    values = dict(defaults)
    key = ""
    for piece in text.split(",") if text else []:
        name, equals, value = piece.partition("=")
        if equals and name in defaults:
            key, values[name] = name, value
        elif key and not (equals and name.isidentifier()):
            values[key] += f",{piece}"
        else:
            known = ", ".join(f"{k}=..." for k in defaults)
            raise ValueError(f"argument {piece!r} is unknown: use {known}, separated by commas")
    return values


def set_bits(c: ConfigDict, bits: str) -> None:
    """M codebooks of 16 codewords, 4 bits each, for a multiple of 4 bits."""
    if not bits.isdecimal() or int(bits) % 4 or not int(bits):
        raise ValueError(f"bits={bits} must be a multiple of 4, such as 16, 32 or 64")
    c.quantizer.num_codebooks = int(bits) // 4


def set_backbone(c: ConfigDict, backbone: str, weights: str, *, image_size: int) -> None:
    """Sets a named backbone or published weights, and its fine-tuning.

    This is our choice after DeiT and BEiT.
    """
    c.model.name, c.model.weights = backbone, weights
    c.model.pooling = "cls"
    c.data.image_size = image_size
    if weights:
        c.quantizer.init = "kmeans"
        c.optim.learning_rate = 5e-4
        c.optim.backbone_rate = 0.1
        c.optim.layer_decay = 0.75


def clip_kinds(c: ConfigDict, kinds: str, *, temperature: float) -> None:
    """Clips the pairs of one kind at temperature 0.2, for about `kinds` kinds of things.

    "" is for unknown: then few pairs are clipped, at the given temperature.
    """
    if kinds and (not kinds.isdecimal() or int(kinds) < 2):
        raise ValueError(
            f"kinds={kinds} must be a whole number of at least 2: about how many kinds of things there are"
        )
    c.loss.temperature = 0.2 if kinds else temperature
    c.loss.clip = f"kinds={kinds}" if kinds else 0.02
    c.loss.clip_scope = "anchor" if kinds and int(kinds) <= FEW_KINDS else "batch"


def train_on_embeddings(c: ConfigDict, kinds: str = "") -> None:
    """Only projection and codebooks are trained, from those of OPQ on.

    `kinds` is that of `clip_kinds`. Start, temperature and clip follow the validation images of three sets, and the
    learning rate those of one (docs/clipping.md). Without `kinds` few pairs are clipped, at a high temperature. The
    rest is our choice.
    """
    clip_kinds(c, kinds, temperature=0.7)
    c.quantizer.metric = "ip"
    c.quantizer.scale = 10.0
    c.quantizer.init = "opq"
    c.quantizer.init_images = 65_536  # as many as FAISS takes
    c.optim.learning_rate = 1e-4
    c.optim.weight_decay = 1e-4
    c.optim.warmup_steps = 0.1
    c.train.total_steps = 1000
    c.eval.every_steps = 500
    c.data.augment.update(crop=0.7, hue=0.0, blur=0.0)


def fine_tune(c: ConfigDict, arg: str) -> None:
    """Applies "bits=,backbone=,weights=" and the settings that Flickr and NUS-WIDE share."""
    a = arguments(arg, bits="32", backbone="", weights="")
    set_bits(c, a["bits"])
    set_backbone(c, a["backbone"] or ("" if a["weights"] else "vit_s16"), a["weights"], image_size=224)
    c.model.dtype = "bfloat16"
    c.data.batch_size = 256
    c.quantizer.metric = "ip"
    c.quantizer.scale = 10.0
    c.loss.temperature = 0.3
    c.train.total_epochs = 50.0


def count_or_share(value: float) -> FieldReference:
    """Returns a field that takes a count (int) or a share (float)."""
    return FieldReference(value, field_type=object)


def get_config() -> ConfigDict:
    """The defaults: a small ViT from scratch.

    `data.source` and the length of the run have to be set.
    """
    c = ConfigDict()
    c.data = _data()
    c.model = _model()
    c.quantizer = _quantizer()
    c.loss = _loss()
    c.optim = _optim()
    c.train = _train()
    c.eval = _eval()
    c.checkpoint = checkpoint = ConfigDict()
    checkpoint.every_steps = 500  # and after each validation
    checkpoint.keep = 1  # newest checkpoints kept, beside the best
    return c


def _data() -> ConfigDict:
    data = ConfigDict()
    data.source = ""  # digits | tfds:<name> | folder:<path> | embeddings:<folder>
    data.protocol = "folder"  # which images are queries, database, training images: docs/protocols.md
    data.split_seed = -1  # seed of the split; -1 is that of the protocol, which gives the published split
    data.query = 0.1  # share of the images held out as queries (protocol folder); 0 without labels
    data.validation = 0.1  # share of the training images held out for validation
    data.labels = "auto"  # of a folder: auto | folders | none | a .csv or .jsonl file of path,label[,label ...]
    data.exclude = ""  # patterns of names or relative paths that are left out of a folder, separated by commas
    data.max_pixels = 100_000_000  # of an image; a JPEG is counted at the scale at which it is decoded
    data.image_size = 32  # pixels, the side to which images are decoded, once
    data.resize = "crop"  # crop (a central square) | squash (scale both sides); weights set it unless given
    data.interpolation = "bicubic"  # bicubic | bilinear; weights set it unless the command line does
    data.crop_share = 1.0  # share of the shorter side that "crop" keeps; weights set it unless the command line does
    data.batch_size = 256  # images per step over all devices (two views each)
    data.views = 0  # views of each image; 0 draws new ones in every step. A frozen backbone embeds each view once
    data.resident = 1024  # MiB; training images of up to this size are kept on every device
    data.threads = 2  # that read batches ahead
    data.tfds_dir = ""  # folder of prepared TFDS datasets; "" is the default of TFDS (~/tensorflow_datasets)
    data.cache_gib = 100.0  # GiB of decoded images above which the longest unused ones are deleted; 0: no limit
    data.cache_dir = ""  # folder of decoded images; "" is $XDG_CACHE_HOME/tcq or ~/.cache/tcq
    data.augment = augment = ConfigDict()  # strengths, 0 is off: tcq/augment.py
    augment.crop = 0.8  # largest share of the area that is cut away
    augment.stretch = 0.2877  # log of the largest change of aspect ratio (4/3)
    augment.rotate = 0.0  # degrees
    augment.shift = 0.0  # share of the side
    augment.flip = 0.5  # probability
    augment.brightness = 0.4  # factor 1 +- this
    augment.contrast = 0.4  # factor 1 +- this
    augment.saturation = 0.4  # factor 1 +- this
    augment.hue = 0.1  # turns of the circle, up to 0.5
    augment.jitter = 0.8  # probability of the four changes above
    augment.grayscale = 0.2  # probability
    augment.blur = 0.5  # probability
    augment.noise = 1.0  # added to an embedding that has one view only, in standard deviations of each number
    augment.drop = 0.0  # probability with which a number of such an embedding is set to its mean
    return data


def _model() -> ConfigDict:
    model = ConfigDict()
    model.name = ""  # vit_<ti|s|b|l><4|8|14|16|32>, resnet<18|34|50|101>, or "": a ViT of the next keys
    model.embedder = ""  # file.py:function or module:function, instead of a backbone of ours: docs/embeddings.md
    model.embedder_output = ()  # width and sums of its embeddings of fixed images; set by itself
    model.weights = ""  # path of published weights or of a workdir (docs/weights.md); they decide the keys marked *
    model.width = 192  # *
    model.depth = 6  # * blocks
    model.heads = 3  # *
    model.patch = 8  # * pixels
    model.pooling = "mean"  # cls | mean | flat | attention, of a ViT; weights set cls unless the command line sets it
    model.positions = "learned"  # * learned | sincos2d
    model.mlp_ratio = 4.0  # * hidden width of the MLP over width
    model.class_token = False  # * a class token even if it is not pooled
    model.registers = 0  # * further learned tokens
    model.layer_scale = False  # * a learned factor for each branch
    model.gelu = "tanh"  # * tanh (as in JAX models) | erf (as in PyTorch models)
    model.norm_eps = 1e-6  # * added to the variance
    model.stem = "imagenet"  # * imagenet (7 x 7, stride 2, pooling) | cifar (3 x 3), of a ResNet; conv, of a ViT
    model.mean = (0.5, 0.5, 0.5)  # subtracted from pixels in [0, 1]; weights set it unless the command line does
    model.std = (0.5, 0.5, 0.5)  # divisor after that; weights set it unless the command line does
    model.dropout = 0.0  # rate
    model.drop_path = 0.0  # rate of stochastic depth in the last block
    model.dtype = "float32"  # float32 | bfloat16, of the computation; parameters and statistics are float32
    model.attention = "xla"  # xla | cudnn (NVIDIA GPUs, bfloat16)
    model.remat = False  # recompute blocks in the backward pass: less memory, more computation
    model.scan = False  # the blocks of a ViT as one loop: compiles faster, copies the parameters once a step
    return model


def _quantizer() -> ConfigDict:
    quantizer = ConfigDict()
    quantizer.num_codebooks = 8  # M
    quantizer.num_codewords = 16  # K, a power of two up to 65,536
    quantizer.codeword_dim = 16  # d; features have D = M * d numbers
    quantizer.bits = 0  # per image; 0 or M * log2(K)
    quantizer.scale = 5.0  # inverse temperature of soft assignment
    quantizer.metric = "l2"  # l2 (SPQ) | ip (MeCoQ)
    quantizer.init = "data"  # of the codewords: kmeans | data (features of images) | random; opq: projection and kmeans
    quantizer.init_images = 1024  # training images for all but random, drawn by train.seed
    quantizer.whitening = 1.0  # strength of whitening by the views before opq, 0 (none) to 1; needs several views
    return quantizer


def _loss() -> ConfigDict:
    loss = ConfigDict()
    loss.pairing = "cross"  # cross | quantized | float
    loss.temperature = 0.5
    loss.clip = count_or_share(0)  # negatives clipped: a count (of each anchor), a share (float), or "kinds=N": 1 / N
    loss.clip_scope = "anchor"  # anchor (the same number of each) | batch (the most similar pairs of the whole batch)
    loss.clip_from = 0.0  # share of the run before which nothing is clipped
    loss.clip_full = 0.0  # share of the run after which all of `clip` is; in between it grows
    loss.clip_ramp = "linear"  # linear | cosine
    loss.debias = 0.0  # rho, the assumed share of false negatives of the debiased loss (Chuang et al. 2020); 0 is off
    loss.queue = 0  # soft codes of earlier batches, whose reconstructions are further negatives (MeCoQ)
    loss.queue_from = 0.0  # share of the run before which they are not used
    loss.block_size = 0  # anchors at a time, which bounds the memory; 0 makes blocks of 4 M similarities
    loss.gather = "all"  # all | ring: each device holds all columns, or its own and passes them round
    loss.entropy_weight = 0.0  # of the mean entropy of the soft codes
    loss.diversity_weight = 0.0  # of the mean cosine similarity of the codewords of a codebook
    return loss


def _optim() -> ConfigDict:
    optim = ConfigDict()
    optim.name = "adamw"  # adamw | lars | sgd
    optim.learning_rate = 1e-3  # after the warm-up
    optim.warmup_steps = count_or_share(
        0.1
    )  # linear from 0, then cosine to 0: a count, or a share of the run as a float
    optim.backbone_rate = 1.0  # factor of the learning rate for the backbone
    optim.head_rate = 1.0  # for the projection
    optim.codebooks_rate = 1.0  # for the codebooks
    optim.layer_decay = (
        1.0  # learning rate of a block divided by that of the next block; the last block has optim.backbone_rate
    )
    optim.frozen_blocks = (
        0  # number of first blocks that are not trained, with all layers before them; -1 is the whole backbone
    )
    optim.weight_decay = 1e-4  # of matrices only
    optim.momentum = 0.9  # of lars and sgd
    optim.clip_norm = 1.0  # largest global norm of the gradient; 0 is off
    return optim


def _train() -> ConfigDict:
    train = ConfigDict()
    train.total_steps = 0  # set this or the next one, and leave the other 0
    train.total_epochs = 0.0
    train.microbatches = 1  # parts of a batch that the backbone processes one by one: less memory, the same loss
    train.seed = 0  # of initial weights, data order and views
    train.log_every_steps = 50
    train.compare_every_steps = 500  # how often the replicas' bits are compared
    train.max_skipped = 10  # consecutive steps with a loss or gradient that is not finite before the run rolls back
    return train


def _eval() -> ConfigDict:
    evaluation = ConfigDict()
    evaluation.every_steps = 0  # validation during training; 0 is only after the last step
    evaluation.k = -1  # cut-off of mAP@k; -1 is that of the protocol, 0 the whole database
    evaluation.score = "ip"  # similarity of the ranking: ip | l2 | cosine (as in the loss; not in FAISS)
    evaluation.normalize = "auto"  # queries before ranking: none | whole | subvectors | auto (as the loss sees them)
    evaluation.squared = True  # "l2" adds squared distances of subvectors; False adds distances, as the code of SPQ
    evaluation.ties = "expected"  # equal scores: expected | index | best | worst (tcq/metrics.py)
    evaluation.denominator = "hits"  # of average precision: hits | min | all
    evaluation.empty = "zero"  # queries without relevant items: zero (they score 0) | skip
    evaluation.exclude_query = True  # a query that is in the database is not among its own answers
    evaluation.max_scores = 8_388_608  # float32 scores in memory at once
    evaluation.baseline_mib = 128  # MiB of pixels on which FAISS PQ is trained; left out where these are too few
    evaluation.batch_size = 64  # images per encoding step and device
    evaluation.max_database = 10_000  # database images for validation during training
    return evaluation
